/* The native relay: threads with an epoll each that move bytes and never hold Python's lock.
 *
 *   module.c      what Python sees: Core and Link
 *   handles.c     and for tunnels: Context, Session, Tunnel
 *   doors.c       and for what it accepts by itself: Listener, Order
 *   depots.c      and for tunnels that it may lease by itself: Depot
 *   core.c        a thread: its epoll, commands in, news out
 *   listen.c      connections come in: the ones that no order covers are for Python
 *   passed.c      and for connections under an order that came and went well: many at a time
 *   lines.c       which it writes into the access log's lines
 *   order.c       what Python has decided about all connections of a kind, until it takes that back
 *   dial.c        a connection under an order: its endpoint is dialled here
 *   young.c       when Python hears of it, if it lives that long
 *   ask.c         or asked for through a tunnel
 *   depot.c       of those that Python has parked for that
 *   serve.c       so also one that a peer asks for through a tunnel
 *   link.c        the life of a link: two FINs or the first failure end it, and it is reported once
 *   plain.c       a plain TCP leg: one recv and one send a message, splice when there is much
 *   pipes.c       the pipes for splice
 *   near.c        how much of a near peer's stream may wait in the kernel
 *   tunnel.c      a tunnel: its handshake, what comes between leases, what goes out
 *   lease.c       a tunnel as a link's leg: DATA, FIN and RESET
 *   tls.c         OpenSSL's part of a tunnel: contexts, and a BIO that costs no system call
 *   frame.c       the frames of a lease, taken apart
 *   open.c        so also an OPEN, and put together
 *   libssl.c      finds OpenSSL
 *
 * It decides nothing: who may talk to whom is settled before a link gets here, or by an order that Python has given
 * for exactly such connections, and no tunnel carries a lease before Python has looked at its peer's certificate.
 */
#ifndef MESHNET_CORE_H
#define MESHNET_CORE_H

#include "tunnel.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define PLAIN_READ (16 * FRAME_MAX_DATA) /* what one recv of a plain leg takes at most: sixteen full records */
#define CIPHER_READ (256 * 1024)        /* the same of a tunnel; every call saved counts there */
#define RECORD_SIZE (16 * 1024)
#define PIPE_SIZE (1024 * 1024)
#define MAX_PIPES 32 /* who finds none left copies; a user without privileges may have 64 of this size, pipe(7) */
#define IDLE_PIPES 4 /* kept for the next; who has the same user may want the rest */
#define PIPES_LATER_NS 1000000000u /* after a refusal */
#define EVENTS_PER_ROUND 64
#define MAX_INBOX (64 * 1024) /* bytes that wait for Python before a tunnel is read no further */
#define MAX_HELD (1024 * 1024) /* the same of bytes that wait for a peer who makes us answer, and does not read */
#define LINGER_NS 1000000000u /* a lease may still wait for the end that the tunnel's peer owes */
#define YOUNG_NS 50000000u    /* what is over by then has never been told as open */
#define QUIET_NS 20000000u    /* news that nobody waits for may wait for more of its kind */
#define QUIET_MOST 256        /* until there are so many */
#define ORDER_BUCKETS 1024
#define DIRECTION_SERVED 2    /* of orders for what peers ask for; listeners have others */
#define ORDER_ID 8            /* letters of an id that the core makes, without the suffix */
#define MAX_ID 15             /* letters of a connection's id; a longer one is for Python */
#define LOOK_NS 1000000000u   /* who was woken for a connection may have died before it accepted */

/* Keep in step with REASONS and ENDED_BY in reasons.py. */
enum reason {
    REASON_OK,
    REASON_ABORTED,
    REASON_PEER_RST,
    REASON_KEEPALIVE,
    REASON_INTERNAL,
    REASON_TUNNEL_LOST,
    REASON_TUNNEL_PROTOCOL,
    REASON_RESET, /* by the peer sidecar, which says why */
    REASONS
};
enum ended_by { BY_CLIENT, BY_SERVER, BY_PROXY, BY_PEER_PROXY };

