/* What Python sees of a link: its counts, its end, and a way to abort it. */
#include "module.h"

#include <stdlib.h>
#include <string.h>

PyTypeObject *link_type;

static void link_dealloc(PyObject *object)
{
    LinkObject *self = (LinkObject *)object;
    if (self->link)
        link_free(self->link);
    Py_XDECREF(self->waiter);
    Py_XDECREF(self->tunnels[0]);
    Py_XDECREF(self->tunnels[1]);
    Py_XDECREF(self->core);
    module_release(object);
}

static PyObject *link_abort_(PyObject *object, PyObject *arguments)
{
    LinkObject *self = (LinkObject *)object;
    Py_buffer reset;
    if (!PyArg_ParseTuple(arguments, "y*", &reset))
        return NULL;
    if (reset.len > FRAME_MAX_CONTROL)
        PyErr_SetString(PyExc_ValueError, "a RESET of that size is none");
    else if (!self->ended && !self->aborting && ((CoreObject *)self->core)->open) {
        struct command *last = &self->link->last;
        if (reset.len && (last->bytes = malloc((size_t)reset.len))) { /* or the peer hears no more than that it ends */
            memcpy(last->bytes, reset.buf, (size_t)reset.len);
            last->size = (size_t)reset.len;
        }
        self->aborting = true;
        Py_INCREF(object); /* the core's, until it has heard: the link may be over by then */
        core_post_last(self->link->core, last, COMMAND_ABORT, self->link);
    }
    PyBuffer_Release(&reset);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *link_counts(PyObject *object, PyObject *unused)
{
    struct link *link = ((LinkObject *)object)->link;
    (void)unused;
    return Py_BuildValue("KKNNd", (unsigned long long)atomic_load(&link->sent),
                         (unsigned long long)atomic_load(&link->received),
                         PyBool_FromLong(atomic_load(&link->client_done)),
                         PyBool_FromLong(atomic_load(&link->endpoint_done)),
                         (double)atomic_load(&link->moved_at) / 1e9);
}

static PyObject *result_of(struct link *link)
{
    return Py_BuildValue("iiiNNiiy#", (int)link->reason, (int)link->ended_by, link->error,
                         PyBool_FromLong(link->reusable), PyBool_FromLong(link->unread), (int)link->sent_end,
                         (int)link->received_end,
                         link->peer_reset ? (const char *)link->peer_reset : "", (Py_ssize_t)link->peer_reset_size);
}

static PyObject *link_result(PyObject *object, PyObject *unused)
{
    LinkObject *self = (LinkObject *)object;
    (void)unused;
    if (!self->ended) {
        PyErr_SetString(PyExc_RuntimeError, "the link has not ended");
        return NULL;
    }
    return result_of(self->link);
}

static PyObject *link_await(PyObject *object, PyObject *waiter)
{
    LinkObject *self = (LinkObject *)object;
    if (self->ended || self->waiter) {
        PyErr_SetString(PyExc_RuntimeError, "the link has ended, or somebody waits for it");
        return NULL;
    }
    Py_INCREF(waiter);
    self->waiter = waiter;
    Py_RETURN_NONE;
}

static PyMethodDef link_methods[] = {
    {"abort", link_abort_, METH_VARARGS,
     "abort(reset)\n\nResets both legs, soon; a tunnel leg by a RESET frame with this payload."},
    {"counts", link_counts, METH_NOARGS,
     "counts() -> (sent, received, client_done, endpoint_done, moved_at)\n\nNow; moved_at in seconds, monotonic."},
    {"result", link_result, METH_NOARGS,
     "result() -> (reason, ended_by, errno, reusable, unread, sent_end, received_end, reset)\n\n"
     "Of a link that has ended. The ends are the kinds of frames that ended the halves of its lease, 0: none did."},
    {"await_end", link_await, METH_O,
     "await_end(waiter)\n\n`waiter` comes back from `news` when the link has ended; of one that an order began."},
    {"facts", doors_facts, METH_NOARGS,
     "facts() -> tuple\n\nOf a link that an order began: see `doors.c`."},
    {"leg_port", doors_leg_port, METH_NOARGS, "leg_port() -> int\n\nOf the same: see OrderedLink."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot link_slots[] = {
    {Py_tp_doc, "One connection in the core's hands."},
    {Py_tp_dealloc, link_dealloc},
    {Py_tp_methods, link_methods},
    {0, NULL},
};

static PyType_Spec link_spec = {
    .name = "meshnet.relay.native._core.Link",
    .basicsize = sizeof(LinkObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = link_slots,
};

int links_add(PyObject *module)
{
    link_type = (PyTypeObject *)PyType_FromSpec(&link_spec);
    return link_type ? PyModule_AddObjectRef(module, "Link", (PyObject *)link_type) : -1;
}
