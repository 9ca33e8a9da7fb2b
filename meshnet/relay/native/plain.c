/* A plain TCP leg: one recv and one send a message, splice when there is much.
 *
 * Edge-triggered: epoll is told once what we wait for, and never again. A read that does not fill the buffer has
 * emptied the socket, unless epoll also spoke of a hang-up: then the FIN or the error is still to be read, and no
 * further edge would tell of it.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define READS_PER_TURN 4 /* then others get theirs */
#define BULK_ENDS_BELOW (32 * 1024) /* bytes a splice moved; less is cheaper to copy */

void plain_fail(struct leg *leg, int error)
{
    if (link_is_short(error))
        link_fail(leg->link, REASON_INTERNAL, BY_PROXY, error);
    else
        link_fail(leg->link, link_is_gone(error) ? REASON_KEEPALIVE : REASON_PEER_RST, leg->who, error);
}

static void shut_down(struct leg *leg)
{
    /* When this was the last thing to do, close says it too: all that came here has been read. */
    bool is_last = leg->in_done && leg->peer->out_done;
    if (!is_last && shutdown(leg->fd, SHUT_WR)) {
        plain_fail(leg, errno);
        return;
    }
    leg->out_done = true;
    link_settle(leg->link);
}

/* Keeps what the socket did not take. */
static void hold(struct leg *leg, const struct iovec *pieces, int count)
{
    for (int which = 0; which < count; which++) {
        if (!backlog_append(&leg->held, pieces[which].iov_base, pieces[which].iov_len)) {
            link_fail(leg->link, REASON_INTERNAL, BY_PROXY, ENOMEM);
            return;
        }
    }
}