struct link;

/* Filled by splice from one socket, drained by splice into another. `held`: bytes in it. */
struct pipe {
    int reader, writer;
    size_t held;
    struct pipe *next;
};

struct pipes {
    struct pipe *idle;
    int count, idle_count;
    uint64_t refused_until; /* nanoseconds, CLOCK_MONOTONIC */
};

/* A listening socket. Belongs to the core's thread from `listener_open` on. */
struct listener {
    struct source source;
    struct core *core;
    int fd;
    int direction;
    bool shared; /* with other processes */
    bool watched;
    struct listener *next, **place; /* in core->shared while it is watched, if it is shared */
    int error; /* errno, when it is stuck */
    struct command last; /* COMMAND_UNLISTEN */
    struct news stuck, gone;
};

/* A connection that no order covers. */
struct accepted {
    int fd;
    struct address source;
    struct listener *listener;
    struct news news;
};

/* Connections from `source` (whatever its port) that were going to `original` are dialled to `target`. */
struct order {
    struct core *core;
    int direction;
    int identity; /* of the peer that asks, as Python numbers them; 0: nobody's */
    struct address source, original;
    struct sockaddr_storage target;
    socklen_t target_size;
    uint32_t mark;     /* SO_MARK of the endpoint leg, if not 0 */
    bool local;        /* the endpoint is on this host, where nobody vanishes without a word */
    uint64_t patience; /* nanoseconds for the endpoint to answer */
    struct depot *depot; /* the endpoint is reached through one of these tunnels; NULL: it is dialled */
    struct backlog opening[3]; /* what an OPEN says before, between and behind the source's port and the id */
    void *object;      /* the Python one, which lives until `order_is_done` */
    /* Guarded by core->lock: */
    bool revoked;
    unsigned generation; /* in force only as long as it is the core's */
    unsigned places, taken; /* how many links it may have at once, and how many of these are in use */
    unsigned links;         /* that Python has not heard the end of */
    uint64_t used_at;
    struct order *next; /* in its bucket */
};

/* One side of a link. Belongs to the core's thread from the link's start on. */
struct leg {
    struct source source; /* of a plain leg */
    struct link *link;
    struct leg *peer;
    struct tunnel *tunnel; /* NULL: a plain leg */
    int fd;                /* of a plain leg */
    enum ended_by who;
    enum frame_kind received_end; /* of a tunnel leg: how its peer had ended before the link was made, or FRAME_DATA */
    bool in_done;  /* its FIN has come */
    bool out_done; /* our FIN has gone out, behind all bytes */
    bool over;     /* nothing is left to do here, should the link have failed */
    /* Of a plain leg: */
    bool readable; /* epoll said so, and no read has found it empty since (edge-triggered) */
    bool hung_up;  /* epoll said that more than bytes is there to read: a FIN, an error */
    bool fin_due;  /* the peer has ended: FIN behind what is held */
    bool closed;
    bool dialling; /* its handshake is under way: nothing can be sent yet */
    bool bulk; /* reads fill the buffer: splice */
    bool looked_near; /* whether its receive buffer is to be bounded: near.c */
    struct backlog held;
    struct pipe *pipe; /* the same, of a bulk stream; never both */
};

