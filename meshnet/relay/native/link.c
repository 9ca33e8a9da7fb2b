/* The life of a link: it ends by two FINs or by the first failure, and is reported once. */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <stdlib.h>

/* NULL: no memory. */
struct link *link_new(struct core *core)
{
    struct link *link = calloc(1, sizeof *link);
    if (!link)
        return NULL;
    link->core = core;
    link->ended_by = BY_PROXY;
    link->ended = (struct news){.kind = NEWS_LINK_ENDED, .owner = link};
    link->aborted = (struct news){.kind = NEWS_LINK_ABORTED, .owner = link};
    link->client = (struct leg){.link = link, .peer = &link->endpoint, .who = BY_CLIENT, .fd = -1};
    link->endpoint = (struct leg){.link = link, .peer = &link->client, .who = BY_SERVER, .fd = -1};
    return link;
}

void link_set_plain(struct leg *leg, int fd)
{
    leg->source.kind = SOURCE_PLAIN;
    leg->fd = fd;
}

void link_set_tunnel(struct leg *leg, struct tunnel *tunnel)
{
    leg->tunnel = tunnel;
    leg->closed = true; /* what a plain leg's is not */
}

void link_free(struct link *link)
{
    free(link->client.held.bytes); /* of a link that never began to send */
    free(link->endpoint.held.bytes);
    free(link->own_reset);
    free(link->peer_reset);
    free(link->early.bytes);
    free(link);
}

bool link_is_full(const struct leg *leg)
{
    return leg->dialling || (leg->tunnel ? leg->tunnel->held.size > 0 : leg->held.size || leg->pipe);
}

int link_fd(const struct leg *leg)
{
    return leg->tunnel ? leg->tunnel->fd : leg->fd;
}

void link_pull(struct leg *leg)
{
    if (leg->tunnel)
        tunnel_read(leg->tunnel);
    else
        plain_pull(leg);
}

void link_end(struct link *link)
{
    struct core *core = link->core;
    struct leg *legs[] = {&link->client, &link->endpoint};
    link->over = true;
    for (int which = 0; which < 2; which++) {
        if (legs[which]->tunnel)
            lease_end(legs[which]);
        else
            plain_close(legs[which]);
    }
    *link->place = link->next;
    if (link->next)
        link->next->place = link->place;
    if (link->lingers)
        core_stop_lingering(core, link);
    if (core->near_alone == link)
        core->near_alone = NULL;
    atomic_store(&link->ended_at, core->now);
    if (link->order) {
        dial_forget(link);
        young_forget(link);
        link->owes = !order_leave(link->order);
    }
    core_tell(core, &link->ended);
}

/* Sends what was read before the link was made. */
static void write_early(struct leg *leg)
{
    struct backlog early = leg->held;
    leg->held = (struct backlog){0};
    if (early.size > FRAME_HEADER && !leg->link->failed) {
        uint8_t *bytes = early.bytes + FRAME_HEADER; /* see lease_write */
        size_t size = early.size - FRAME_HEADER;
        struct iovec whole = {.iov_base = bytes, .iov_len = size};
        if (leg->tunnel)
            lease_write(leg, bytes, size);
        else
            plain_write(leg, &whole, 1);
    }
    free(early.bytes);
}

void link_enlist(struct link *link)
{
    struct core *core = link->core;
    link->next = core->links;
    link->place = &core->links;
    if (link->next)
        link->next->place = &link->next;
    core->links = link;
}

void link_start(struct link *link)
{
    struct core *core = link->core;
    struct leg *legs[] = {&link->client, &link->endpoint};
    link_enlist(link);
    for (int which = 0; which < 2; which++) {
        struct tunnel *tunnel = legs[which]->tunnel;
        if (!tunnel)
            continue;
        tunnel->leg = legs[which];
        tunnel->sent_end = FRAME_DATA;
        tunnel->received_end = legs[which]->received_end;
        legs[which]->in_done = tunnel->received_end != FRAME_DATA;
    }
    /* Both are watched before either may be heard of: epoll is asked by this very thread. */
    for (int which = 0; which < 2 && !link->failed; which++) {
        if (!legs[which]->tunnel && core_watch(core, legs[which]->fd, &legs[which]->source))
            link_fail(link, REASON_INTERNAL, BY_PROXY, errno);
    }
    for (int which = 0; which < 2 && !link->over; which++)
        write_early(legs[which]);
    for (int which = 0; which < 2 && !link->over; which++) {
        if (legs[which]->tunnel)
            lease_begin(legs[which]);
    }
}

