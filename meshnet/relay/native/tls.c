/* OpenSSL's part of a tunnel: contexts, and a BIO that reads what was received and writes what is to be sent.
 *
 * OpenSSL by itself receives each record in two calls and sends each in one. Here a call receives or sends many
 * records, and OpenSSL never sees a full socket. Only in the handshake it reads from the socket itself: what lies
 * behind the handshake must stay there, for the thread that takes over.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

static const unsigned char ALPN[] = "\x09meshnet/1";
#define ALPN_SIZE 10
#define MAX_SESSIONS 1024 /* then the oldest goes, and who would have resumed it makes a full handshake */
static const char CIPHERS[] = "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256";

bool backlog_append(struct backlog *backlog, const void *bytes, size_t size)
{
    uint8_t *more = realloc(backlog->bytes, backlog->size + size);
    if (!more)
        return false;
    memcpy(more + backlog->size, bytes, size);
    backlog->bytes = more;
    backlog->size += size;
    return true;
}

static int bio_read(BIO *bio, char *buffer, size_t room, size_t *taken)
{
    struct tunnel *tunnel = libssl.BIO_get_data(bio);
    libssl.BIO_clear_flags(bio, BIO_FLAGS_RWS_AND_RETRY);
    if (tunnel->handshaking) {
        ssize_t size;
        while ((size = recv(tunnel->fd, buffer, room, 0)) < 0 && errno == EINTR)
            ;
        if (size > 0) {
            *taken = (size_t)size;
            return 1;
        }
        if (size < 0 && errno == EAGAIN)
            libssl.BIO_set_flags(bio, BIO_FLAGS_RETRY_READ);
        else
            tunnel->handshake_error = size ? errno : ECONNRESET;
        return 0;
    }
    if (!tunnel->cipher_size) {
        libssl.BIO_set_flags(bio, BIO_FLAGS_RETRY_READ);
        return 0;
    }
    *taken = room < tunnel->cipher_size ? room : tunnel->cipher_size;
    memcpy(buffer, tunnel->cipher, *taken);
    tunnel->cipher += *taken;
    tunnel->cipher_size -= *taken;
    return 1;
}

static int bio_write(BIO *bio, const char *bytes, size_t size, size_t *taken)
{
    struct tunnel *tunnel = libssl.BIO_get_data(bio);
    struct core *core = tunnel->core;
    libssl.BIO_clear_flags(bio, BIO_FLAGS_RWS_AND_RETRY);
    if (core->out.size + size > core->out_room) {
        size_t room = core->out.size + size + 8 * RECORD_SIZE;
        uint8_t *larger = realloc(core->out.bytes, room);
        if (!larger) {
            tunnel->handshake_error = ENOMEM;
            return 0;
        }
        core->out.bytes = larger;
        core->out_room = room;
    }
    memcpy(core->out.bytes + core->out.size, bytes, size);
    core->out.size += size;
    *taken = size;
    return 1;
}

static long bio_control(BIO *bio, int command, long number, void *pointer)
{
    (void)bio, (void)number, (void)pointer;
    return command == BIO_CTRL_FLUSH;
}

static int select_alpn(SSL *ssl, const unsigned char **out, unsigned char *out_size, const unsigned char *in,
                       unsigned int in_size, void *unused)
{
    (void)unused;
    /* The ticket that was resumed is good for the next one too. */
    if (libssl.SSL_session_reused(ssl))
        libssl.SSL_set_num_tickets(ssl, 0);
    for (unsigned int at = 0; at < in_size; at += 1u + in[at]) {
        if (in[at] == ALPN[0] && in_size - at >= ALPN_SIZE && !memcmp(in + at, ALPN, ALPN_SIZE)) {
            *out = in + at + 1;
            *out_size = in[at];
            return SSL_TLSEXT_ERR_OK;
        }
    }
    return SSL_TLSEXT_ERR_ALERT_FATAL;
}

/* A ticket has come; the reference is ours. */
static int keep_session(SSL *ssl, SSL_SESSION *session)
{
    struct tunnel *tunnel = libssl.SSL_get_ex_data(ssl, 0);
    pthread_mutex_lock(&tunnel->core->lock);
    SSL_SESSION *before = tunnel->session;
    tunnel->session = session;
    pthread_mutex_unlock(&tunnel->core->lock);
    tunnel->bloated = true;
    if (before)
        libssl.SSL_SESSION_free(before);
    return 1;
}

/* `ticket_keys`: those of all processes that resume each other's sessions, or NULL. NULL: OpenSSL's error queue says
 * why.
 */
