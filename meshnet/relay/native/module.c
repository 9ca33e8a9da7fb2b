/* What Python sees: a Core, which is a thread. */
#include "module.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

PyObject *module_allocate(PyTypeObject *type)
{
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    return alloc(type, 0);
}

void module_release(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    freefunc tp_free = (freefunc)PyType_GetSlot(type, Py_tp_free);
    tp_free(object);
    Py_DECREF(type);
}

void *module_core_is_closed(void)
{
    PyErr_SetString(PyExc_RuntimeError, "the core has stopped");
    return NULL;
}

PyObject *module_told(PyObject *waiter, enum heard what, PyObject *about)
{
    return about ? Py_BuildValue("OiN", waiter, (int)what, about) : NULL;
}

/* Core */

static void free_resets(struct core *core)
{
    for (int reason = 0; reason < REASONS; reason++)
        free(core->resets[reason].bytes);
}

static bool take_resets(struct core *core, PyObject *resets)
{
    if (PyTuple_Size(resets) != REASONS) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "resets must be %d", (int)REASONS);
        return false;
    }
    for (int reason = 0; reason < REASONS; reason++) {
        char *bytes;
        Py_ssize_t size;
        if (PyBytes_AsStringAndSize(PyTuple_GetItem(resets, reason), &bytes, &size))
            return false;
        if (size > FRAME_MAX_CONTROL) {
            PyErr_SetString(PyExc_ValueError, "a RESET of that size is none");
            return false;
        }
        if (size && !backlog_append(&core->resets[reason], bytes, (size_t)size)) {
            PyErr_NoMemory();
            return false;
        }
    }
    return true;
}

static PyObject *core_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"resets", "name", "silence", "id_suffix", NULL};
    PyObject *resets;
    const char *name, *id_suffix = "";
    double silence = 60;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O!s|ds", names, &PyTuple_Type, &resets, &name, &silence,
                                     &id_suffix))
        return NULL;
    if (strlen(id_suffix) >= sizeof ((CoreObject *)0)->core.id_suffix)
        return PyErr_Format(PyExc_ValueError, "id_suffix must be at most %d letters", MAX_ID - ORDER_ID);
    PyObject *object = module_allocate(type);
    if (!object)
        return NULL;
    CoreObject *self = (CoreObject *)object;
    self->core.bell = -1;
    self->core.silence = (uint64_t)(silence * 1e9);
    strncpy(self->core.name, name, sizeof self->core.name - 1);
    strncpy(self->core.id_suffix, id_suffix, sizeof self->core.id_suffix - 1);
    if (take_resets(&self->core, resets)) {
        if (!core_open(&self->core)) {
            self->open = true;
            return object;
        }
        PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_DECREF(object);
    return NULL;
}

/* With FRAME_HEADER bytes of room before it; nothing of nothing. */
static bool copy_early(struct leg *leg, const Py_buffer *bytes)
{
    static const uint8_t room[FRAME_HEADER];
    return !bytes->len || (backlog_append(&leg->held, room, FRAME_HEADER) &&
                           backlog_append(&leg->held, bytes->buf, (size_t)bytes->len));
}