/* After others had their turn. */
void link_continue(struct link *link)
{
    if (!link->over)
        link_pull(&link->client);
    if (!link->over)
        link_pull(&link->endpoint);
}

/* `leg` will send no more. */
void link_on_fin(struct leg *leg)
{
    struct link *link = leg->link;
    if (link->failed) {
        link_settle(link);
        return;
    }
    if (!atomic_load_explicit(&link->client_done, memory_order_relaxed) &&
        !atomic_load_explicit(&link->endpoint_done, memory_order_relaxed))
        link->ended_by = leg->who;
    if (leg == &link->client)
        atomic_store_explicit(&link->client_done, true, memory_order_relaxed);
    else
        atomic_store_explicit(&link->endpoint_done, true, memory_order_relaxed);
    atomic_store_explicit(&link->moved_at, link->core->now, memory_order_relaxed);
    if (leg->peer->tunnel)
        lease_finish(leg->peer);
    else
        plain_finish(leg->peer);
}

/* Whether it is this host that lacks something, which is nobody's doing at the other end. */
bool link_is_short(int error)
{
    return error == ENOMEM || error == ENOBUFS || error == ENOSPC; /* the last one: of epoll's watches */
}

/* Whether the peer has answered nothing to the last retry: why, as the way there last told, by ICMP. */
bool link_is_gone(int error)
{
    switch (error) {
    case ETIMEDOUT:
    case EHOSTUNREACH:
    case ENETUNREACH:
    case EHOSTDOWN:
    case ENONET:
    case ECONNREFUSED:
    case ENOPROTOOPT:
    case EACCES:
        return true;
    default:
        return false;
    }
}

static void abort_leg(struct leg *leg)
{
    if (leg->tunnel)
        lease_abort(leg);
    else
        plain_reset(leg);
}

/* The first failure is the reason; what it brings about is not. */
void link_fail(struct link *link, enum reason reason, enum ended_by who, int error)
{
    if (link->over)
        return;
    if (!link->failed) {
        link->failed = true;
        if (link->order)
            dial_forget(link);
        link->reason = reason;
        link->ended_by = who;
        link->error = error;
        if (reason == REASON_RESET) { /* in its own words */
            link->reset = link->peer_reset;
            link->reset_size = link->peer_reset_size;
        } else if (!link->own_reset || reason != REASON_ABORTED) {
            link->reset = link->core->resets[reason].bytes;
            link->reset_size = link->core->resets[reason].size;
        }
        abort_leg(&link->client);
        abort_leg(&link->endpoint);
    }
    link_settle(link);
}

/* From Python, once, which gives away `reset`: the payload of the RESET frame, or NULL. */
void link_abort(struct link *link, uint8_t *reset, size_t size)
{
    link->own_reset = reset;
    if (!link->failed) {
        link->reset = reset;
        link->reset_size = size;
        link_fail(link, REASON_ABORTED, BY_PROXY, 0);
    }
    core_tell(link->core, &link->aborted);
}

/* Ends the link if nothing is left to do. */
void link_settle(struct link *link)
{
    if (link->over)
        return;
    if (!link->failed) {
        if (link->client.out_done && link->endpoint.out_done)
            link_end(link);
    } else if (link->client.over && link->endpoint.over) {
        link_end(link);
    } else if (!link->lingers) {
        core_linger(link->core, link);
    }
}

/* Ends it without waiting for anybody. */
void link_cut(struct link *link)
{
    if (link->over)
        return;
    link_fail(link, REASON_ABORTED, BY_PROXY, 0);
    struct leg *legs[] = {&link->client, &link->endpoint};
    for (int which = 0; which < 2; which++) {
        if (legs[which]->tunnel)
            lease_cut(legs[which]);
    }
    link_settle(link);
}

/* `size` bytes have been handed to this leg's socket. */
void link_count(struct leg *leg, size_t size)
{
    struct link *link = leg->link;
    _Atomic uint64_t *count = leg == &link->client ? &link->received : &link->sent;
    /* One writer: no need for a locked add. */
    uint64_t before = atomic_load_explicit(count, memory_order_relaxed);
    atomic_store_explicit(count, before + size, memory_order_relaxed);
    atomic_store_explicit(&link->moved_at, link->core->now, memory_order_relaxed);
}
