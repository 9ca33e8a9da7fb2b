/* What Python sees of tunnels that the core may lease by itself: a Depot. */
#include "module.h"

#include <stdlib.h>

PyTypeObject *depot_type;

static TunnelObject *object_of(struct tunnel *tunnel)
{
    return (TunnelObject *)((char *)tunnel - offsetof(TunnelObject, tunnel));
}

/* (waiter, leases, idle_since): of one that is Python's again. */
static PyObject *given_back(struct tunnel *tunnel)
{
    TunnelObject *object = object_of(tunnel);
    PyObject *waiter = object->waiter ? object->waiter : Py_None; /* somebody has closed it */
    tunnel->depot = NULL;
    PyObject *answer = Py_BuildValue("OId", waiter, tunnel->leases, (double)tunnel->idle_since / 1e9);
    Py_DECREF((PyObject *)object); /* the depot's */
    return answer;
}

PyObject *depots_new(CoreObject *core, PyObject *waiter)
{
    if (!core->open)
        return module_core_is_closed();
    DepotObject *self = (DepotObject *)module_allocate(depot_type);
    if (!self)
        return NULL;
    self->depot.core = &core->core;
    Py_INCREF((PyObject *)core);
    self->core = (PyObject *)core;
    Py_INCREF(waiter);
    self->waiter = waiter;
    return (PyObject *)self;
}

PyObject *depots_back(TunnelObject *tunnel)
{
    DepotObject *self = (DepotObject *)((char *)tunnel->tunnel.depot - offsetof(DepotObject, depot));
    PyObject *about = given_back(&tunnel->tunnel);
    if (about && !self->waiter) {
        Py_DECREF(about);
        Py_RETURN_NONE;
    }
    return about ? Py_BuildValue("OiN", self->waiter, (int)HEARD_BACK, about) : NULL;
}

/* No order has it any longer, so no tunnel of it is leased. */
static void depot_dealloc(PyObject *object)
{
    DepotObject *self = (DepotObject *)object;
    PyObject_GC_UnTrack(object);
    for (struct tunnel *tunnel; self->core && (tunnel = depot_take(&self->depot));) {
        tunnel->depot = NULL;
        Py_DECREF((PyObject *)object_of(tunnel));
    }
    Py_XDECREF(self->core);
    Py_XDECREF(self->waiter);
    module_release(object);
}

/* Whoever hears of what comes back has the depot, too. */
static int depot_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((DepotObject *)object)->waiter);
    return 0;
}

static int depot_clear(PyObject *object)
{
    Py_CLEAR(((DepotObject *)object)->waiter);
    return 0;
}

static PyObject *depot_parked(PyObject *object, PyObject *given)
{
    DepotObject *self = (DepotObject *)object;
    if (!PyObject_TypeCheck(given, tunnel_type)) {
        PyErr_SetString(PyExc_TypeError, "not a Tunnel");
        return NULL;
    }
    TunnelObject *tunnel = (TunnelObject *)given;
    if (tunnel->core != self->core || !tunnel->adopted || tunnel->closing || tunnel->tunnel.depot) {
        PyErr_SetString(PyExc_ValueError, "the tunnel is not this core's, or in a depot");
        return NULL;
    }
    Py_INCREF(given);
    depot_park(&self->depot, &tunnel->tunnel);
    Py_RETURN_NONE;
}

static PyObject *depot_taken(PyObject *object, PyObject *unused)
{
    struct tunnel *tunnel = depot_take(&((DepotObject *)object)->depot);
    (void)unused;
    if (!tunnel)
        Py_RETURN_NONE;
    return given_back(tunnel);
}

static PyObject *depot_recalled(PyObject *object, PyObject *unused)
{
    struct depot *depot = &((DepotObject *)object)->depot;
    struct tunnel *tunnel;
    (void)unused;
    PyObject *all = PyList_New(0);
    if (!all)
        return NULL;
    depot_recall(depot);
    while ((tunnel = depot_take(depot))) {
        PyObject *back = given_back(tunnel);
        int error = back ? PyList_Append(all, back) : -1;
        Py_XDECREF(back);
        if (error) {
            Py_DECREF(all);
            return NULL;
        }
    }
    return all;
}

static PyObject *depot_counts(PyObject *object, PyObject *unused)
{
    struct depot *depot = &((DepotObject *)object)->depot;
    (void)unused;
    pthread_mutex_lock(&depot->core->lock);
    unsigned count = depot->count, leased = depot->leased, most = depot->most;
    pthread_mutex_unlock(&depot->core->lock);
    return Py_BuildValue("III", count, leased, most);
}

static PyMethodDef depot_methods[] = {
    {"park", depot_parked, METH_O, "park(tunnel)\n\nBetween leases. It belongs to orders until it is given back."},
    {"take", depot_taken, METH_NOARGS,
     "take() -> (waiter, leases, idle_since) or None\n\n"
     "Gives back the tunnel that was used last, by its waiter: how many leases it has had here, and when the last of\n"
     "them ended, in monotonic seconds."},
    {"recall", depot_recalled, METH_NOARGS,
     "recall() -> list\n\n"
     "Gives back all, latest first; those that are leased follow, in `news`, when their leases end."},
    {"counts", depot_counts, METH_NOARGS,
     "counts() -> (parked, leased, most)\n\n`most`: leased at once, since the last recall."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot depot_slots[] = {
    {Py_tp_doc, "Tunnels to one peer that orders may lease."},
    {Py_tp_dealloc, depot_dealloc},
    {Py_tp_traverse, depot_traverse},
    {Py_tp_clear, depot_clear},
    {Py_tp_methods, depot_methods},
    {0, NULL},
};

static PyType_Spec depot_spec = {
    .name = "meshnet.relay.native._core.Depot",
    .basicsize = sizeof(DepotObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_HAVE_GC,
    .slots = depot_slots,
};

/* An order's `through`: None, or (Depot, (before, between, behind)). False with an exception set. */
bool depots_through(PyObject *through, struct order *order, PyObject **depot)
{
    Py_buffer parts[3];
    *depot = NULL;
    if (through == Py_None)
        return true;
    if (!PyArg_ParseTuple(through, "O!(y*y*y*)", depot_type, depot, &parts[0], &parts[1], &parts[2]))
        return false;
    size_t size = sizeof "65535" + MAX_ID;
    for (int part = 0; part < 3; part++) {
        size += (size_t)parts[part].len;
        if (!backlog_append(&order->opening[part], parts[part].buf, (size_t)parts[part].len))
            PyErr_NoMemory();
        PyBuffer_Release(&parts[part]);
    }
    if (size > FRAME_MAX_CONTROL)
        PyErr_SetString(PyExc_ValueError, "an OPEN of that size is none");
    order->depot = &((DepotObject *)*depot)->depot;
    if (PyErr_Occurred()) {
        depots_forget(order);
        return false;
    }
    Py_INCREF(*depot);
    return true;
}

void depots_forget(struct order *order)
{
    for (int part = 0; part < 3; part++)
        free(order->opening[part].bytes);
}

int depots_add(PyObject *module)
{
    depot_type = (PyTypeObject *)PyType_FromSpec(&depot_spec);
    return depot_type ? PyModule_AddObjectRef(module, "Depot", (PyObject *)depot_type) : -1;
}
