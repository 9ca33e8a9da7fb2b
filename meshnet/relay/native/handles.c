/* What Python sees of tunnels: a Context (certificate, key, whom to believe), a Session to resume, a Tunnel. */
#include "module.h"

#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

PyTypeObject *tunnel_type;
static PyTypeObject *context_type, *session_type;

typedef struct {
    PyObject_HEAD
    SSL_CTX *context;
} ContextObject;

typedef struct {
    PyObject_HEAD
    SSL_SESSION *session;
} SessionObject;

static const char *reason_of(unsigned long error)
{
    const char *text = error ? libssl.ERR_reason_error_string(error) : NULL;
    return text ? text : "";
}

/* Context */

static PyObject *context_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"certificate", "key", "bundle", "is_server", "ticket_keys", NULL};
    const char *certificate, *key, *bundle;
    const char *ticket_keys = NULL;
    Py_ssize_t ticket_size = 0;
    int is_server;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "sssp|y#", names, &certificate, &key, &bundle, &is_server,
                                     &ticket_keys, &ticket_size))
        return NULL;
    if (ticket_size && ticket_size != TICKET_KEYS) {
        PyErr_Format(PyExc_ValueError, "ticket_keys must be %d bytes, or none", TICKET_KEYS);
        return NULL;
    }
    PyObject *object = module_allocate(type);
    if (!object)
        return NULL;
    ContextObject *self = (ContextObject *)object;
    self->context = tls_context(certificate, key, bundle, is_server,
                                ticket_size ? (const uint8_t *)ticket_keys : NULL);
    if (!self->context) {
        PyErr_Format(PyExc_ValueError, "OpenSSL refuses %s, its key or its bundle: %s", certificate,
                     reason_of(libssl.ERR_get_error()));
        Py_DECREF(object);
        return NULL;
    }
    return object;
}

static void context_dealloc(PyObject *object)
{
    ContextObject *self = (ContextObject *)object;
    if (self->context)
        libssl.SSL_CTX_free(self->context);
    module_release(object);
}

static PyType_Slot context_slots[] = {
    {Py_tp_doc, "Context(certificate, key, bundle, is_server, ticket_keys=b'')\n\n"
                "Mutual TLS 1.3 for meshnet/1 from PEM files.\n"
                "With 80 bytes of keys, sessions are resumed by every process that has the same. Raises ValueError."},
    {Py_tp_new, context_new},
    {Py_tp_dealloc, context_dealloc},
    {0, NULL},
};

static PyType_Spec context_spec = {
    .name = "meshnet.relay.native._core.Context",
    .basicsize = sizeof(ContextObject),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = context_slots,
};

/* Session */

static void session_dealloc(PyObject *object)
{
    libssl.SSL_SESSION_free(((SessionObject *)object)->session);
    module_release(object);
}

static PyObject *session_time(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromLong(libssl.SSL_SESSION_get_time(((SessionObject *)object)->session));
}

