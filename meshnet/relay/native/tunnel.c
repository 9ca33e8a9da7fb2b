/* A tunnel: its handshake, what comes between leases, what goes out.
 *
 * What is decrypted goes to the leg that has the lease, or waits in the inbox for Python.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define READS_PER_TURN 2

static void tell(struct tunnel *tunnel)
{
    core_tell(tunnel->core, &tunnel->heard);
}

/* No more will come, and nothing can be sent. */
static void lose(struct tunnel *tunnel, int error, unsigned long ssl_error)
{
    if (tunnel->lost)
        return;
    pthread_mutex_lock(&tunnel->core->lock);
    tunnel->lost = true;
    tunnel->error = error;
    tunnel->ssl_error = ssl_error;
    pthread_mutex_unlock(&tunnel->core->lock);
    tunnel->readable = false;
    if (!tunnel->leg)
        tell(tunnel);
    else if (!tunnel->leg->over) /* or its lease is over, and the link goes on for its other leg */
        lease_lost(tunnel->leg);
}

/* Handshake */

static void established(struct tunnel *tunnel)
{
    const unsigned char *alpn;
    unsigned int alpn_size;
    libssl.SSL_get0_alpn_selected(tunnel->ssl, &alpn, &alpn_size);
    X509 *peer = libssl.SSL_get1_peer_certificate(tunnel->ssl);
    unsigned char *der = NULL;
    int size = peer ? libssl.i2d_X509(peer, NULL) : 0;
    if (size > 0 && (der = malloc((size_t)size))) {
        unsigned char *end = der;
        size = libssl.i2d_X509(peer, &end);
    }
    if (peer)
        libssl.X509_free(peer);
    pthread_mutex_lock(&tunnel->core->lock);
    tunnel->established = alpn_size > 0;
    tunnel->certificate = der;
    tunnel->certificate_size = der && size > 0 ? (size_t)size : 0;
    tunnel->version = libssl.SSL_get_version(tunnel->ssl);
    tunnel->cipher_name = libssl.SSL_CIPHER_get_name(libssl.SSL_get_current_cipher(tunnel->ssl));
    tunnel->resumed = libssl.SSL_session_reused(tunnel->ssl);
    pthread_mutex_unlock(&tunnel->core->lock);
}

/* Goes on with the handshake; on the thread for handshakes, which lets go of the tunnel when it is over. */
void tunnel_shake(struct tunnel *tunnel)
{
    if (tunnel->lost || !tunnel->handshaking)
        return;
    if (!tunnel->watched) {
        tunnel->watched = true;
        if (core_watch(tunnel->core, tunnel->fd, &tunnel->source)) {
            lose(tunnel, errno, 0);
            return;
        }
    }
    libssl.ERR_clear_error();
    tunnel->error = 0;
    int done = libssl.SSL_do_handshake(tunnel->ssl);
    int status = done == 1 ? SSL_ERROR_NONE : libssl.SSL_get_error(tunnel->ssl, done);
    unsigned long ssl_error = done == 1 ? 0 : libssl.ERR_get_error();
    int error = tunnel->error;
    tunnel_flush(tunnel); /* also the alert that says why not */
    if (status == SSL_ERROR_WANT_READ || tunnel->lost)
        return;
    if (status != SSL_ERROR_NONE) {
        tunnel->verify = libssl.SSL_get_verify_result(tunnel->ssl);
        lose(tunnel, error, ssl_error);
        return;
    }
    if (tunnel->held.size)
        return; /* our last flight is still to go out */
    tunnel->handshaking = false;
    tunnel->watched = false;
    epoll_ctl(tunnel->core->epoll, EPOLL_CTL_DEL, tunnel->fd, NULL);
    established(tunnel);
    tell(tunnel);
}

/* Into the hands of the thread that relays. */
void tunnel_adopt(struct tunnel *tunnel)
{
    tunnel->watched = true;
    if (core_watch(tunnel->core, tunnel->fd, &tunnel->source))
        lose(tunnel, errno, 0);
}

/* In */

