/* Connections come in: those that an order covers are dialled here, the others are for Python.
 *
 * Of the processes that share a listener one is woken for a connection (EPOLLEXCLUSIVE): who has waited longest, for
 * who has accepted goes to the end of the line. Who was woken may die before it accepts; so each looks now and then.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#define ACCEPTS_PER_TURN 64 /* then those that are open already get theirs */
#define BACKLOG 4096        /* as meshnet/net/sockets.py has it: so many may wait when a listener is closed */
#define ORIGINAL_DST 80     /* SO_ORIGINAL_DST of linux/netfilter_ipv4.h, and IP6T_SO_ORIGINAL_DST: the same number */

/* A transparent listener's connections were not turned: their own address is where they were going (tproxy.rst). */
static bool is_transparent(int fd, sa_family_t family)
{
    int set = 0;
    socklen_t size = sizeof set;
    return !(family == AF_INET ? getsockopt(fd, IPPROTO_IP, IP_TRANSPARENT, &set, &size)
                               : getsockopt(fd, IPPROTO_IPV6, IPV6_TRANSPARENT, &set, &size)) &&
           set;
}

static bool original_of(int fd, const struct address *source, struct address *original)
{
    struct sockaddr_storage found = {.ss_family = source->family};
    int level = source->family == AF_INET ? IPPROTO_IP : IPPROTO_IPV6;
    socklen_t size = source->family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
    if (!getsockopt(fd, level, ORIGINAL_DST, &found, &size))
        return address_of(original, &found);
    size = sizeof found;
    return is_transparent(fd, source->family) && !getsockname(fd, (struct sockaddr *)&found, &size) &&
           address_of(original, &found);
}

/* Into `core->spare`, which is there since before the connection was accepted. */
static void hand_over(struct listener *listener, int fd, const struct address *source)
{
    struct accepted *accepted = listener->core->spare;
    listener->core->spare = NULL;
    *accepted = (struct accepted){.fd = fd, .source = *source, .listener = listener, .news.kind = NEWS_ACCEPTED};
    accepted->news.owner = accepted;
    core_tell(listener->core, &accepted->news);
}

static void take(struct listener *listener, int fd, const struct sockaddr_storage *peer)
{
    struct address source, original;
    struct order *order = NULL;
    struct tunnel *through;
    if (!address_of(&source, peer)) {
        close(fd);
        return;
    }
    if (original_of(fd, &source, &original))
        order = order_take(listener->core, listener->direction, 0, &source, &original, &through);
    if (!order || !dial_begin(order, fd, &source, through))
        hand_over(listener, fd, &source);
}

static bool watch(struct listener *listener)
{
    struct core *core = listener->core;
    struct epoll_event event = {.events = EPOLLIN | (listener->shared ? EPOLLEXCLUSIVE : 0), .data.ptr = listener};
    if (epoll_ctl(core->epoll, EPOLL_CTL_ADD, listener->fd, &event))
        return false;
    listener->watched = true;
    if (listener->shared) {
        listener->next = core->shared;
        listener->place = &core->shared;
        if (listener->next)
            listener->next->place = &listener->next;
        core->shared = listener;
    }
    return true;
}

static void stop(struct listener *listener)
{
    if (!listener->watched)
        return;
    core_unwatch(listener->core, listener->fd);
    listener->watched = false;
    if (listener->shared) {
        *listener->place = listener->next;
        if (listener->next)
            listener->next->place = listener->place;
    }
}

/* Python says so, and tries again after a while. */
static void get_stuck(struct listener *listener, int error)
{
    listener->error = error;
    stop(listener);
    core_tell(listener->core, &listener->stuck);
}

/* What befell that one connection before we took it: accept(2), "Error handling". */
static bool is_of_one_connection(int error)
{
    switch (error) {
    case EINTR:
    case ECONNABORTED:
    case EPROTO:
    case ENOPROTOOPT:
    case EOPNOTSUPP:
    case ENETDOWN:
    case ENETUNREACH:
    case EHOSTDOWN:
    case EHOSTUNREACH:
    case ENONET:
    case ETIMEDOUT:
        return true;
    default:
        return false;
    }
}

/* Whether to go on. Where there is no memory for a connection it waits on in the kernel, and nothing is lost. */
static bool accept_one(struct listener *listener)
{
    struct core *core = listener->core;
    struct sockaddr_storage peer;
    socklen_t size = sizeof peer;
    if (!core->spare && !(core->spare = malloc(sizeof *core->spare))) {
        get_stuck(listener, ENOMEM);
        return false;
    }
    int fd = accept4(listener->fd, (struct sockaddr *)&peer, &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd >= 0) {
        take(listener, fd, &peer);
        return true;
    }
    if (errno == EAGAIN)
        return false;
    if (is_of_one_connection(errno))
        return true;
    get_stuck(listener, errno);
    return false;
}

/* Whether as many as that have been accepted, so that more may wait. */
static bool accept_some(struct listener *listener, int most)
{
    for (int accepted = 0; accepted < most; accepted++) {
        if (!listener->watched || !accept_one(listener))
            return false;
    }
    return true;
}

void listener_on_event(struct listener *listener)
{
    accept_some(listener, ACCEPTS_PER_TURN);
    if (!listener->shared || !listener->watched)
        return;
    stop(listener);
    if (!watch(listener))
        get_stuck(listener, errno);
}

void listeners_look(struct core *core)
{
    if (!core->shared || core->now < core->look_due)
        return;
    core->look_due = core->now + LOOK_NS;
    for (struct listener *listener = core->shared, *next; listener; listener = next) {
        next = listener->next;
        if (accept_some(listener, ACCEPTS_PER_TURN))
            core->look_due = core->now; /* in the next round: bytes come between */
    }
}

/* Also after it was stuck. */
void listener_open(struct listener *listener)
{
    if (!listener->watched && !watch(listener))
        get_stuck(listener, errno);
}

/* Takes those that still wait, for the kernel has told their clients that they are connected; not those that come
 * meanwhile, of which there may be no end.
 */
void listener_close(struct listener *listener)
{
    accept_some(listener, BACKLOG);
    stop(listener);
    close(listener->fd);
    core_tell(listener->core, &listener->gone);
}