static PyGetSetDef session_getset[] = {
    {"time", session_time, NULL, "When it was made, in seconds since the epoch.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot session_slots[] = {
    {Py_tp_doc, "What a later handshake with the same peer can resume."},
    {Py_tp_dealloc, session_dealloc},
    {Py_tp_getset, session_getset},
    {0, NULL},
};

static PyType_Spec session_spec = {
    .name = "meshnet.relay.native._core.Session",
    .basicsize = sizeof(SessionObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = session_slots,
};

/* Tunnel */

PyObject *handles_shake(CoreObject *core, PyObject *arguments)
{
    PyObject *context, *session, *waiter;
    int fd, is_client;
    if (!PyArg_ParseTuple(arguments, "O!ipOO", context_type, &context, &fd, &is_client, &session, &waiter))
        return NULL;
    if (!core->open)
        return module_core_is_closed();
    if (session != Py_None && !PyObject_TypeCheck(session, session_type)) {
        PyErr_SetString(PyExc_TypeError, "session must be a Session or None");
        return NULL;
    }
    PyObject *object = module_allocate(tunnel_type);
    if (!object)
        return NULL;
    TunnelObject *self = (TunnelObject *)object;
    self->tunnel = (struct tunnel){.source.kind = SOURCE_TUNNEL,
                                   .core = &core->core,
                                   .fd = fd,
                                   .handshaking = true,
                                   .heard = {.kind = NEWS_TUNNEL_HEARD, .owner = self},
                                   .back = {.kind = NEWS_TUNNEL_BACK, .owner = self},
                                   .gone = {.kind = NEWS_TUNNEL_GONE, .owner = self}};
    SSL_SESSION *resumed = session == Py_None ? NULL : ((SessionObject *)session)->session;
    if (!tls_attach(&self->tunnel, ((ContextObject *)context)->context, is_client, resumed) ||
        core_post(&core->core, COMMAND_HANDSHAKE, &self->tunnel, NULL, 0)) {
        self->tunnel.fd = -1; /* still the caller's */
        Py_DECREF(object);
        return PyErr_NoMemory();
    }
    Py_INCREF((PyObject *)core);
    self->core = (PyObject *)core;
    Py_INCREF(waiter);
    self->waiter = waiter;
    Py_INCREF(object); /* the core's, until it is gone */
    return object;
}

PyObject *handles_heard(TunnelObject *tunnel)
{
    tunnel->established = tunnel->tunnel.established;
    return tunnel->closing ? NULL : tunnel->waiter;
}

static void tunnel_dealloc(PyObject *object)
{
    TunnelObject *self = (TunnelObject *)object;
    tunnel_free(&self->tunnel);
    Py_XDECREF(self->core);
    Py_XDECREF(self->waiter);
    module_release(object);
}

static bool post(TunnelObject *self, enum command_kind kind, const void *bytes, size_t size)
{
    if (self->closing || !((CoreObject *)self->core)->open) {
        module_core_is_closed();
        return false;
    }
    if (core_post(self->tunnel.core, kind, &self->tunnel, bytes, size)) {
        PyErr_NoMemory();
        return false;
    }
    return true;
}

static PyObject *tunnel_adopted(PyObject *object, PyObject *core)
{
    TunnelObject *self = (TunnelObject *)object;
    if (!PyObject_TypeCheck(core, Py_TYPE(self->core))) {
        PyErr_SetString(PyExc_TypeError, "not a Core");
        return NULL;
    }
    if (!self->established || self->adopted) {
        PyErr_SetString(PyExc_RuntimeError, "only once, when the handshake is over");
        return NULL;
    }
    /* No thread knows it now: the one for handshakes has told of it, and let go. */
    self->adopted = true;
    PyObject *before = self->core;
    Py_INCREF(core);
    self->core = core;
    Py_DECREF(before);
    self->tunnel.core = &((CoreObject *)core)->core;
    if (!post(self, COMMAND_ADOPT, NULL, 0))
        return NULL;
    free(self->tunnel.certificate.bytes); /* it has been looked at */
    self->tunnel.certificate = (struct backlog){0};
    Py_RETURN_NONE;
}

static PyObject *tunnel_said(PyObject *object, PyObject *arguments)
{
    Py_buffer bytes;
    if (!PyArg_ParseTuple(arguments, "y*", &bytes))
        return NULL;
    bool fine = !bytes.len || post((TunnelObject *)object, COMMAND_SAY, bytes.buf, (size_t)bytes.len);
    PyBuffer_Release(&bytes);
    if (!fine)
        return NULL;
    Py_RETURN_NONE;
}

/* Of one that somebody has closed meanwhile there is nothing to read, which is no error. */
static bool read_on(TunnelObject *self)
{
    return self->closing || !((CoreObject *)self->core)->open || post(self, COMMAND_READ, NULL, 0);
}

static PyObject *tunnel_take(PyObject *object, PyObject *unused)
{
    TunnelObject *self = (TunnelObject *)object;
    struct tunnel *tunnel = &self->tunnel;
    (void)unused;
    pthread_mutex_lock(&tunnel->core->lock);
    struct backlog inbox = tunnel->inbox;
    tunnel->inbox = (struct backlog){0};
    pthread_mutex_unlock(&tunnel->core->lock);
    PyObject *bytes = PyBytes_FromStringAndSize((const char *)inbox.bytes, (Py_ssize_t)inbox.size);
    free(inbox.bytes);
    if (bytes && inbox.size >= MAX_INBOX && !read_on(self))
        Py_CLEAR(bytes);
    return bytes;
}

static PyObject *tunnel_go_on(PyObject *object, PyObject *unused)
{
    (void)unused;
    if (!read_on((TunnelObject *)object))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *tunnel_served_on(PyObject *object, PyObject *arguments)
{
    TunnelObject *self = (TunnelObject *)object;
    struct tunnel *tunnel = &self->tunnel;
    struct serving serving = {0};
    const char *host;
    double good_until;
    if (!PyArg_ParseTuple(arguments, "isd", &serving.identity, &host, &good_until) ||
        !doors_host(host, &serving.peer))
        return NULL;
    serving.good_until = good_until > 0 ? (uint64_t)good_until : 0;
    pthread_mutex_lock(&tunnel->core->lock);
    bool has_inbox = tunnel->inbox.size > 0;
    serving.kept = tunnel->kept;
    pthread_mutex_unlock(&tunnel->core->lock);
    if (!has_inbox && !self->closing && ((CoreObject *)self->core)->open &&
        !post(self, COMMAND_SERVE, &serving, sizeof serving))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *tunnel_last_ends(PyObject *object, PyObject *unused)
{
    struct tunnel *tunnel = &((TunnelObject *)object)->tunnel;
    (void)unused;
    pthread_mutex_lock(&tunnel->core->lock);
    int sent = (int)tunnel->last_sent, received = (int)tunnel->last_received;
    tunnel->last_sent = tunnel->last_received = FRAME_DATA;
    pthread_mutex_unlock(&tunnel->core->lock);
    return Py_BuildValue("ii", sent, received);
}

static PyObject *tunnel_state(PyObject *object, PyObject *unused)
{
    TunnelObject *self = (TunnelObject *)object;
    struct tunnel *tunnel = &self->tunnel;
    (void)unused;
    pthread_mutex_lock(&tunnel->core->lock);
    bool lost = tunnel->lost;
    int error = tunnel->error;
    long verify = tunnel->verify;
    unsigned long ssl_error = tunnel->ssl_error;
    pthread_mutex_unlock(&tunnel->core->lock);
    return Py_BuildValue("NNilsks", PyBool_FromLong(self->established), PyBool_FromLong(lost), error, verify,
                         verify ? libssl.X509_verify_cert_error_string(verify) : "", ssl_error & ERR_REASON_MASK,
                         reason_of(ssl_error));
}

static PyObject *tunnel_peer(PyObject *object, PyObject *unused)
{
    TunnelObject *self = (TunnelObject *)object;
    struct tunnel *tunnel = &self->tunnel;
    (void)unused;
    if (!self->established || self->adopted) {
        PyErr_SetString(PyExc_RuntimeError, "only between the end of the handshake and adopt");
        return NULL;
    }
    return Py_BuildValue("y#ssN", (const char *)tunnel->certificate.bytes, (Py_ssize_t)tunnel->certificate.size,
                         tunnel->version, tunnel->cipher_name, PyBool_FromLong(tunnel->resumed));
}

static PyObject *tunnel_session(PyObject *object, PyObject *unused)
{
    struct tunnel *tunnel = &((TunnelObject *)object)->tunnel;
    (void)unused;
    pthread_mutex_lock(&tunnel->core->lock);
    SSL_SESSION *session = tunnel->session;
    if (session)
        libssl.SSL_SESSION_up_ref(session);
    pthread_mutex_unlock(&tunnel->core->lock);
    if (!session)
        Py_RETURN_NONE;
    SessionObject *made = (SessionObject *)module_allocate(session_type);
    if (!made) {
        libssl.SSL_SESSION_free(session);
        return NULL;
    }
    made->session = session;
    return (PyObject *)made;
}

static PyObject *tunnel_shut(PyObject *object, PyObject *unused)
{
    TunnelObject *self = (TunnelObject *)object;
    (void)unused;
    if (!self->closing)
        shutdown(self->tunnel.fd, SHUT_RDWR);
    Py_RETURN_NONE;
}

static PyObject *tunnel_closed(PyObject *object, PyObject *unused)
{
    TunnelObject *self = (TunnelObject *)object;
    (void)unused;
    if (self->closing)
        Py_RETURN_NONE;
    bool open = ((CoreObject *)self->core)->open;
    self->closing = true;
    if (open)
        core_post_last(self->tunnel.core, &self->tunnel.last, COMMAND_CLOSE, &self->tunnel);
    Py_CLEAR(self->waiter); /* which refers to it, and a collector of cycles would not find that */
    if (!open) { /* its thread has ended, and will not do it */
        self->tunnel.closed = true;
        close(self->tunnel.fd);
        core_forget(self->tunnel.core, &self->tunnel.heard);
        core_forget(self->tunnel.core, &self->tunnel.back);
        Py_DECREF(object);
    }
    Py_RETURN_NONE;
}

static PyObject *tunnel_fileno(PyObject *object, PyObject *unused)
{
    TunnelObject *self = (TunnelObject *)object;
    (void)unused;
    return PyLong_FromLong(self->closing ? -1 : self->tunnel.fd);
}

static PyMethodDef tunnel_methods[] = {
    {"adopt", tunnel_adopted, METH_O, "adopt(core)\n\nGives an established tunnel to the thread that relays."},
    {"say", tunnel_said, METH_VARARGS, "say(bytes)\n\nSends frames, soon and in order; not within a link."},
    {"take", tunnel_take, METH_NOARGS, "take() -> bytes\n\nWhat has come that no link wanted; maybe nothing."},
    {"go_on", tunnel_go_on, METH_NOARGS, "go_on()\n\nReads on, after a link that left something unread."},
    {"serve", tunnel_served_on, METH_VARARGS,
     "serve(identity, host, good_until)\n\n"
     "Until something comes that is to be taken, orders may answer what the peer asks for. `identity` is the number\n"
     "of its identity, `host` its address, `good_until` the end of its certificate in seconds since the epoch."},
    {"last_ends", tunnel_last_ends, METH_NOARGS,
     "last_ends() -> (sent_end, received_end)\n\n"
     "The kinds of the frames that ended the last lease under an order, since this was last asked; 0: none."},
    {"state", tunnel_state, METH_NOARGS,
     "state() -> (established, lost, errno, verify, verify_text, ssl_reason, ssl_text)\n\n"
     "`verify` is X509_V_ERR_*, `ssl_reason` SSL_R_*, each 0 without an error."},
    {"peer", tunnel_peer, METH_NOARGS,
     "peer() -> (certificate, version, cipher, resumed)\n\nOnce established, and before `adopt`; DER."},
    {"session", tunnel_session, METH_NOARGS, "session() -> Session or None\n\nThe latest that the peer gave us."},
    {"shut", tunnel_shut, METH_NOARGS, "shut()\n\nshutdown(2): an end of file for whoever reads."},
    {"close", tunnel_closed, METH_NOARGS, "close()\n\nFor good; within a link, that is reset."},
    {"fileno", tunnel_fileno, METH_NOARGS, "fileno() -> int\n\n-1 once closed."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot tunnel_slots[] = {
    {Py_tp_doc, "A TLS connection to a peer sidecar in a core's hands. Must be closed."},
    {Py_tp_dealloc, tunnel_dealloc},
    {Py_tp_methods, tunnel_methods},
    {0, NULL},
};

static PyType_Spec tunnel_spec = {
    .name = "meshnet.relay.native._core.Tunnel",
    .basicsize = sizeof(TunnelObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = tunnel_slots,
};

/* An ImportError whose `name` is what is missing: missing.py knows it by that. */
static void say_missing(const char *why)
{
    PyObject *text = PyUnicode_FromString(why), *name = PyUnicode_FromString(LIBSSL);
    if (text && name)
        PyErr_SetImportError(text, name, NULL);
    Py_XDECREF(text);
    Py_XDECREF(name);
}

/* Without OpenSSL there is no core: one half of it would be of little use. */
int handles_add(PyObject *module)
{
    const char *missing = libssl_load();
    if (missing || tls_load()) {
        say_missing(missing ? missing : LIBSSL " cannot make a BIO");
        return -1;
    }
    context_type = (PyTypeObject *)PyType_FromSpec(&context_spec);
    session_type = (PyTypeObject *)PyType_FromSpec(&session_spec);
    tunnel_type = (PyTypeObject *)PyType_FromSpec(&tunnel_spec);
    if (!context_type || !session_type || !tunnel_type ||
        PyModule_AddObjectRef(module, "Context", (PyObject *)context_type) ||
        PyModule_AddObjectRef(module, "Session", (PyObject *)session_type))
        return -1;
    return PyModule_AddObjectRef(module, "Tunnel", (PyObject *)tunnel_type);
}
