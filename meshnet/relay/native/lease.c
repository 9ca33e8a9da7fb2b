/* A tunnel as a link's leg: each DATA frame in a TLS record of its own, FIN, RESET.
 *
 * `in_done`: the peer has ended its half of the lease. `out_done`: we have ended ours, and it has gone out.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define MAX_PIECES 64

/* Payloads of one turn, sent in one call; only the thread's one leg that is reading has any. */
static _Thread_local struct iovec pieces[MAX_PIECES];
static _Thread_local int piece_count;

static bool both_have_ended(const struct tunnel *tunnel)
{
    return tunnel->sent_end != FRAME_DATA && tunnel->received_end != FRAME_DATA;
}

/* The peer's end will not be waited for. */
void lease_cut(struct leg *leg)
{
    if (leg->over)
        return;
    leg->over = true;
    tunnel_kill(leg->tunnel);
}

static void fail(struct leg *leg, enum reason reason, int error)
{
    lease_cut(leg);
    if (leg->dialling)
        dial_failed(leg->link, reason, error);
    else
        link_fail(leg->link, reason, reason == REASON_INTERNAL ? BY_PROXY : BY_PEER_PROXY, error);
}

void lease_lost(struct leg *leg)
{
    int error = leg->tunnel->error;
    enum reason reason = link_is_gone(error) ? REASON_KEEPALIVE : REASON_TUNNEL_LOST;
    fail(leg, link_is_short(error) ? REASON_INTERNAL : reason, error);
}

/* In */

/* Hands the payloads on. */
void lease_flush_pieces(struct leg *leg)
{
    int count = piece_count;
    piece_count = 0;
    if (count && !leg->peer->closed)
        plain_write(leg->peer, pieces, count);
}

static void add_piece(struct leg *leg, const uint8_t *bytes, size_t size)
{
    if (piece_count == MAX_PIECES)
        lease_flush_pieces(leg);
    pieces[piece_count++] = (struct iovec){.iov_base = (void *)bytes, .iov_len = size};
}

static void keep_words(struct leg *leg)
{
    struct link *link = leg->link;
    struct frame_reader *frames = &leg->tunnel->frames;
    link->peer_reset = frames->control;
    link->peer_reset_size = frames->control_size;
    frames->control = NULL;
    frame_reader_free(frames);
}

/* REFUSED, to our OPEN: both halves of the lease have ended. */
static void on_refused(struct leg *leg)
{
    leg->tunnel->sent_end = leg->tunnel->received_end = FRAME_RESET;
    leg->in_done = leg->out_done = leg->over = true;
    keep_words(leg);
    if (leg->dialling)
        dial_failed(leg->link, REASON_RESET, 0);
    else
        link_settle(leg->link);
}

/* What may come in answer to an OPEN. */
static bool on_answer(struct leg *leg)
{
    struct tunnel *tunnel = leg->tunnel;
    switch (tunnel->frames.kind) {
    case FRAME_OPENED:
        tunnel->frames.asking = false;
        ask_granted(leg->link);
        return true;
    case FRAME_REFUSED:
        tunnel->frames.asking = false;
        on_refused(leg);
        return true;
    case FRAME_RESET: /* of the lease before: meshnet/tunnel/protocol.py */
        frame_reader_free(&tunnel->frames);
        bool is_first = tunnel->late_reset;
        tunnel->late_reset = false;
        return is_first;
    default:
        return false;
    }
}

/* Whether the lease goes on. */
static bool on_frame(struct leg *leg)
{
    struct tunnel *tunnel = leg->tunnel;
    uint8_t header[FRAME_HEADER];
    if (tunnel->frames.asking && tunnel->frames.kind != FRAME_PONG && tunnel->frames.kind != FRAME_GOAWAY)
        return on_answer(leg);
    switch (tunnel->frames.kind) {
    case FRAME_FIN:
        if (tunnel->received_end != FRAME_DATA)
            return false;
        tunnel->received_end = FRAME_FIN;
        leg->in_done = true;
        leg->over = leg->out_done;
        lease_flush_pieces(leg);
        link_on_fin(leg);
        return true;
    case FRAME_RESET:
        if (tunnel->received_end == FRAME_RESET)
            return false;
        tunnel->received_end = FRAME_RESET;
        leg->in_done = true;
        leg->over = leg->out_done && tunnel->sent_end != FRAME_DATA;
        keep_words(leg);
        link_fail(leg->link, REASON_RESET, BY_PEER_PROXY, 0);
        return true;
    default: /* PONG, GOAWAY: for Python, between leases */
        if (tunnel_has_full_inbox(tunnel))
            return false; /* thousands of them in one lease */
        frame_header(header, tunnel->frames.kind, 0);
        tunnel_keep(tunnel, header, sizeof header);
        return true;
    }
}