/* A descriptor, or a tunnel between leases. */
static bool take_leg(LinkObject *made, int which, PyObject *given, int received_end, const Py_buffer *unread)
{
    struct leg *leg = which ? &made->link->endpoint : &made->link->client;
    if (!PyObject_TypeCheck(given, tunnel_type)) {
        long fd = PyLong_AsLong(given);
        if (fd < 0 || fd > INT_MAX) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_ValueError, "not a descriptor");
            return false;
        }
        link_set_plain(leg, (int)fd);
        return true;
    }
    TunnelObject *tunnel = (TunnelObject *)given;
    if (tunnel->core != made->core || tunnel->closing) {
        PyErr_SetString(PyExc_ValueError, "the tunnel is not this core's");
        return false;
    }
    Py_INCREF(given);
    made->tunnels[which] = given;
    link_set_tunnel(leg, &tunnel->tunnel);
    leg->received_end = (enum frame_kind)received_end;
    if (!unread->len)
        return true;
    /* Before what has come since. */
    struct backlog inbox = {0};
    struct core *core = made->link->core;
    pthread_mutex_lock(&core->lock);
    bool fits = backlog_append(&inbox, unread->buf, (size_t)unread->len) &&
                (!tunnel->tunnel.inbox.size ||
                 backlog_append(&inbox, tunnel->tunnel.inbox.bytes, tunnel->tunnel.inbox.size));
    if (fits) {
        free(tunnel->tunnel.inbox.bytes);
        tunnel->tunnel.inbox = inbox;
    }
    pthread_mutex_unlock(&core->lock);
    if (!fits) {
        free(inbox.bytes);
        PyErr_NoMemory();
    }
    return fits;
}

static PyObject *core_start(PyObject *object, PyObject *arguments)
{
    CoreObject *self = (CoreObject *)object;
    Py_buffer to_client, to_endpoint, unread;
    PyObject *client, *endpoint, *waiter;
    int received_end;
    unsigned long long sent;
    if (!PyArg_ParseTuple(arguments, "OOy*y*Kiy*O", &client, &endpoint, &to_client, &to_endpoint, &sent,
                          &received_end, &unread, &waiter))
        return NULL;
    LinkObject *made = NULL;
    struct link *link = NULL;
    if (!self->open)
        module_core_is_closed();
    else if (!(link = link_new(&self->core)))
        PyErr_NoMemory();
    else if (!(made = (LinkObject *)module_allocate(link_type)))
        link_free(link);
    else {
        made->link = link;
        link->object = made;
        atomic_store(&link->sent, sent);
        Py_INCREF(object);
        made->core = object;
        if (take_leg(made, 0, client, received_end, &unread) && take_leg(made, 1, endpoint, received_end, &unread)) {
            if (link->client.tunnel && link->endpoint.tunnel)
                PyErr_SetString(PyExc_ValueError, "one of the legs must be a socket");
            else if (!copy_early(&link->client, &to_client) || !copy_early(&link->endpoint, &to_endpoint) ||
                     core_post(&self->core, COMMAND_START, link, NULL, 0))
                PyErr_NoMemory();
        }
        if (PyErr_Occurred()) {
            Py_DECREF((PyObject *)made);
            made = NULL;
        } else {
            Py_INCREF(waiter);
            made->waiter = waiter;
            Py_INCREF((PyObject *)made); /* the core's */
        }
    }
    PyBuffer_Release(&to_client);
    PyBuffer_Release(&to_endpoint);
    PyBuffer_Release(&unread);
    return (PyObject *)made;
}

/* A link that Python has an object for is over. */
static int add_end(PyObject *waiters, LinkObject *ended)
{
    PyObject *waiter = ended->waiter;
    ended->waiter = NULL;
    ended->ended = true;
    int error = waiter ? PyList_Append(waiters, waiter) : 0;
    Py_XDECREF(waiter);
    doors_heard_end(ended->link);
    /* Whoever keeps it for its counts need not keep these: a descriptor, and much memory. */
    Py_CLEAR(ended->tunnels[0]);
    Py_CLEAR(ended->tunnels[1]);
    Py_CLEAR(ended->core);
    Py_DECREF((PyObject *)ended); /* the core's */
    return error;
}

static int add(PyObject *waiters, PyObject *told)
{
    int error = !told ? -1 : told == Py_None ? 0 : PyList_Append(waiters, told);
    Py_XDECREF(told);
    return error;
}

