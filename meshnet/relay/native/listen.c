/* Connections come in: those that an order covers are dialled here, the others are for Python.
 *
 * Of the processes that share a listener one is woken for a connection (EPOLLEXCLUSIVE): who has waited longest, for who
 * has accepted goes to the end of the line. Who was woken may die before it accepts; so each looks now and then.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#define ACCEPTS_PER_TURN 64 /* then those that are open already get theirs */
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

static void hand_over(struct listener *listener, int fd, const struct address *source)
{
    struct accepted *accepted = malloc(sizeof *accepted);
    if (!accepted) {
        close(fd);
        return;
    }
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
    if (order)
        dial_begin(order, fd, &source, through);
    else
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
static void get_stuck(struct listener *listener)
{
    listener->error = errno;
    stop(listener);
    core_tell(listener->core, &listener->stuck);
}

/* Whether to go on. */
static bool accept_one(struct listener *listener)
{
    struct sockaddr_storage peer;
    socklen_t size = sizeof peer;
    int fd = accept4(listener->fd, (struct sockaddr *)&peer, &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd >= 0) {
        take(listener, fd, &peer);
        return true;
    }
    switch (errno) {
    case EAGAIN:
        return false;
    case EMFILE:
    case ENFILE:
    case ENOBUFS:
    case ENOMEM:
    case EBADF:
    case EINVAL:
    case ENOTSOCK:
        get_stuck(listener);
        return false;
    default: /* what befell that one connection before we took it: accept(2), "Error handling" */
        return true;
    }
}

void listener_on_event(struct listener *listener)
{
    for (int accepted = 0; accepted < ACCEPTS_PER_TURN && listener->watched; accepted++) {
        if (!accept_one(listener))
            break;
    }
    if (!listener->shared || !listener->watched)
        return;
    stop(listener);
    if (!watch(listener))
        get_stuck(listener);
}

void listeners_look(struct core *core)
{
    if (!core->shared || core->now < core->look_due)
        return;
    core->look_due = core->now + LOOK_NS;
    for (struct listener *listener = core->shared, *next; listener; listener = next) {
        next = listener->next;
        while (listener->watched && accept_one(listener))
            ;
    }
}

/* Also after it was stuck. */
void listener_open(struct listener *listener)
{
    if (!listener->watched && !watch(listener))
        get_stuck(listener);
}

/* Takes those that still wait, for the kernel has told their clients that they are connected. */
void listener_close(struct listener *listener)
{
    while (listener->watched && accept_one(listener))
        ;
    stop(listener);
    close(listener->fd);
    core_tell(listener->core, &listener->gone);
}