struct link {
    struct core *core;
    void *object; /* the Python one, if there is one */
    struct leg client, endpoint;
    /* Read by Python at any time. Bytes handed to the next socket; moved_at: nanoseconds, CLOCK_MONOTONIC. */
    _Atomic uint64_t sent, received, moved_at;
    uint64_t looked_at; /* what `moved_at` was when nothing waited at either leg */
    _Atomic bool client_done, endpoint_done;
    bool over;
    bool failed;
    enum reason reason;
    enum ended_by ended_by;
    int error;                /* errno of the failure, or 0 */
    bool lingers;
    bool reusable;            /* the tunnel leg is between leases again */
    enum frame_kind sent_end, received_end; /* how its lease has ended */
    bool unread;              /* the tunnel leg's socket may have more: see COMMAND_READ */
    const uint8_t *reset;     /* the payload of our RESET frame, should we send one */
    size_t reset_size;
    uint8_t *own_reset;       /* the same, when Python chose it */
    uint8_t *peer_reset;      /* the payload of the peer's */
    size_t peer_reset_size;
    bool ready;               /* in core->ready */
    struct link *next_ready;  /* links that a read budget has cut off */
    uint64_t linger_until;
    /* In core->lingering, in the order of `linger_until`, and in core->links. `place`: the pointer that leads here. */
    struct link *next_linger, **linger_place;
    struct link *next, **place;
    struct command last; /* COMMAND_ABORT */
    struct news ended, aborted;
    /* Of a link under an order: */
    struct order *order;
    struct address source;
    char id[MAX_ID + 1];     /* that comes or goes with its OPEN, or is made here */
    const char *cipher_name; /* of the tunnel, or NULL */
    bool undone;             /* Python has got everything back as it came, and begins anew */
    /* Nanoseconds, CLOCK_MONOTONIC, and 0 before it is so; read by Python at any time. */
    _Atomic uint64_t opened_at, connected_at, ended_at;
    _Atomic uint16_t leg_port; /* ours of the endpoint leg; 0 until `dial_settle`. Read by Python at any time */
    uint64_t dial_until;
    struct link *next_dialling, **dialling_place; /* in core->dialling while it dials */
    struct backlog early; /* what the client has said, until it is known that the endpoint can be reached */
    bool handed_back; /* the endpoint could not be reached (`error`): the client leg is Python's */
    bool owes;        /* the order was revoked before the link ended: its place is still to be given back */
    struct news begun;
    /* Guarded by core->lock: */
    bool known; /* Python has heard of it, or is about to */
    uint64_t young_until;
    struct link *next_young, **young_place; /* in core->young, in the order of `young_until` */
};

struct core {
    pthread_t thread;
    char name[16]; /* as tools show the thread: pthread_setname_np(3) */
    char id_suffix[MAX_ID - ORDER_ID + 1]; /* of the ids that are made here */
    int epoll, wake, bell; /* eventfds: commands wait; news wait */
    uint8_t *plain;        /* PLAIN_READ bytes, with room for the first frame's header before them */
    uint8_t *cipher;       /* CIPHER_READ */
    uint8_t *clear;        /* what CIPHER_READ may decrypt to */
    struct backlog out;    /* what OpenSSL has made for the tunnel at hand; empty before another's turn */
    size_t out_room;
    uint64_t now;
    struct pipes pipes;
    int near_option; /* that bounds receive buffers, or 0: near.c */
    const struct link *near_alone; /* the one that it does not bound, or NULL */
    struct link *links;
    struct tunnel *tunnels;
    struct link *ready;
    struct tunnel *more; /* to be read on, when this round's events are done */
    struct link *lingering, **last_lingering;
    struct accepted *spare; /* for the next connection that is handed over */
    struct listener *shared;
    uint64_t look_due; /* when they are looked at next */
    uint64_t young_due; /* when the first of the young may be so no more; 0: there is none */
    struct link *dialling;
    uint64_t dial_due;                /* when the first of them may be out of time; 0: none */
    uint64_t silence;                 /* nanoseconds without an answer after which a peer is gone */
    uint64_t gone_due;                /* when links are looked at next for peers that are; 0: there are no links */
    struct news *fresh, **last_fresh; /* of this round */
    unsigned numbered;                /* ids made so far */
    unsigned unrung;                  /* news since the bell was last rung */
    uint64_t unrung_since;
    bool urgent;                      /* somebody waits for one of them */
    struct backlog resets[REASONS];   /* payloads of RESET frames, by reason */

    pthread_mutex_t lock; /* guards what follows */
    struct command *commands, **last_command;
    struct news *told, **last_told;
    bool rung;
    struct link *young, **last_young;
    struct order *orders[ORDER_BUCKETS];
    unsigned generation; /* of those in force: grows when all are suspended */
    bool stopping;
    _Atomic bool asleep; /* only then does a command need to wake it */
};