static int add_news(struct passed *passed, struct news *news)
{
    PyObject *waiters = passed->waiters;
    PyObject *waiter;
    struct link *link = news->owner;
    switch (news->kind) {
    case NEWS_LINK_ENDED:
        if (link->object)
            return add_end(waiters, link->object);
        return passed_add(passed, link) ? 0 : add(waiters, doors_ended(link));
    case NEWS_LINK_BEGUN:
        return add(waiters, doors_begun(link));
    case NEWS_ACCEPTED:
        return add(waiters, doors_accepted(news->owner));
    case NEWS_LISTENER_STUCK:
        return add(waiters, doors_stuck(news->owner));
    case NEWS_TUNNEL_HEARD:
        waiter = handles_heard(news->owner);
        return waiter ? PyList_Append(waiters, waiter) : 0;
    case NEWS_TUNNEL_BACK:
        return add(waiters, depots_back(news->owner));
    case NEWS_LINK_ABORTED:
        Py_DECREF((PyObject *)link->object); /* the core's */
        return 0;
    case NEWS_LISTENER_GONE:
    case NEWS_TUNNEL_GONE:
        Py_DECREF((PyObject *)news->owner); /* the core's */
        return 0;
    }
    return 0;
}

static PyObject *core_news(PyObject *object, PyObject *arguments)
{
    CoreObject *self = (CoreObject *)object;
    int everything = false;
    if (!PyArg_ParseTuple(arguments, "|p", &everything))
        return NULL;
    PyObject *waiters = PyList_New(0);
    if (!waiters)
        return NULL;
    struct news *news = core_take_news(&self->core, everything);
    int error = 0;
    struct passed passed;
    passed_begin(&passed, waiters);
    while (news) {
        struct news *this = news;
        news = news->next;
        pthread_mutex_lock(&self->core.lock);
        this->told = false;
        pthread_mutex_unlock(&self->core.lock);
        error |= add_news(&passed, this);
    }
    if (passed_tell(&passed) | error) {
        Py_DECREF(waiters);
        return NULL;
    }
    return waiters;
}

static PyObject *core_fileno(PyObject *object, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLong(((CoreObject *)object)->core.bell);
}

static PyObject *core_stop(PyObject *object, PyObject *unused)
{
    CoreObject *self = (CoreObject *)object;
    (void)unused;
    if (self->open) {
        self->open = false;
        Py_BEGIN_ALLOW_THREADS
        core_close(&self->core);
        Py_END_ALLOW_THREADS
    }
    Py_RETURN_NONE;
}

static void core_dealloc(PyObject *object)
{
    CoreObject *self = (CoreObject *)object;
    if (self->open) {
        self->open = false;
        core_close(&self->core); /* holds Python's lock, which the thread never takes */
    }
    if (self->core.bell >= 0)
        close(self->core.bell);
    free_resets(&self->core);
    module_release(object);
}

static PyObject *core_shake(PyObject *object, PyObject *arguments)
{
    return handles_shake((CoreObject *)object, arguments);
}

static PyObject *core_listen(PyObject *object, PyObject *arguments)
{
    return doors_listen((CoreObject *)object, arguments);
}

static PyObject *core_order(PyObject *object, PyObject *arguments)
{
    return doors_order((CoreObject *)object, arguments);
}

static PyObject *core_suspend_orders(PyObject *object, PyObject *unused)
{
    (void)unused;
    orders_suspend(&((CoreObject *)object)->core);
    Py_RETURN_NONE;
}

static PyObject *core_depot(PyObject *object, PyObject *waiter)
{
    return depots_new((CoreObject *)object, waiter);
}