SSL_CTX *tls_context(const char *certificate, const char *key, const char *bundle, bool is_server,
                     const uint8_t *ticket_keys)
{
    libssl.ERR_clear_error();
    SSL_CTX *context = libssl.SSL_CTX_new(libssl.TLS_method());
    if (!context)
        return NULL;
    /* Without NO_AUTO_CHAIN it builds and verifies its own chain anew at every handshake. */
    libssl.SSL_CTX_ctrl(context, SSL_CTRL_MODE, SSL_MODE_RELEASE_BUFFERS | SSL_MODE_NO_AUTO_CHAIN, NULL);
    libssl.SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    bool fine = libssl.SSL_CTX_ctrl(context, SSL_CTRL_SET_MIN_PROTO_VERSION, TLS1_3_VERSION, NULL) == 1 &&
                libssl.SSL_CTX_set_ciphersuites(context, CIPHERS) == 1 &&
                libssl.SSL_CTX_use_certificate_chain_file(context, certificate) == 1 &&
                libssl.SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) == 1 &&
                libssl.SSL_CTX_check_private_key(context) == 1 &&
                libssl.SSL_CTX_load_verify_locations(context, bundle, NULL) == 1;
    if (fine && is_server) {
        libssl.SSL_CTX_set_alpn_select_cb(context, select_alpn, NULL);
        if (ticket_keys) {
            fine = libssl.SSL_CTX_ctrl(context, SSL_CTRL_SET_TICKET_KEYS, TICKET_KEYS, (void *)ticket_keys) == 1;
            libssl.SSL_CTX_ctrl(context, SSL_CTRL_SET_SESS_CACHE_MODE, SSL_SESS_CACHE_OFF, NULL);
        } else {
            /* A ticket names a session that is kept here, instead of carrying it: what resumes it, shares it, and with
             * it the peer's certificate.
             */
            libssl.SSL_CTX_set_options(context, SSL_OP_NO_TICKET);
            libssl.SSL_CTX_ctrl(context, SSL_CTRL_SET_SESS_CACHE_SIZE, MAX_SESSIONS, NULL);
        }
        fine = fine && libssl.SSL_CTX_set_num_tickets(context, 1) == 1 &&
               libssl.SSL_CTX_set_session_id_context(context, ALPN, ALPN_SIZE) == 1;
    } else if (fine) {
        fine = libssl.SSL_CTX_set_alpn_protos(context, ALPN, ALPN_SIZE) == 0; /* which is success, by its manual */
        libssl.SSL_CTX_ctrl(context, SSL_CTRL_SET_SESS_CACHE_MODE, SSL_SESS_CACHE_CLIENT_OUTSIDE, NULL);
        libssl.SSL_CTX_sess_set_new_cb(context, keep_session);
    }
    if (fine)
        return context;
    libssl.SSL_CTX_free(context);
    return NULL;
}

/* An SSL for the tunnel's descriptor. */
bool tls_attach(struct tunnel *tunnel, SSL_CTX *context, bool is_client, SSL_SESSION *session)
{
    SSL *ssl = libssl.SSL_new(context);
    if (!ssl)
        return false;
    tunnel->ssl = ssl; /* freed with the tunnel */
    BIO *bio = libssl.SSL_set_ex_data(ssl, 0, tunnel) ? libssl.BIO_new(libssl.bio_method) : NULL;
    if (!bio)
        return false;
    libssl.BIO_set_data(bio, tunnel);
    libssl.BIO_set_init(bio, 1);
    libssl.SSL_set_bio(ssl, bio, bio);
    if (is_client)
        libssl.SSL_set_connect_state(ssl);
    else
        libssl.SSL_set_accept_state(ssl);
    /* A copy: OpenSSL takes one that was resumed for used up, as soon as the peer gives a new ticket. */
    SSL_SESSION *copy = session ? libssl.SSL_SESSION_dup(session) : NULL;
    if (copy) {
        libssl.SSL_set_session(ssl, copy); /* should it not fit, the handshake is a full one */
        libssl.SSL_SESSION_free(copy);
    }
    return true;
}

/* 0, or -1 when OpenSSL cannot make a BIO of ours. After libssl_load. */
int tls_load(void)
{
    BIO_METHOD *method = libssl.BIO_meth_new(libssl.BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "meshnet");
    if (!method || !libssl.BIO_meth_set_read_ex(method, bio_read) || !libssl.BIO_meth_set_write_ex(method, bio_write) ||
        !libssl.BIO_meth_set_ctrl(method, bio_control))
        return -1;
    libssl.bio_method = method;
    return 0;
}