/* For Python: what no lease wants. */
void tunnel_keep(struct tunnel *tunnel, const uint8_t *bytes, size_t size)
{
    struct core *core = tunnel->core;
    pthread_mutex_lock(&core->lock);
    bool fits = tunnel->inbox_size + size <= tunnel->inbox_room;
    if (!fits) {
        uint8_t *larger = realloc(tunnel->inbox, tunnel->inbox_size + size);
        if (larger) {
            tunnel->inbox = larger;
            tunnel->inbox_room = tunnel->inbox_size + size;
            fits = true;
        }
    }
    if (fits) {
        memcpy(tunnel->inbox + tunnel->inbox_size, bytes, size);
        tunnel->inbox_size += size;
    }
    pthread_mutex_unlock(&core->lock);
    if (!fits)
        lose(tunnel, ENOMEM, 0);
    else if (!tunnel->leg)
        tell(tunnel);
}

static bool inbox_is_full(struct tunnel *tunnel)
{
    pthread_mutex_lock(&tunnel->core->lock);
    bool full = tunnel->inbox_size >= MAX_INBOX;
    pthread_mutex_unlock(&tunnel->core->lock);
    return full;
}

static bool may_read(struct tunnel *tunnel)
{
    if (!tunnel->readable || tunnel->lost || tunnel->closed || tunnel->handshaking)
        return false;
    struct leg *leg = tunnel->leg;
    /* Behind the peer's end only a RESET can come, or the end of the tunnel: however slow the application, they count. */
    if (leg && !leg->link->failed && tunnel->received_end == FRAME_DATA && link_is_full(leg->peer))
        return false;
    return !inbox_is_full(tunnel);
}

static void decrypt(struct tunnel *tunnel)
{
    struct core *core = tunnel->core;
    size_t used = 0, size;
    libssl.ERR_clear_error();
    /* There is always room for a whole record: what was received, and the piece that OpenSSL still had. */
    while (!tunnel->lost && libssl.SSL_read_ex(tunnel->ssl, core->clear + used, RECORD_SIZE, &size)) {
        if (tunnel->leg)
            lease_digest(tunnel->leg, core->clear + used, size);
        else
            tunnel_keep(tunnel, core->clear + used, size);
        used += size;
    }
    if (tunnel->leg)
        lease_flush_pieces(tunnel->leg);
    if (tunnel->lost)
        return;
    int status = libssl.SSL_get_error(tunnel->ssl, 0);
    if (status != SSL_ERROR_WANT_READ)
        lose(tunnel, 0, status == SSL_ERROR_ZERO_RETURN ? 0 : libssl.ERR_get_error());
    else if (core->out.size)
        tunnel_flush(tunnel); /* OpenSSL's own words, an answer to a key update for one */
}

/* Reads what is there, within a budget. */
void tunnel_read(struct tunnel *tunnel)
{
    struct core *core = tunnel->core;
    for (int reads = 0; may_read(tunnel); reads++) {
        if (reads >= READS_PER_TURN && tunnel->leg) {
            core_make_ready(core, tunnel->leg->link);
            return;
        }
        ssize_t size = recv(tunnel->fd, core->cipher, CIPHER_READ, 0);
        if (size < 0 && errno == EINTR)
            continue;
        if (size < 0 && errno == EAGAIN) {
            tunnel->readable = false;
            return;
        }
        if (size <= 0) {
            lose(tunnel, size ? errno : 0, 0);
            return;
        }
        if (size < CIPHER_READ && !tunnel->hung_up)
            tunnel->readable = false;
        tunnel->cipher = core->cipher;
        tunnel->cipher_size = (size_t)size;
        decrypt(tunnel);
    }
}

/* Out */

static void count_sent(struct tunnel *tunnel, size_t sent)
{
    int kept = 0;
    for (int which = 0; which < tunnel->mark_count; which++) {
        struct mark mark = tunnel->marks[which];
        if (mark.end > sent) {
            mark.end -= sent;
            tunnel->marks[kept++] = mark;
        } else if (tunnel->leg) {
            link_count(tunnel->leg, mark.size);
        }
    }
    tunnel->mark_count = kept;
}