static PyMethodDef core_methods[] = {
    {"start", core_start, METH_VARARGS,
     "start(client, endpoint, to_client, to_endpoint, sent, received_end, unread, waiter) -> Link\n\n"
     "Legs are descriptors of connected, non-blocking TCP sockets, taken over and closed at the end, or tunnels with\n"
     "a lease that is up. The bytes are sent first. `sent` went up before. `received_end`: the kind of frame by which\n"
     "the tunnel's peer has ended its half already, or 0; `unread`: what came from it and is no whole frame yet.\n"
     "`waiter` comes back from `news` when the link has ended."},
    {"shake", core_shake, METH_VARARGS,
     "shake(context, fd, is_client, session, waiter) -> Tunnel\n\n"
     "Takes over the descriptor of a connected, non-blocking TCP socket and begins a TLS handshake on it. `waiter`\n"
     "comes back from `news` when it is over, one way or the other, and later whenever there is something to take."},
    {"listen", core_listen, METH_VARARGS,
     "listen(fd, direction, shared, waiter) -> Listener\n\n"
     "Takes over a listening, non-blocking TCP socket, which other processes may share. `news` has (waiter, 3, (fd,\n"
     "family, host, port)) for what no order covers, and (waiter, 4, errno) when it can accept no more for now."},
    {"order", core_order, METH_VARARGS,
     "order(direction, identity, source, original, target, mark, local, patience, places, through, waiter) -> Order\n\n"
     "Connections that come in at listeners of that direction from host `source` and were going to `original` are\n"
     "dialled to `target` (both are (host, port)) within `patience` seconds and carried, at most `places` at once.\n"
     "Direction 2 is what the peer with the number `identity` asks for through its tunnels. `through`: None, or\n"
     "(depot, (before, between, behind)): the endpoint is asked for through a tunnel of that depot; the three pieces\n"
     "of its OPEN are those around the port of the source and the id. `news` has (waiter, 0, Link) for one that goes\n"
     "on, and (its own waiter, 1, None) when its endpoint is up; (waiter, 2, facts) for one that is over, but\n"
     "(waiter, 6, (rows, cipher, ended_by)) for those that ended well: see meshnet/relay/rows.py."},
    {"suspend_orders", core_suspend_orders, METH_NOARGS,
     "suspend_orders()\n\nNo connection begins under any order there is. Each is still to be revoked."},
    {"depot", core_depot, METH_O,
     "depot(waiter) -> Depot\n\n"
     "`news` has (waiter, 5, (waiter of the tunnel, leases, idle_since)) for one that is given back."},
    {"news", core_news, METH_VARARGS,
     "news(everything=False) -> list\n\n"
     "The waiters of what has happened since; with what there is to say, for listeners and orders.\n"
     "`everything`: of links under orders also those that have begun just now."},
    {"fileno", core_fileno, METH_NOARGS, "fileno() -> int\n\nReadable while `news` has something to say."},
    {"stop", core_stop, METH_NOARGS, "stop()\n\nEnds the thread. Links that still run are reset, and have ended."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot core_slots[] = {
    {Py_tp_doc, "Core(resets, name, silence=60, id_suffix='')\n\nAn epoll thread that moves bytes. `resets`: payloads\n"
                "of RESET frames, by reason. `silence`: seconds without an answer after which a peer is gone.\n"
                "`id_suffix`: of the ids that it makes. Raises OSError."},
    {Py_tp_new, core_new},
    {Py_tp_dealloc, core_dealloc},
    {Py_tp_methods, core_methods},
    {0, NULL},
};

static PyType_Spec core_spec = {
    .name = "meshnet.relay.native._core.Core",
    .basicsize = sizeof(CoreObject),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = core_slots,
};

/* The module */

static int add_types(PyObject *module)
{
    PyObject *core_type = PyType_FromSpec(&core_spec);
    if (!core_type || PyModule_AddObjectRef(module, "Core", core_type))
        return -1;
    Py_DECREF(core_type);
    return links_add(module) || doors_add(module) || depots_add(module) ? -1 : handles_add(module);
}

static PyMethodDef module_methods[] = {
    {"lines", lines, METH_VARARGS,
     "lines(rows, pieces) -> bytes\n\n"
     "A line for each row: the pieces, and between them, in this order, its id, port, milliseconds until it was\n"
     "connected, bytes sent and received, when it was opened and closed (RFC 3339), milliseconds that it lasted,\n"
     "until it was connected, and since anything moved."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, add_types},
    {0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_core",
    .m_doc = "The native relay's thread, written in C.",
    .m_methods = module_methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&module);
}