void lease_digest(struct leg *leg, const uint8_t *bytes, size_t size)
{
    struct tunnel *tunnel = leg->tunnel;
    if (tunnel->opening.size && !backlog_append(&tunnel->opening, bytes, size)) {
        fail(leg, REASON_INTERNAL, ENOMEM);
        return;
    }
    while (size && !leg->over) {
        const uint8_t *piece;
        size_t piece_size;
        if (both_have_ended(tunnel))
            break; /* what comes now is of the next lease */
        enum frame_found found = frame_next(&tunnel->frames, &bytes, &size, &piece, &piece_size);
        if (found == FRAME_NOTHING)
            return;
        if (found == FRAME_NO_MEMORY) {
            fail(leg, REASON_INTERNAL, ENOMEM);
            return;
        }
        if (found == FRAME_PIECE && tunnel->received_end == FRAME_DATA && !tunnel->frames.asking)
            add_piece(leg, piece, piece_size);
        else if (found == FRAME_PIECE || found == FRAME_BROKEN || !on_frame(leg)) {
            fail(leg, REASON_TUNNEL_PROTOCOL, 0);
            return;
        }
        if (!tunnel->leg)
            break; /* the link is over */
    }
    if (size && !tunnel->lost)
        tunnel_keep(tunnel, bytes, size);
}

/* Out */

static bool put(struct leg *leg, const uint8_t *frame, size_t size, size_t payload)
{
    struct tunnel *tunnel = leg->tunnel;
    size_t written;
    libssl.ERR_clear_error();
    if (!libssl.SSL_write_ex(tunnel->ssl, frame, size, &written)) {
        /* OpenSSL says nothing where it is our BIO that had no memory. */
        bool is_short = !libssl.ERR_get_error();
        fail(leg, is_short ? REASON_INTERNAL : REASON_TUNNEL_LOST, is_short ? ENOMEM : 0);
        return false;
    }
    if (payload && !tunnel->frames.asking) { /* what goes along with an OPEN counts when that is granted */
        size_t end = tunnel->held.size + tunnel->core->out.size;
        if (tunnel->mark_count < MAX_MARKS)
            tunnel->marks[tunnel->mark_count++] = (struct mark){.end = end, .size = payload};
        else /* two frames are counted as one */
            tunnel->marks[MAX_MARKS - 1] =
                (struct mark){.end = end, .size = tunnel->marks[MAX_MARKS - 1].size + payload};
    }
    return true;
}

/* FRAME_HEADER bytes before `bytes` are overwritten. */
void lease_write(struct leg *leg, uint8_t *bytes, size_t size)
{
    struct tunnel *tunnel = leg->tunnel;
    if (leg->over || tunnel->sent_end != FRAME_DATA)
        return;
    while (size) {
        size_t part = size < FRAME_MAX_DATA ? size : FRAME_MAX_DATA;
        frame_header(bytes - FRAME_HEADER, FRAME_DATA, part); /* over bytes that are encrypted already */
        if (!put(leg, bytes - FRAME_HEADER, part + FRAME_HEADER, part))
            return;
        bytes += part;
        size -= part;
    }
    tunnel_flush(tunnel);
}

/* Our half has ended: has it gone out? */
static void ended_out(struct leg *leg)
{
    if (leg->tunnel->held.size || leg->over)
        return;
    leg->out_done = true;
    leg->over = leg->in_done;
    link_settle(leg->link);
}

/* The peer leg has ended: FIN, behind everything that is still to go. */
void lease_finish(struct leg *leg)
{
    uint8_t frame[FRAME_HEADER];
    if (leg->over || leg->tunnel->sent_end != FRAME_DATA)
        return;
    frame_header(frame, FRAME_FIN, 0);
    leg->tunnel->sent_end = FRAME_FIN;
    if (!put(leg, frame, sizeof frame, 0))
        return;
    tunnel_flush(leg->tunnel);
    ended_out(leg);
}

