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

static bool watch(struct tunnel *tunnel)
{
    struct core *core = tunnel->core;
    if (core_watch(core, tunnel->fd, &tunnel->source))
        return false;
    tunnel->watched = true;
    tunnel->next = core->tunnels;
    tunnel->place = &core->tunnels;
    if (tunnel->next)
        tunnel->next->place = &tunnel->next;
    core->tunnels = tunnel;
    return true;
}

static void unwatch(struct tunnel *tunnel)
{
    if (!tunnel->watched)
        return;
    tunnel->watched = false;
    *tunnel->place = tunnel->next;
    if (tunnel->next)
        tunnel->next->place = tunnel->place;
    core_unwatch(tunnel->core, tunnel->fd);
}

/* The first failure is the reason. */
static void note_lost(struct tunnel *tunnel, int error, unsigned long ssl_error, long verify)
{
    pthread_mutex_lock(&tunnel->core->lock);
    tunnel->lost = true;
    tunnel->error = error;
    tunnel->ssl_error = ssl_error;
    tunnel->verify = verify;
    pthread_mutex_unlock(&tunnel->core->lock);
    tunnel->core->out.size = 0; /* what OpenSSL has made for it must not go to another */
}

/* No more will come, and nothing can be sent. */
static void lose(struct tunnel *tunnel, int error, unsigned long ssl_error, long verify)
{
    if (tunnel->lost)
        return;
    note_lost(tunnel, error, ssl_error, verify);
    if (!tunnel->leg)
        tell(tunnel);
    else if (!tunnel->leg->over) /* or its lease is over, and the link goes on for its other leg */
        lease_lost(tunnel->leg);
}

/* Handshake */

/* False: no memory. */
static bool copy_certificate(struct tunnel *tunnel)
{
    X509 *peer = libssl.SSL_get1_peer_certificate(tunnel->ssl);
    unsigned char *der = NULL;
    int size = peer ? libssl.i2d_X509(peer, &der) : -1;
    if (peer)
        libssl.X509_free(peer);
    if (size <= 0)
        return false;
    bool fits = backlog_append(&tunnel->certificate, der, (size_t)size);
    libssl.CRYPTO_free(der, __FILE__, __LINE__);
    return fits;
}

static void establish(struct tunnel *tunnel)
{
    const unsigned char *alpn;
    unsigned int alpn_size;
    tunnel->handshaking = false;
    unwatch(tunnel); /* or there would be news of it from two threads */
    libssl.SSL_get0_alpn_selected(tunnel->ssl, &alpn, &alpn_size);
    if (!alpn_size) { /* a peer that asks for no protocol is not refused by OpenSSL */
        lose(tunnel, EPROTO, 0, 0);
        return;
    }
    if (!copy_certificate(tunnel)) {
        lose(tunnel, ENOMEM, 0, 0);
        return;
    }
    tunnel->version = libssl.SSL_get_version(tunnel->ssl);
    tunnel->cipher_name = libssl.SSL_CIPHER_get_name(libssl.SSL_get_current_cipher(tunnel->ssl));
    tunnel->resumed = libssl.SSL_session_reused(tunnel->ssl);
    tunnel->established = true;
    tell(tunnel);
}

static void fail_handshake(struct tunnel *tunnel)
{
    unsigned long ssl_error = libssl.ERR_get_error();
    struct backlog *alert = &tunnel->core->out;
    /* What it says counts, and not whether it can be said. */
    if (!tunnel->held.size && alert->size)
        send(tunnel->fd, alert->bytes, alert->size, MSG_NOSIGNAL);
    lose(tunnel, tunnel->handshake_error, ssl_error, libssl.SSL_get_verify_result(tunnel->ssl));
}

