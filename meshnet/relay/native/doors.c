/* What Python sees of connections that the core accepts by itself: a Listener, an Order, and what became of a link. */
#include "module.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static PyTypeObject *listener_type, *order_type;

typedef struct {
    PyObject_HEAD
    struct listener listener;
    PyObject *core;
    PyObject *waiter;
    bool closing;
} ListenerObject;

/* Listener */

PyObject *doors_listen(CoreObject *core, PyObject *arguments)
{
    int fd, direction, shared;
    PyObject *waiter;
    if (!PyArg_ParseTuple(arguments, "iipO", &fd, &direction, &shared, &waiter))
        return NULL;
    if (!core->open)
        return module_core_is_closed();
    ListenerObject *self = (ListenerObject *)module_allocate(listener_type);
    if (!self)
        return NULL;
    self->listener = (struct listener){.source.kind = SOURCE_LISTENER,
                                       .core = &core->core,
                                       .fd = fd,
                                       .direction = direction,
                                       .shared = shared,
                                       .stuck = {.kind = NEWS_LISTENER_STUCK, .owner = &self->listener},
                                       .gone = {.kind = NEWS_LISTENER_GONE, .owner = self}};
    if (core_post(&core->core, COMMAND_LISTEN, &self->listener, NULL, 0)) {
        Py_DECREF((PyObject *)self);
        return PyErr_NoMemory();
    }
    Py_INCREF((PyObject *)core);
    self->core = (PyObject *)core;
    Py_INCREF(waiter);
    self->waiter = waiter;
    Py_INCREF((PyObject *)self); /* the core's, until it is gone */
    return (PyObject *)self;
}

static ListenerObject *object_of(struct listener *listener)
{
    return (ListenerObject *)((char *)listener - offsetof(ListenerObject, listener));
}

static void listener_dealloc(PyObject *object)
{
    ListenerObject *self = (ListenerObject *)object;
    Py_XDECREF(self->core);
    Py_XDECREF(self->waiter);
    module_release(object);
}

