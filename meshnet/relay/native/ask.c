/* A connection under an order that goes through a tunnel: OPEN is said here, and the answer heard.
 *
 * What the client says meanwhile goes along, and is kept: should the peer refuse, or be gone, Python gets it back with
 * the client leg, and decides anew.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>

/* Asks for `link`, whose endpoint leg is a tunnel. The link may be over when it returns. */
void ask(struct link *link)
{
    const struct order *order = link->order;
    struct leg *leg = &link->endpoint;
    struct tunnel *tunnel = leg->tunnel;
    uint8_t frame[FRAME_HEADER + FRAME_MAX_CONTROL];
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
