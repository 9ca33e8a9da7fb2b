/* A connection under an order that goes through a tunnel: OPEN is said here, and the answer heard.
 *
 * What the client says meanwhile goes along, and is kept: should the peer refuse, or be gone, Python gets it back with
 * the client leg, and decides anew.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

/* As new_id in meshnet/proxy/record.py, with the upper half of the counter. */
static void make_id(struct core *core, char *id)
{
    static const char alphabet[] = "0123456789abcdefghjkmnpqrstvwxyz";
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t milliseconds = (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
    uint64_t number = (milliseconds & 0x7FFFFFFF) << 9 | 0x100 | (core->asked++ & 0xFF);
    for (int letter = 0; letter < ORDER_ID; letter++)
        id[letter] = alphabet[number >> 5 * (ORDER_ID - 1 - letter) & 31];
    id[ORDER_ID] = 0;
}

/* Asks for `link`, whose endpoint leg is a tunnel. The link may be over when it returns. */
void ask(struct link *link)
{
    const struct order *order = link->order;
    struct leg *leg = &link->endpoint;
    struct tunnel *tunnel = leg->tunnel;
    uint8_t frame[FRAME_HEADER + FRAME_MAX_CONTROL];
    make_id(link->core, link->id);
    memcpy(link->id + ORDER_ID, order->id_suffix, sizeof order->id_suffix);
    /* As long as nothing is said there is no lease to end. FIN: a RESET of the lease before may still come. */
    tunnel->sent_end = tunnel->received_end = FRAME_FIN;
    leg->in_done = true;
    size_t early = dial_early(&link->client);
    if (link->over || link->failed)
        return;
    leg->in_done = false;
    link->cipher_name = tunnel->cipher_name;
    size_t size = open_write(frame + FRAME_HEADER, order, link->source.port, link->id);
    frame_header(frame, FRAME_OPEN, size);
    lease_ask(leg, frame, FRAME_HEADER + size);
    if (early && !link->over)
        lease_write(leg, link->core->plain, early);
    else if (!link->over)
        tunnel_flush(tunnel);
}

/* While the answer is due: what the client says now, once. */
void ask_along(struct leg *client)
{
    struct link *link = client->link;
    size_t size = link->early.size ? 0 : dial_early(client);
    if (size)
        lease_write(&link->endpoint, link->core->plain, size);
}

/* OPENED has come. */
void ask_granted(struct link *link)
{
    if (!link->endpoint.dialling)
        return; /* nobody waits for it any more */
    if (link->early.size)
        link_count(&link->endpoint, link->early.size);
    free(link->early.bytes);
    link->early = (struct backlog){0};
    dial_done(link);
    core_make_ready(link->core, link);
}