/* Goes on with the handshake; on the thread for handshakes, which lets go of the tunnel when it is over. */
void tunnel_shake(struct tunnel *tunnel)
{
    if (!tunnel->watched && !watch(tunnel)) {
        lose(tunnel, errno, 0, 0);
        return;
    }
    libssl.ERR_clear_error();
    int done = libssl.SSL_do_handshake(tunnel->ssl);
    int status = done == 1 ? SSL_ERROR_NONE : libssl.SSL_get_error(tunnel->ssl, done);
    if (status != SSL_ERROR_NONE && status != SSL_ERROR_WANT_READ) {
        fail_handshake(tunnel);
        return;
    }
    tunnel_flush(tunnel);
    if (status == SSL_ERROR_NONE && !tunnel->lost && !tunnel->held.size) /* else our last flight is still to go out */
        establish(tunnel);
}

/* Into the hands of the thread that relays. */
void tunnel_adopt(struct tunnel *tunnel)
{
    if (!watch(tunnel))
        lose(tunnel, errno, 0, 0);
}

/* In */

/* For Python: what no lease wants. */
void tunnel_keep(struct tunnel *tunnel, const uint8_t *bytes, size_t size)
{
    struct core *core = tunnel->core;
    if (!tunnel->leg && tunnel->serving) {
        if (serve(tunnel, &bytes, &size))
            return;
        tunnel->serving = false;
    }
    pthread_mutex_lock(&core->lock);
    bool fits = backlog_append(&tunnel->inbox, bytes, size);
    tunnel->kept++;
    pthread_mutex_unlock(&core->lock);
    if (!fits)
        lose(tunnel, ENOMEM, 0, 0);
    else if (!tunnel->leg)
        tell(tunnel);
}

bool tunnel_has_full_inbox(struct tunnel *tunnel)
{
    pthread_mutex_lock(&tunnel->core->lock);
    bool full = tunnel->inbox.size >= MAX_INBOX;
    pthread_mutex_unlock(&tunnel->core->lock);
    return full;
}

static bool may_read(struct tunnel *tunnel)
{
    if (!tunnel->readable || tunnel->lost || tunnel->closed || tunnel->handshaking || tunnel->held.size > MAX_HELD)
        return false;
    struct leg *leg = tunnel->leg;
    /* Behind the peer's end only a RESET can come, or the tunnel's: however slow the application, they count. */
    if (leg && !leg->link->failed && tunnel->received_end == FRAME_DATA && link_is_full(leg->peer))
        return false;
    return !tunnel_has_full_inbox(tunnel);
}

static void decrypt(struct tunnel *tunnel)
{
    struct core *core = tunnel->core;
    size_t used = 0, size;
    int status = SSL_ERROR_NONE;
    unsigned long ssl_error = 0;
    libssl.ERR_clear_error();
    while (!tunnel->lost) {
        /* There is always room for a whole record: what was received, and the piece that OpenSSL still had. */
        if (!libssl.SSL_read_ex(tunnel->ssl, core->clear + used, RECORD_SIZE, &size)) {
            /* Asked at once: to hand the pieces on may make us write, and then it would speak of that. */
            status = libssl.SSL_get_error(tunnel->ssl, 0);
            ssl_error = status == SSL_ERROR_SSL ? libssl.ERR_get_error() : 0;
            break;
        }
        /* Behind a whole record that is safe, also where CVE-2024-4741 is not fixed. */
        if (tunnel->bloated) {
            tunnel->bloated = false;
            libssl.SSL_free_buffers(tunnel->ssl);
        }
        if (tunnel->leg)
            lease_digest(tunnel->leg, core->clear + used, size);
        else
            tunnel_keep(tunnel, core->clear + used, size);
        used += size;
    }
    if (tunnel->leg)
        lease_flush_pieces(tunnel->leg);
    if (core->out.size)
        tunnel_flush(tunnel); /* OpenSSL's own words: the answer to a key update, an alert */
    if (status != SSL_ERROR_NONE && status != SSL_ERROR_WANT_READ)
        lose(tunnel, 0, ssl_error, 0);
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
            lose(tunnel, size ? errno : 0, 0, 0);
            return;
        }
        if (size < CIPHER_READ && !tunnel->hung_up)
            tunnel->readable = false;
        if (size >= NEAR_READ && tunnel->leg && !tunnel->looked_near) {
            tunnel->looked_near = true;
            near_bound(tunnel->leg);
        }
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

