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

extern PyTypeObject *tunnel_type;

PyObject *module_allocate(PyTypeObject *type);
void module_release(PyObject *object);
/* NULL with an exception set. */
void *module_core_is_closed(void);

int handles_add(PyObject *module);
PyObject *handles_shake(CoreObject *core, PyObject *arguments);
/* Who is to be told, or NULL; borrowed. */
PyObject *handles_heard(TunnelObject *tunnel);

#endif
