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
enum heard { HEARD_BEGUN, HEARD_CONNECTED, HEARD_ENDED, HEARD_ACCEPTED, HEARD_STUCK, HEARD_BACK };

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