/* It cannot send. A peer that has hung up may have said why before: that it does not take our certificate. */
static void lose_unheard(struct tunnel *tunnel, int error)
{
    if (tunnel->saying && !tunnel->leg) {
        tunnel->readable = tunnel->hung_up = true;
        tunnel_read(tunnel);
    }
    lose(tunnel, error, 0, 0);
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
            lose_unheard(tunnel, errno);
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
        lose(tunnel, ENOMEM, 0, 0);
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
    if (tunnel->leg && tunnel->depot) /* a PING that an order's lease has overtaken, which is answer enough */
        return;
    libssl.ERR_clear_error();
    if (!libssl.SSL_write_ex(tunnel->ssl, bytes, size, &written)) {
        unsigned long ssl_error = libssl.ERR_get_error();
        lose(tunnel, ssl_error ? 0 : ENOMEM, ssl_error, 0); /* without one it is our BIO that had no memory */
        return;
    }
    tunnel->saying = true;
    tunnel_flush(tunnel);
    tunnel->saying = false;
}

void tunnel_on_event(struct tunnel *tunnel, uint32_t events)
{
    if (tunnel->closed || tunnel->lost)
        return;
    if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        tunnel->hung_up = true;
    if (events & EPOLLIN)
        tunnel->readable = true;
    if (events & EPOLLOUT) {
        if (tunnel->held.size)
            tunnel_flush(tunnel);
        /* Or something that was to be said since has flushed it, and nobody was told. */
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
            lose(tunnel, error, 0, 0);
    }
}

/* Something of a lease is still in it, so it is of no further use. When its owner closes the socket, the peer shall get
 * RST: a FIN would wait behind bytes that nobody reads.
 */
void tunnel_kill(struct tunnel *tunnel)
{
    struct linger linger = {.l_onoff = 1};
    if (!tunnel->closed)
        setsockopt(tunnel->fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    if (!tunnel->lost)
        note_lost(tunnel, 0, 0, 0);
}

/* Its peer answers no more. */
void tunnel_gone(struct tunnel *tunnel)
{
    lose(tunnel, ETIMEDOUT, 0, 0);
}

/* The thread is about to end: whoever waits for the tunnel must not wait for ever. */
void tunnel_abandon(struct tunnel *tunnel)
{
    lose(tunnel, ECANCELED, 0, 0);
    unwatch(tunnel);
}

static void read_no_more(struct tunnel *tunnel)
{
    struct tunnel **place = &tunnel->core->more;
    while (*place != tunnel)
        place = &(*place)->next_more;
    *place = tunnel->next_more;
    tunnel->has_more = false;
}

/* For good. No close_notify: meshnet/1 ends leases with FIN frames, so a bare TCP close truncates nothing. */
void tunnel_close(struct tunnel *tunnel)
{
    if (tunnel->leg)
        link_cut(tunnel->leg->link);
    unwatch(tunnel);
    if (tunnel->has_more)
        read_no_more(tunnel);
    tunnel->closed = true;
    close(tunnel->fd);
    core_tell(tunnel->core, &tunnel->gone);
}

/* What is left when no thread knows it any more. */
void tunnel_free(struct tunnel *tunnel)
{
    if (tunnel->ssl) {
        if (tunnel->established) /* or OpenSSL would miss the close_notify, and never resume this session again */
            libssl.SSL_set_shutdown(tunnel->ssl, SSL_SENT_SHUTDOWN);
        libssl.SSL_free(tunnel->ssl);
    }
    if (!tunnel->closed && tunnel->fd >= 0)
        close(tunnel->fd);
    if (tunnel->session)
        libssl.SSL_SESSION_free(tunnel->session);
    free(tunnel->held.bytes);
    free(tunnel->inbox.bytes);
    free(tunnel->opening.bytes);
    free(tunnel->certificate.bytes);
    frame_reader_free(&tunnel->frames);
}
