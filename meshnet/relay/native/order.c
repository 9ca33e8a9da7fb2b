/* Standing orders: what Python has decided about all connections of a kind, until it takes that back.
 *
 * Python adds and revokes them, the core's thread takes their places; core->lock is between.
 */
#define _GNU_SOURCE
#include "core.h"

#include <netinet/in.h>
#include <string.h>

static bool is_same(const struct address *one, const struct address *other)
{
    return !memcmp(one, other, sizeof *one);
}

/* FNV-1a over what makes connections a kind. */
static unsigned bucket_of(int direction, int identity, const struct address *source, const struct address *original)
{
    const struct address *parts[] = {source, original};
    uint32_t hash = 2166136261u ^ (uint32_t)direction ^ (uint32_t)identity << 2;
    for (int part = 0; part < 2; part++) {
        const uint8_t *bytes = (const uint8_t *)parts[part];
        for (size_t at = 0; at < sizeof *parts[part]; at++)
            hash = (hash ^ bytes[at]) * 16777619u;
    }
    return hash % ORDER_BUCKETS;
}

static struct order **place_of(struct order *order)
{
    struct order **place = &order->core->orders[bucket_of(order->direction, order->identity, &order->source,
                                                          &order->original)];
    while (*place && *place != order)
        place = &(*place)->next;
    return place;
}

/* False for what is no IP address. */
bool address_of(struct address *address, const struct sockaddr_storage *from)
{
    *address = (struct address){.family = from->ss_family};
    if (from->ss_family == AF_INET) {
        const struct sockaddr_in *v4 = (const struct sockaddr_in *)from;
        memcpy(address->host, &v4->sin_addr, sizeof v4->sin_addr);
        address->port = v4->sin_port;
    } else if (from->ss_family == AF_INET6) {
        const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)from;
        memcpy(address->host, &v6->sin6_addr, sizeof v6->sin6_addr);
        address->port = v6->sin6_port;
    } else {
        return false;
    }
    return true;
}

/* From Python. Of several for the same kind the latest is in force. */
void order_add(struct order *order)
{
    struct core *core = order->core;
    order->source.port = 0;
    pthread_mutex_lock(&core->lock);
    struct order **bucket =
        &core->orders[bucket_of(order->direction, order->identity, &order->source, &order->original)];
    order->generation = core->generation;
    order->next = *bucket;
    *bucket = order;
    pthread_mutex_unlock(&core->lock);
}

/* From Python: no connection begins under those that there are, in one step for all, however many. Each is still to be
 * revoked: until then places that links give back are its own.
 */
void orders_suspend(struct core *core)
{
    pthread_mutex_lock(&core->lock);
    core->generation++;
    pthread_mutex_unlock(&core->lock);
}

/* From Python, and only once: whether it was. `unused`: places that no link has. */
bool order_revoke(struct order *order, unsigned *unused)
{
    struct core *core = order->core;
    pthread_mutex_lock(&core->lock);
    bool was_in_force = !order->revoked;
    if (was_in_force) {
        struct order **place = place_of(order);
        *place = order->next;
        order->revoked = true;
        *unused = order->places - order->taken;
    }
    pthread_mutex_unlock(&core->lock);
    return was_in_force;
}

/* One of its places for a connection that has come, or NULL: there is no such order, or no place, or no tunnel where
 * one is needed. `through`: that tunnel.
 */
struct order *order_take(struct core *core, int direction, int identity, const struct address *source,
                         const struct address *original, struct tunnel **through)
{
    struct address host = *source;
    struct tunnel *spent = NULL;
    *through = NULL;
    host.port = 0;
    pthread_mutex_lock(&core->lock);
    struct order *order = core->orders[bucket_of(direction, identity, &host, original)];
    while (order && (order->generation != core->generation || order->direction != direction ||
                     order->identity != identity || !is_same(&order->source, &host) ||
                     !is_same(&order->original, original)))
        order = order->next;
    if (order && order->taken < order->places &&
        (!order->depot || (*through = depot_lease(order->depot, &spent)))) {
        order->taken++;
        order->links++;
        order->used_at = core->now;
    } else {
        order = NULL;
    }
    pthread_mutex_unlock(&core->lock);
    depot_tell(spent);
    return order;
}

/* The place that was taken is not used after all. */
void order_cancel(struct order *order)
{
    pthread_mutex_lock(&order->core->lock);
    order->taken--;
    order->links--;
    pthread_mutex_unlock(&order->core->lock);
}

/* A link is over: whether its place is the order's again. If not, it is Python's to give back. */
bool order_leave(struct order *order)
{
    struct core *core = order->core;
    pthread_mutex_lock(&core->lock);
    bool in_force = !order->revoked;
    order->taken--;
    pthread_mutex_unlock(&core->lock);
    return in_force;
}

/* From Python: `places` more. */
void order_widen(struct order *order, unsigned places)
{
    pthread_mutex_lock(&order->core->lock);
    order->places += places;
    pthread_mutex_unlock(&order->core->lock);
}

/* From Python, which has just heard of the end of `heard` of its links: nothing will speak of it any more. */
bool order_is_done(struct order *order, unsigned heard)
{
    pthread_mutex_lock(&order->core->lock);
    order->links -= heard;
    bool done = order->revoked && !order->links;
    pthread_mutex_unlock(&order->core->lock);
    return done;
}