/* Sends what it can; the bytes that went. */
static size_t send_some(struct tunnel *tunnel, const uint8_t *bytes, size_t size)
{
    size_t sent = 0;
    while (sent < size) {
        ssize_t went = send(tunnel->fd, bytes + sent, size - sent, MSG_NOSIGNAL);
        if (went >= 0)
            sent += (size_t)went;
        else if (errno == EAGAIN)
            break;
        else if (errno != EINTR) {
            lose(tunnel, errno, 0);
            break;
        }
    }
    count_sent(tunnel, sent);
    return sent;
}

/* Sends the ciphertext that OpenSSL has made, and keeps what the socket does not take. */
void tunnel_flush(struct tunnel *tunnel)
{
    struct backlog *held = &tunnel->held, *out = &tunnel->core->out;
    size_t size = out->size, sent = 0;
    out->size = 0;
    if (tunnel->lost || tunnel->closed)
        return;
    if (held->size) {
        sent = send_some(tunnel, held->bytes, held->size);
        held->size -= sent;
        memmove(held->bytes, held->bytes + sent, held->size);
        sent = 0;
    }
    if (!held->size)
        sent = send_some(tunnel, out->bytes, size);
    if (sent < size && !tunnel->lost && !backlog_append(held, out->bytes + sent, size - sent))
        lose(tunnel, ENOMEM, 0);
    if (!held->size) {
        free(held->bytes);
        held->bytes = NULL;
    }
}

/* Frames that Python has made. */
void tunnel_say(struct tunnel *tunnel, const uint8_t *bytes, size_t size)
{
    size_t written;
    if (tunnel->lost || tunnel->closed)
        return;
    libssl.ERR_clear_error();
    if (!libssl.SSL_write_ex(tunnel->ssl, bytes, size, &written))
        lose(tunnel, 0, libssl.ERR_get_error());
    else
        tunnel_flush(tunnel);
}

void tunnel_on_event(struct tunnel *tunnel, uint32_t events)
{
    if (tunnel->closed || tunnel->lost)
        return;
    if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        tunnel->hung_up = true;
    if (events & EPOLLIN)
        tunnel->readable = true;
    if (events & EPOLLOUT && tunnel->held.size) {
        tunnel_flush(tunnel);
        if (tunnel->leg && !tunnel->held.size)
            lease_on_flushed(tunnel->leg);
    }
    if (tunnel->handshaking) {
        tunnel_shake(tunnel);
        return;
    }
    tunnel_read(tunnel);
    /* Nobody reads here now, so nobody would find it. */
    if (events & EPOLLERR && !tunnel->lost && !tunnel->closed && tunnel->readable) {
        int error = 0;
        socklen_t size = sizeof error;
        if (!getsockopt(tunnel->fd, SOL_SOCKET, SO_ERROR, &error, &size) && error)
            lose(tunnel, error, 0);
    }
}

/* For good. No close_notify: meshnet/1 ends leases with FIN frames, so a bare TCP close truncates nothing. */
void tunnel_close(struct tunnel *tunnel)
{
    if (tunnel->closed)
        return;
    if (tunnel->leg)
        link_fail(tunnel->leg->link, REASON_ABORTED, BY_PROXY, 0);
    if (tunnel->leg)
        link_cut(tunnel->leg->link);
    tunnel->closed = true;
    close(tunnel->fd);
    tell(tunnel);
}

/* What is left when no thread knows it any more. */
void tunnel_free(struct tunnel *tunnel)
{
    if (tunnel->ssl)
        libssl.SSL_free(tunnel->ssl);
    if (!tunnel->closed && tunnel->fd >= 0)
        close(tunnel->fd);
    if (tunnel->session)
        libssl.SSL_SESSION_free(tunnel->session);
    free(tunnel->held.bytes);
    free(tunnel->inbox);
    free(tunnel->certificate);
    frame_reader_free(&tunnel->frames);
}
