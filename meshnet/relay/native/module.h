/* What the two halves of the Python module share. */
#ifndef MESHNET_MODULE_H
#define MESHNET_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "core.h"

typedef struct {
    PyObject_HEAD
    struct core core;
    bool open;
} CoreObject;

typedef struct {
    PyObject_HEAD
    struct tunnel tunnel;
    PyObject *core;   /* the one it belongs to now; must outlive it */
    PyObject *waiter; /* what Core.news gives back for it, again and again */
    bool established; /* told by Core.news, so no thread knows it until it is adopted */
    bool adopted;
    bool closing;
} TunnelObject;

typedef struct {
    PyObject_HEAD
    struct link *link;
    PyObject *core;    /* until it has ended: must outlive it, as must the tunnels */
    PyObject *tunnels[2];
    PyObject *waiter;  /* what Core.news gives back; NULL when it has */
    bool aborting;
    bool ended;
} LinkObject;

/* Of what Core.news says beside waiters. Keep in step with Heard in __init__.py. */
enum heard { HEARD_BEGUN, HEARD_CONNECTED, HEARD_ENDED, HEARD_ACCEPTED, HEARD_STUCK, HEARD_BACK, HEARD_PASSED };

typedef struct OrderObject {
    PyObject_HEAD
    struct order order;
    PyObject *core;
    PyObject *depot;
    PyObject *waiter;
    /* Of those of its links that `passed_add` has taken and `passed_tell` not told: what they have in common. */
    struct backlog rows;
    const char *cipher;
    enum ended_by ended_by;
    bool has_passed;
    struct OrderObject *next_passed;
} OrderObject;

typedef struct {
    PyObject_HEAD
    struct depot depot;
    PyObject *core;   /* must outlive it */
    PyObject *waiter; /* what Core.news says for it */
} DepotObject;

extern PyTypeObject *tunnel_type, *link_type, *depot_type;

PyObject *module_allocate(PyTypeObject *type);
void module_release(PyObject *object);
/* NULL with an exception set. */
void *module_core_is_closed(void);
/* Consumes `about`; NULL if that is. */
PyObject *module_told(PyObject *waiter, enum heard what, PyObject *about);

int links_add(PyObject *module);

int doors_add(PyObject *module);
PyObject *doors_listen(CoreObject *core, PyObject *arguments);
PyObject *doors_order(CoreObject *core, PyObject *arguments);
/* Of an IP address in text. False with an exception set. */
bool doors_host(const char *host, struct address *address);
/* What to tell Python, or NULL with an exception set; None: nothing. */
PyObject *doors_facts(PyObject *link, PyObject *unused);
PyObject *doors_leg_port(PyObject *link, PyObject *unused);
PyObject *doors_begun(struct link *link);
PyObject *doors_ended(struct link *link);
PyObject *doors_accepted(struct accepted *accepted);
PyObject *doors_stuck(struct listener *listener);
void doors_heard_end(struct link *link);
void doors_let_go(struct order *order, unsigned heard);

/* Of one call of Core.news. */
struct passed {
    PyObject *waiters;
    OrderObject *orders, **last;
    int64_t epoch; /* nanoseconds from CLOCK_MONOTONIC to CLOCK_REALTIME */
    int error;
};

/* Keep in step with ROW in meshnet/relay/rows.py. Times in microseconds. */
struct row {
    char id[MAX_ID + 1];
    int64_t opened; /* since the epoch */
    uint32_t connected, ended; /* since then */
    uint32_t idle; /* since its last byte or FIN, when it ended */
    uint16_t port, none;
    uint64_t sent, received;
};

void passed_begin(struct passed *passed, PyObject *waiters);
bool passed_add(struct passed *passed, struct link *link);
int passed_tell(struct passed *passed);

PyObject *lines(PyObject *module, PyObject *arguments);

int depots_add(PyObject *module);
PyObject *depots_new(CoreObject *core, PyObject *waiter);
PyObject *depots_back(TunnelObject *tunnel);
bool depots_through(PyObject *through, struct order *order, PyObject **depot);
void depots_forget(struct order *order);

int handles_add(PyObject *module);
PyObject *handles_shake(CoreObject *core, PyObject *arguments);
/* Who is to be told, or NULL; borrowed. */
PyObject *handles_heard(TunnelObject *tunnel);

#endif