/* The link has failed: RESET, which may follow FIN as long as the peer's end has not come. */
void lease_abort(struct leg *leg)
{
    struct link *link = leg->link;
    struct tunnel *tunnel = leg->tunnel;
    if (leg->over)
        return;
    if (tunnel->opening.size)
        lease_answer(leg); /* first: an OPEN is never answered by RESET */
    if (leg->over)
        return;
    if (!both_have_ended(tunnel)) {
        uint8_t frame[FRAME_HEADER + FRAME_MAX_CONTROL];
        frame_header(frame, FRAME_RESET, link->reset_size);
        if (link->reset_size)
            memcpy(frame + FRAME_HEADER, link->reset, link->reset_size);
        tunnel->sent_end = FRAME_RESET;
        leg->out_done = false;
        if (!put(leg, frame, FRAME_HEADER + link->reset_size, 0))
            return;
        tunnel_flush(tunnel);
    }
    ended_out(leg);
}

/* OPENED, to an OPEN that the core took itself. */
void lease_answer(struct leg *leg)
{
    uint8_t frame[FRAME_HEADER];
    struct tunnel *tunnel = leg->tunnel;
    free(tunnel->opening.bytes);
    tunnel->opening = (struct backlog){0};
    frame_header(frame, FRAME_OPENED, 0);
    if (put(leg, frame, sizeof frame, 0))
        tunnel_flush(tunnel);
}

/* A lease that begins with `frame`, an OPEN. To be flushed. */
void lease_ask(struct leg *leg, const uint8_t *frame, size_t size)
{
    struct tunnel *tunnel = leg->tunnel;
    tunnel->sent_end = tunnel->received_end = FRAME_DATA;
    tunnel->late_reset = tunnel->frames.asking = true;
    put(leg, frame, size, 0);
}

/* The socket has taken all there was for it. */
void lease_on_flushed(struct leg *leg)
{
    if (leg->tunnel->sent_end != FRAME_DATA)
        ended_out(leg);
    else
        link_pull(leg->peer);
}

/* Beginning and end */

/* What came behind OPEN or OPENED was handed to the link; what has come since is in the inbox. */
void lease_begin(struct leg *leg)
{
    struct tunnel *tunnel = leg->tunnel;
    struct core *core = tunnel->core;
    tunnel->leg = leg;
    piece_count = 0;
    if (tunnel->closed || tunnel->lost) {
        fail(leg, REASON_TUNNEL_LOST, tunnel->error);
        return;
    }
    if (leg->received_end == FRAME_FIN)
        link_on_fin(leg);
    if (!tunnel->leg)
        return;
    pthread_mutex_lock(&core->lock);
    struct backlog inbox = tunnel->inbox;
    tunnel->inbox = (struct backlog){0};
    pthread_mutex_unlock(&core->lock);
    if (inbox.size) {
        lease_digest(leg, inbox.bytes, inbox.size);
        lease_flush_pieces(leg);
    }
    free(inbox.bytes);
    if (tunnel->leg)
        tunnel_read(tunnel);
}

/* Python waits for the next OPEN as it waited for the one before, and need not hear of this. */
static void serve_on(struct link *link, struct tunnel *tunnel)
{
    struct core *core = tunnel->core;
    free(tunnel->opening.bytes); /* of one that failed before it was answered */
    tunnel->opening = (struct backlog){0};
    pthread_mutex_lock(&core->lock);
    tunnel->last_sent = tunnel->sent_end;
    tunnel->last_received = tunnel->received_end;
    bool has_inbox = tunnel->inbox.size > 0;
    pthread_mutex_unlock(&core->lock);
    tunnel->late_reset = tunnel->received_end == FRAME_FIN;
    if (link->reusable && !has_inbox) {
        core_read_on(core, tunnel);
        return;
    }
    tunnel->serving = false;
    core_tell(core, &tunnel->heard);
}

/* The link is over. */
void lease_end(struct leg *leg)
{
    struct tunnel *tunnel = leg->tunnel;
    piece_count = 0;
    leg->link->unread = tunnel->readable;
    leg->link->sent_end = tunnel->sent_end;
    leg->link->received_end = tunnel->received_end;
    leg->link->reusable = !tunnel->lost && both_have_ended(tunnel);
    tunnel->leg = NULL;
    tunnel->mark_count = 0;
    if (!leg->link->order || leg->link->undone)
        return;
    if (tunnel->depot)
        depot_return(tunnel, leg->link->reusable);
    else
        serve_on(leg->link, tunnel);
}