static PyObject *listener_go_on(PyObject *object, PyObject *unused)
{
    ListenerObject *self = (ListenerObject *)object;
    (void)unused;
    if (!self->closing && ((CoreObject *)self->core)->open &&
        core_post(self->listener.core, COMMAND_LISTEN, &self->listener, NULL, 0))
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *listener_close_(PyObject *object, PyObject *unused)
{
    ListenerObject *self = (ListenerObject *)object;
    (void)unused;
    if (self->closing)
        Py_RETURN_NONE;
    self->closing = true;
    if (((CoreObject *)self->core)->open) {
        core_post_last(self->listener.core, &self->listener.last, COMMAND_UNLISTEN, &self->listener);
    } else { /* its thread has ended, and will not do it */
        close(self->listener.fd);
        core_forget(self->listener.core, &self->listener.stuck);
        Py_DECREF(object);
    }
    Py_RETURN_NONE;
}

static PyMethodDef listener_methods[] = {
    {"go_on", listener_go_on, METH_NOARGS, "go_on()\n\nTries again, after it could accept no more."},
    {"close", listener_close_, METH_NOARGS, "close()\n\nTakes those that still wait, and closes the socket, soon."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot listener_slots[] = {
    {Py_tp_doc, "A listening socket in a core's hands. Must be closed."},
    {Py_tp_dealloc, listener_dealloc},
    {Py_tp_methods, listener_methods},
    {0, NULL},
};

static PyType_Spec listener_spec = {
    .name = "meshnet.relay.native._core.Listener",
    .basicsize = sizeof(ListenerObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = listener_slots,
};

/* Called in the order of the core's news: of what a listener has accepted before it was closed, too. */
PyObject *doors_accepted(struct accepted *accepted)
{
    char host[INET6_ADDRSTRLEN];
    const struct address *source = &accepted->source;
    inet_ntop(source->family, source->host, host, sizeof host);
    PyObject *about = Py_BuildValue("iisi", accepted->fd, (int)source->family, host, (int)ntohs(source->port));
    if (!about)
        close(accepted->fd);
    PyObject *waiter = object_of(accepted->listener)->waiter;
    free(accepted);
    return module_told(waiter, HEARD_ACCEPTED, about);
}

PyObject *doors_stuck(struct listener *listener)
{
    return module_told(object_of(listener)->waiter, HEARD_STUCK, PyLong_FromLong(listener->error));
}

/* Order */

static bool parse(const char *host, int port, struct sockaddr_storage *parsed, socklen_t *size)
{
    struct sockaddr_in *v4 = (struct sockaddr_in *)parsed;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)parsed;
    *parsed = (struct sockaddr_storage){0};
    if (inet_pton(AF_INET, host, &v4->sin_addr) == 1) {
        v4->sin_family = AF_INET;
        v4->sin_port = htons((uint16_t)port);
        *size = sizeof *v4;
    } else if (inet_pton(AF_INET6, host, &v6->sin6_addr) == 1) {
        v6->sin6_family = AF_INET6;
        v6->sin6_port = htons((uint16_t)port);
        *size = sizeof *v6;
    } else {
        PyErr_Format(PyExc_ValueError, "%s is no IP address", host);
        return false;
    }
    return true;
}

bool doors_host(const char *host, struct address *address)
{
    struct sockaddr_storage parsed;
    socklen_t size;
    return parse(host, 0, &parsed, &size) && address_of(address, &parsed);
}

PyObject *doors_order(CoreObject *core, PyObject *arguments)
{
    int direction, identity, original_port, target_port, local;
    const char *source, *original, *target;
    unsigned mark, places;
    double patience;
    PyObject *through, *depot, *waiter;
    if (!PyArg_ParseTuple(arguments, "iis(si)(si)IpdIOO", &direction, &identity, &source, &original, &original_port,
                          &target, &target_port, &mark, &local, &patience, &places, &through, &waiter))
        return NULL;
    if (!core->open)
        return module_core_is_closed();
    struct sockaddr_storage parsed;
    socklen_t size;
    struct order order = {.core = &core->core,
                          .direction = direction,
                          .identity = identity,
                          .mark = mark,
                          .local = local,
                          .patience = (uint64_t)(patience * 1e9),
                          .places = places};
    if (!parse(source, 0, &parsed, &size) || !address_of(&order.source, &parsed) ||
        !parse(original, original_port, &parsed, &size) || !address_of(&order.original, &parsed) ||
        !parse(target, target_port, &order.target, &order.target_size) || !depots_through(through, &order, &depot))
        return NULL;
    OrderObject *self = (OrderObject *)module_allocate(order_type);
    if (!self) {
        depots_forget(&order);
        Py_XDECREF(depot);
        return NULL;
    }
    self->order = order;
    self->depot = depot;
    self->order.object = self;
    Py_INCREF((PyObject *)core);
    self->core = (PyObject *)core;
    Py_INCREF(waiter);
    self->waiter = waiter;
    Py_INCREF((PyObject *)self); /* the core's, until it is done */
    order_add(&self->order);
    return (PyObject *)self;
}

static void order_dealloc(PyObject *object)
{
    OrderObject *self = (OrderObject *)object;
    depots_forget(&self->order);
    Py_XDECREF(self->core);
    Py_XDECREF(self->depot);
    Py_XDECREF(self->waiter);
    module_release(object);
}

/* Python has heard of the end of `heard` of its links. */
void doors_let_go(struct order *order, unsigned heard)
{
    OrderObject *object = order->object;
    if (!order_is_done(order, heard))
        return;
    Py_CLEAR(object->waiter); /* which refers to it */
    Py_DECREF((PyObject *)object); /* the core's */
}

static PyObject *order_revoked(PyObject *object, PyObject *none)
{
    struct order *order = &((OrderObject *)object)->order;
    unsigned unused;
    (void)none;
    if (!order_revoke(order, &unused))
        Py_RETURN_NONE;
    PyObject *answer = PyLong_FromUnsignedLong(unused);
    doors_let_go(order, 0);
    return answer;
}

static PyObject *order_widened(PyObject *object, PyObject *places)
{
    unsigned long more = PyLong_AsUnsignedLong(places);
    if (PyErr_Occurred())
        return NULL;
    order_widen(&((OrderObject *)object)->order, (unsigned)more);
    Py_RETURN_NONE;
}

static PyObject *order_state(PyObject *object, PyObject *unused)
{
    struct order *order = &((OrderObject *)object)->order;
    (void)unused;
    pthread_mutex_lock(&order->core->lock);
    unsigned places = order->places, taken = order->taken;
    uint64_t used_at = order->used_at;
    pthread_mutex_unlock(&order->core->lock);
    return Py_BuildValue("IId", places, taken, (double)used_at / 1e9);
}

static PyMethodDef order_methods[] = {
    {"revoke", order_revoked, METH_NOARGS,
     "revoke() -> int or None\n\n"
     "No connection begins under it any more. How many of its places no link has; None: it was revoked before."},
    {"widen", order_widened, METH_O, "widen(places)\n\nGives it so many more."},
    {"state", order_state, METH_NOARGS,
     "state() -> (places, taken, used_at)\n\nused_at in seconds, monotonic; 0: no connection has come under it."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot order_slots[] = {
    {Py_tp_doc, "What the core does with all connections of a kind, until it is revoked."},
    {Py_tp_dealloc, order_dealloc},
    {Py_tp_methods, order_methods},
    {0, NULL},
};

static PyType_Spec order_spec = {
    .name = "meshnet.relay.native._core.Order",
    .basicsize = sizeof(OrderObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = order_slots,
};

/* Links that an order began */

static double seconds(const _Atomic uint64_t *nanoseconds)
{
    return (double)atomic_load(nanoseconds) / 1e9;
}

/* See Facts in meshnet/relay/__init__.py. Of one that goes on, nothing that its end will say. */
static PyObject *facts(struct link *link, bool ended)
{
    int client = !ended ? -1 : link->handed_back ? link->client.fd : link->undone ? -2 : -1;
    bool has_reset = ended && link->peer_reset;
    bool has_early = ended && link->handed_back;
    return Py_BuildValue("idddKKdNNiiiNissy#y#", (int)ntohs(link->source.port), seconds(&link->opened_at),
                         seconds(&link->connected_at), seconds(&link->ended_at),
                         (unsigned long long)atomic_load(&link->sent),
                         (unsigned long long)atomic_load(&link->received), seconds(&link->moved_at),
                         PyBool_FromLong(atomic_load(&link->client_done)),
                         PyBool_FromLong(atomic_load(&link->endpoint_done)), ended ? (int)link->reason : 0,
                         ended ? (int)link->ended_by : 0, ended ? link->error : 0,
                         PyBool_FromLong(ended && link->owes), client, link->id,
                         link->cipher_name ? link->cipher_name : "", has_reset ? (const char *)link->peer_reset : "",
                         has_reset ? (Py_ssize_t)link->peer_reset_size : 0,
                         has_early && link->early.size ? (const char *)link->early.bytes : "",
                         has_early ? (Py_ssize_t)link->early.size : 0);
}

PyObject *doors_facts(PyObject *object, PyObject *unused)
{
    LinkObject *self = (LinkObject *)object;
    (void)unused;
    if (!self->link->order) {
        PyErr_SetString(PyExc_RuntimeError, "no order began this link");
        return NULL;
    }
    return facts(self->link, self->ended);
}

PyObject *doors_leg_port(PyObject *link, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLong(atomic_load(&((LinkObject *)link)->link->leg_port));
}

PyObject *doors_begun(struct link *link)
{
    LinkObject *made = link->object;
    if (made) { /* known already, so it is connected now */
        if (!made->waiter)
            Py_RETURN_NONE;
        Py_INCREF(Py_None);
        return module_told(made->waiter, HEARD_CONNECTED, Py_None);
    }
    pthread_mutex_lock(&link->core->lock);
    bool is_over = link->ended.told;
    pthread_mutex_unlock(&link->core->lock);
    if (is_over) /* its end comes next, and says all */
        Py_RETURN_NONE;
    made = (LinkObject *)module_allocate(link_type);
    if (!made)
        return NULL;
    OrderObject *order = link->order->object;
    made->link = link;
    made->core = order->core;
    Py_INCREF(made->core);
    link->object = made;
    Py_INCREF((PyObject *)made); /* the core's */
    return module_told(order->waiter, HEARD_BEGUN, (PyObject *)made);
}

/* One that Python never heard of before. */
PyObject *doors_ended(struct link *link)
{
    OrderObject *order = link->order->object;
    PyObject *waiter = order->waiter;
    Py_INCREF(waiter);
    PyObject *answer = module_told(waiter, HEARD_ENDED, facts(link, true));
    Py_DECREF(waiter);
    doors_let_go(link->order, 1);
    link_free(link);
    return answer;
}

void doors_heard_end(struct link *link)
{
    if (link->order)
        doors_let_go(link->order, 1);
}

int doors_add(PyObject *module)
{
    listener_type = (PyTypeObject *)PyType_FromSpec(&listener_spec);
    order_type = (PyTypeObject *)PyType_FromSpec(&order_spec);
    if (!listener_type || !order_type ||
        PyModule_AddObjectRef(module, "Listener", (PyObject *)listener_type))
        return -1;
    return PyModule_AddObjectRef(module, "Order", (PyObject *)order_type);
}
