/* A peer asks for a connection, through a tunnel on which Python waits for that: if an order covers it, its application
 * is dialled here.
 *
 * What no order covers is for Python, which gets all bytes as they came; so also when the application cannot be
 * reached.
 */
#define _GNU_SOURCE
#include "core.h"

#include <string.h>
#include <time.h>

/* What an OPEN asks for. */
struct open {
    struct address target, source;
    char id[MAX_ID + 1];
};

static bool is_same_host(const struct address *one, const struct address *other)
{
    return one->family == other->family && !memcmp(one->host, other->host, sizeof one->host);
}

static bool has_inbox(struct tunnel *tunnel)
{
    pthread_mutex_lock(&tunnel->core->lock);
    bool has = tunnel->inbox.size > 0;
    pthread_mutex_unlock(&tunnel->core->lock);
    return has;
}

/* Begins a link for the OPEN at the front of `bytes`, of `whole` bytes with its header. */
static bool begin(struct tunnel *tunnel, struct order *order, const struct open *open, const uint8_t *bytes,
                  size_t size, size_t whole)
{
    struct link *link = link_new(tunnel->core);
    if (!link || !backlog_append(&tunnel->opening, bytes, whole)) {
        if (link)
            link_free(link);
        order_cancel(order);
        return false;
    }
    memcpy(link->id, open->id, sizeof link->id);
    link->cipher_name = tunnel->cipher_name;
    link_set_tunnel(&link->client, tunnel);
    tunnel->leg = &link->client;
    tunnel->sent_end = tunnel->received_end = FRAME_DATA;
    tunnel->late_reset = false;
    dial_serve(order, link, &open->source);
    if (size > whole) {
        if (tunnel->leg)
            lease_digest(tunnel->leg, bytes + whole, size - whole);
        else
            tunnel_keep(tunnel, bytes + whole, size - whole); /* behind what Python has got back */
    }
    return true;
}

/* Whether it has taken all of `*bytes`; if not, the rest is for Python. Only while nobody has the lease. */
bool serve(struct tunnel *tunnel, const uint8_t **bytes, size_t *size)
{
    struct open open;
    while (*size >= FRAME_HEADER) {
        const uint8_t *header = *bytes;
        size_t payload = (size_t)header[1] << 16 | (size_t)header[2] << 8 | header[3];
        size_t whole = FRAME_HEADER + payload;
        if (payload > FRAME_MAX_CONTROL || *size < whole || has_inbox(tunnel))
            return false;
        if (header[0] == FRAME_RESET && tunnel->late_reset) { /* of the lease before: meshnet/tunnel/protocol.py */
            tunnel->late_reset = false;
            *bytes += whole;
            *size -= whole;
            continue;
        }
        if (header[0] != FRAME_OPEN || tunnel->good_until <= (uint64_t)time(NULL) ||
            !open_parse(header + FRAME_HEADER, payload, &open.target, &open.source, open.id) ||
            !is_same_host(&open.source, &tunnel->peer))
            return false;
        struct tunnel *none;
        struct order *order =
            order_take(tunnel->core, DIRECTION_SERVED, tunnel->identity, &tunnel->peer, &open.target, &none);
        return order && begin(tunnel, order, &open, *bytes, *size, whole);
    }
    return !*size;
}

/* From Python, which has seen all that has come before, and waits for an OPEN; or which takes back what it has said of
 * the peer, at any time.
 */
void tunnel_serve(struct tunnel *tunnel, const struct serving *serving)
{
    struct core *core = tunnel->core;
    tunnel->identity = serving->identity;
    tunnel->peer = serving->peer;
    tunnel->good_until = serving->good_until;
    if (tunnel->lost || tunnel->closed || tunnel->leg)
        return;
    pthread_mutex_lock(&core->lock);
    tunnel->serving = tunnel->kept == serving->kept;
    pthread_mutex_unlock(&core->lock);
    if (tunnel->serving)
        tunnel_read(tunnel);
}