/* Whether all of it went. False also when the link has failed. */
static bool drain(struct leg *leg, struct pipe *pipe)
{
    while (pipe->held) {
        ssize_t moved = splice(pipe->reader, NULL, leg->fd, NULL, pipe->held, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
        if (moved < 0) {
            if (errno == EINTR)
                continue;
            if (errno != EAGAIN)
                plain_fail(leg, errno);
            return false;
        }
        pipe->held -= (size_t)moved;
        link_count(leg, (size_t)moved);
    }
    return true;
}

static void flush(struct leg *leg)
{
    struct core *core = leg->link->core;
    if (leg->pipe) {
        if (!drain(leg, leg->pipe))
            return;
        pipes_give_back(&core->pipes, leg->pipe);
        leg->pipe = NULL;
    } else {
        struct backlog held = leg->held;
        struct iovec whole = {.iov_base = held.bytes, .iov_len = held.size};
        leg->held = (struct backlog){0};
        plain_write(leg, &whole, 1); /* holds the rest anew */
        free(held.bytes);
        if (leg->held.size || leg->closed)
            return;
    }
    if (leg->fin_due)
        shut_down(leg);
    else
        link_pull(leg->peer);
}

/* Its handshake is over: what was for it meanwhile can go. */
void plain_connected(struct leg *leg)
{
    if (leg->held.size)
        flush(leg);
    else if (leg->fin_due)
        shut_down(leg);
    else
        link_pull(leg->peer);
}

/* Whether to go on reading; `size` is what recv or splice said. */
static bool read_anything(struct leg *leg, ssize_t size)
{
    if (size > 0)
        return true;
    if (size < 0 && errno == EINTR)
        return true;
    leg->readable = false;
    if (!size) {
        leg->in_done = true;
        link_on_fin(leg);
    } else if (errno != EAGAIN) {
        plain_fail(leg, errno);
    }
    return false;
}

/* False: splice cannot, copy instead. */
static bool pull_bulk(struct leg *leg)
{
    struct core *core = leg->link->core;
    struct leg *peer = leg->peer;
    struct pipe *pipe = pipes_borrow(&core->pipes, core->now);
    if (!pipe)
        return false;
    /* Into an empty pipe: a full one would look like an empty socket. */
    ssize_t size = splice(leg->fd, NULL, pipe->writer, NULL, PIPE_SIZE, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    if (size <= 0) {
        int error = errno;
        pipes_give_back(&core->pipes, pipe);
        if (size < 0 && error == EINVAL)
            return false;
        leg->bulk = false;
        errno = error;
        read_anything(leg, size);
        return true;
    }
    pipe->held = (size_t)size;
    if (size < BULK_ENDS_BELOW)
        leg->bulk = false;
    if (drain(peer, pipe) || peer->closed)
        pipes_give_back(&core->pipes, pipe);
    else
        peer->pipe = pipe;
    return true;
}

/* Reads what is there, within a budget, and gives it to the peer. */
void plain_pull(struct leg *leg)
{
    struct link *link = leg->link;
    struct core *core = link->core;
    for (int reads = 0; reads < READS_PER_TURN; reads++) {
        if (!leg->readable || leg->in_done || link->failed || link_is_full(leg->peer))
            return;
        if (leg->bulk) {
            if (pull_bulk(leg))
                continue;
            leg->bulk = false;
        }
        ssize_t size = recv(leg->fd, core->plain, PLAIN_READ, 0);
        if (!read_anything(leg, size))
            return;
        if (size < 0)
            continue;
        if (size < PLAIN_READ && !leg->hung_up)
            leg->readable = false;
        if (size >= NEAR_READ && !leg->looked_near) {
            leg->looked_near = true;
            near_bound(leg);
        }
        if (leg->peer->tunnel) {
            lease_write(leg->peer, core->plain, (size_t)size);
            continue;
        }
        struct iovec whole = {.iov_base = core->plain, .iov_len = (size_t)size};
        leg->bulk = size == PLAIN_READ;
        plain_write(leg->peer, &whole, 1);
    }
    if (leg->readable && !leg->in_done && !link->failed && !link_is_full(leg->peer))
        core_make_ready(core, link);
}

/* Spoils `pieces`. */
void plain_write(struct leg *leg, struct iovec *pieces, int count)
{
    if (leg->held.size || leg->dialling) {
        hold(leg, pieces, count);
        return;
    }
    while (count && !leg->closed) {
        struct msghdr message = {.msg_iov = pieces, .msg_iovlen = (size_t)count};
        ssize_t sent = count == 1 ? send(leg->fd, pieces->iov_base, pieces->iov_len, MSG_NOSIGNAL)
                                  : sendmsg(leg->fd, &message, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            if (errno == EAGAIN)
                hold(leg, pieces, count);
            else
                plain_fail(leg, errno);
            return;
        }
        link_count(leg, (size_t)sent);
        while (count && (size_t)sent >= pieces->iov_len) {
            sent -= (ssize_t)pieces->iov_len;
            pieces++;
            count--;
        }
        if (count) {
            pieces->iov_base = (uint8_t *)pieces->iov_base + sent;
            pieces->iov_len -= (size_t)sent;
        }
    }
}

/* The peer has ended: FIN, after everything that is still to go. */
void plain_finish(struct leg *leg)
{
    leg->fin_due = true;
    if (!link_is_full(leg))
        shut_down(leg);
}

/* A tunnel's peer, that has not answered. */
static bool is_asked(const struct leg *leg)
{
    return leg->tunnel && leg->dialling;
}

void plain_on_event(struct leg *leg, uint32_t events)
{
    if (leg->closed)
        return;
    if (leg->dialling) {
        dial_on_event(leg, events);
        return;
    }
    if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        leg->hung_up = true;
    if (events & EPOLLIN)
        leg->readable = true;
    if (events & EPOLLOUT && link_is_full(leg))
        flush(leg);
    if (leg->readable && is_asked(leg->peer))
        ask_along(leg);
    if (leg->closed) /* Python may have it back */
        return;
    plain_pull(leg);
    /* Nobody reads here now, so nobody would find it. */
    if (events & EPOLLERR && !leg->closed && (leg->in_done || link_is_full(leg->peer))) {
        int error = 0;
        socklen_t size = sizeof error;
        if (!getsockopt(leg->fd, SOL_SOCKET, SO_ERROR, &error, &size) && error)
            plain_fail(leg, error);
    }
}

/* Closes with RST: the application must not take what it got for the whole. */
void plain_reset(struct leg *leg)
{
    struct linger linger = {.l_onoff = 1};
    if (!leg->closed)
        setsockopt(leg->fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    plain_close(leg);
}

void plain_close(struct leg *leg)
{
    if (leg->closed)
        return;
    leg->closed = true;
    leg->over = true;
    if (leg->fd >= 0) { /* or it never came to be dialled */
        core_unwatch(leg->link->core, leg->fd);
        close(leg->fd);
    }
    free(leg->held.bytes);
    leg->held = (struct backlog){0};
    if (leg->pipe) {
        pipes_give_back(&leg->link->core->pipes, leg->pipe);
        leg->pipe = NULL;
    }
}