/* core.c */
/* `core->resets` and `core->silence` are set before. 0, or -1 with errno. */
int core_open(struct core *core);
void core_close(struct core *core);
int core_post(struct core *core, enum command_kind kind, void *target, const void *bytes, size_t size);
void core_post_last(struct core *core, struct command *last, enum command_kind kind, void *target);
struct news *core_take_news(struct core *core, bool everything);
void core_forget(struct core *core, struct news *news);
void core_tell(struct core *core, struct news *news);
int core_watch(struct core *core, int fd, struct source *source);
void core_unwatch(struct core *core, int fd);
void core_read_on(struct core *core, struct tunnel *tunnel);
void core_make_ready(struct core *core, struct link *link);
void core_linger(struct core *core, struct link *link);
void core_stop_lingering(struct core *core, struct link *link);

/* listen.c */
void listener_open(struct listener *listener);
void listener_on_event(struct listener *listener);
void listener_close(struct listener *listener);
void listeners_look(struct core *core);

/* order.c */
void order_add(struct order *order);
struct order *order_take(struct core *core, int direction, int identity, const struct address *source,
                         const struct address *original, struct tunnel **through);
void order_cancel(struct order *order);
bool order_leave(struct order *order);
void orders_suspend(struct core *core);
bool order_revoke(struct order *order, unsigned *unused);
void order_widen(struct order *order, unsigned places);
bool order_is_done(struct order *order, unsigned heard);
bool address_of(struct address *address, const struct sockaddr_storage *from);

/* dial.c */
bool dial_begin(struct order *order, int client, const struct address *source, struct tunnel *through);
void dial_serve(struct order *order, struct link *link, const struct address *source);
void dial_on_event(struct leg *leg, uint32_t events);
void dial_forget(struct link *link);
void dial_done(struct link *link);
void dial_failed(struct link *link, enum reason reason, int error);
size_t dial_early(struct leg *client);
void dial_settle(struct link *link);
void dial_give_up(struct core *core);

/* young.c */
void young_add(struct link *link);
void young_forget(struct link *link);
void young_connected(struct link *link);
void young_grow(struct core *core);
void young_tell(struct core *core, struct news **last);

/* gone.c */
void gone_look(struct core *core);

/* ask.c */
void ask(struct link *link);
void ask_along(struct leg *client);
void ask_granted(struct link *link);

/* link.c */
struct link *link_new(struct core *core);
void link_enlist(struct link *link);
void link_set_plain(struct leg *leg, int fd);
void link_set_tunnel(struct leg *leg, struct tunnel *tunnel);
void link_start(struct link *link);
void link_abort(struct link *link, uint8_t *reset, size_t size);
void link_free(struct link *link);
void link_end(struct link *link);
void link_continue(struct link *link);
void link_on_fin(struct leg *leg);
void link_fail(struct link *link, enum reason reason, enum ended_by who, int error);
bool link_is_short(int error);
bool link_is_gone(int error);
void link_settle(struct link *link);
void link_cut(struct link *link);
void link_count(struct leg *leg, size_t size);
bool link_is_full(const struct leg *leg);
int link_fd(const struct leg *leg); /* its own, or its tunnel's */
void link_pull(struct leg *leg);

/* plain.c */
void plain_on_event(struct leg *leg, uint32_t events);
void plain_pull(struct leg *leg);
void plain_write(struct leg *leg, struct iovec *pieces, int count);
void plain_finish(struct leg *leg);
void plain_connected(struct leg *leg);
void plain_reset(struct leg *leg);
void plain_fail(struct leg *leg, int error);
void plain_close(struct leg *leg);

/* pipes.c */
struct pipe *pipes_borrow(struct pipes *pipes, uint64_t now);
void pipes_give_back(struct pipes *pipes, struct pipe *pipe);
void pipes_close(struct pipes *pipes);

/* near.c */
#define NEAR_READ (32 * 1024) /* bytes that make it worth a look */
int near_option(void);
void near_bound(const struct leg *leg);

#endif
