/* Tunnels to peer sidecars, and those that the core may lease by itself. */
#ifndef MESHNET_TUNNEL_H
#define MESHNET_TUNNEL_H

#include "frame.h"
#include "libssl.h"
#include "news.h"

struct core;
struct leg;
struct order;

/* Where in the backlog of a tunnel a frame ends, and how many of the application's bytes it carries. */
struct mark {
    size_t end, size;
};
#define MAX_MARKS 20

/* Belongs to a core's thread from `core_post` of its first command on; what Python may see is behind core->lock. */
struct tunnel {
    struct source source;
    struct core *core;
    SSL *ssl;
    int fd;
    bool handshaking;
    int handshake_error; /* errno of its last recv, or ENOMEM */
    bool watched;        /* by epoll, and in core->tunnels */
    struct tunnel *next, **place;
    bool readable, hung_up;
    bool looked_near; /* as a plain leg has */
    bool saying; /* for Python; so nothing is being read */
    bool closed;
    struct leg *leg; /* while leased */
    bool serving;    /* Python waits for an OPEN, which the core may answer; what follows is known of the peer: */
    int identity;
    struct address peer;
    uint64_t good_until;     /* seconds since the epoch: its certificate */
    struct backlog opening;  /* what has come since an OPEN that is not answered yet; empty: there is none */
    bool late_reset;         /* of the last lease, one may still come */
    bool has_more;           /* in core->more */
    struct tunnel *next_more;
    const uint8_t *cipher; /* just received, for OpenSSL to read */
    size_t cipher_size;
    bool bloated; /* to take a ticket, OpenSSL made itself a buffer for writing, and keeps it */
    struct backlog held; /* ciphertext */
    struct mark marks[MAX_MARKS];
    int mark_count;
    struct frame_reader frames;
    enum frame_kind sent_end, received_end; /* FRAME_FIN or FRAME_RESET once that half has ended; FRAME_DATA before */
    struct command last; /* COMMAND_CLOSE */
    struct news heard, back, gone;
    /* Set before Python is told that the handshake is over, and never again: */
    bool established;
    struct backlog certificate; /* the peer's, DER */
    const char *version, *cipher_name;
    bool resumed;
    /* Guarded by core->lock: */
    struct backlog inbox; /* decrypted bytes that no lease wanted */
    uint64_t kept;        /* how often something was put there */
    enum frame_kind last_sent, last_received; /* how the last lease under an order ended; FRAME_DATA: there was none */
    struct depot *depot;    /* in which it stands, or from which it was leased */
    struct tunnel *next_parked;
    unsigned recalls;       /* the depot's, when it was parked */
    unsigned leases;        /* since then */
    uint64_t idle_since;    /* nanoseconds, CLOCK_MONOTONIC: the end of the last of these */
    SSL_SESSION *session; /* the latest ticket that the peer gave us */
    bool lost;
    int error;               /* errno */
    long verify;             /* X509_V_ERR_* */
    unsigned long ssl_error; /* of ERR_get_error */
};

/* Tunnels to one peer, between leases, that the core may lease by itself. Guarded by core->lock. */
struct depot {
    struct core *core;
    struct tunnel *parked; /* who came last goes first, so that the others can grow old */
    unsigned count, leased, most; /* most leased since the last recall */
    unsigned recalls; /* how often Python wanted all of them back */
};

/* The payload of COMMAND_SERVE. */
struct serving {
    int identity;
    struct address peer;
    uint64_t good_until, kept;
};

/* open.c */
bool open_parse(const uint8_t *payload, size_t size, struct address *target, struct address *source, char *id);
size_t open_write(uint8_t *payload, const struct order *order, uint16_t port, const char *id);

/* depot.c */
void depot_park(struct depot *depot, struct tunnel *tunnel);
struct tunnel *depot_take(struct depot *depot);
void depot_recall(struct depot *depot);
struct tunnel *depot_lease(struct depot *depot, struct tunnel **spent);
void depot_tell(struct tunnel *spent);
void depot_return(struct tunnel *tunnel, bool reusable);

/* serve.c */
bool serve(struct tunnel *tunnel, const uint8_t **bytes, size_t *size);
void tunnel_serve(struct tunnel *tunnel, const struct serving *serving);

/* tunnel.c */
void tunnel_on_event(struct tunnel *tunnel, uint32_t events);
void tunnel_shake(struct tunnel *tunnel);
void tunnel_adopt(struct tunnel *tunnel);
void tunnel_say(struct tunnel *tunnel, const uint8_t *bytes, size_t size);
void tunnel_read(struct tunnel *tunnel);
void tunnel_flush(struct tunnel *tunnel);
void tunnel_keep(struct tunnel *tunnel, const uint8_t *bytes, size_t size);
bool tunnel_has_full_inbox(struct tunnel *tunnel);
void tunnel_kill(struct tunnel *tunnel);
void tunnel_gone(struct tunnel *tunnel);
void tunnel_abandon(struct tunnel *tunnel);
void tunnel_close(struct tunnel *tunnel);
void tunnel_free(struct tunnel *tunnel);

/* lease.c */
void lease_begin(struct leg *leg);
void lease_digest(struct leg *leg, const uint8_t *bytes, size_t size);
void lease_flush_pieces(struct leg *leg);
void lease_write(struct leg *leg, uint8_t *bytes, size_t size);
void lease_finish(struct leg *leg);
void lease_abort(struct leg *leg);
void lease_on_flushed(struct leg *leg);
void lease_lost(struct leg *leg);
void lease_cut(struct leg *leg);
void lease_end(struct leg *leg);
void lease_answer(struct leg *leg);
void lease_ask(struct leg *leg, const uint8_t *frame, size_t size);

/* tls.c */
#define TICKET_KEYS 80 /* bytes, as SSL_CTX_set_tlsext_ticket_keys wants them */
SSL_CTX *tls_context(const char *certificate, const char *key, const char *bundle, bool is_server,
                     const uint8_t *ticket_keys);
bool tls_attach(struct tunnel *tunnel, SSL_CTX *context, bool is_client, SSL_SESSION *session);
int tls_load(void);

#endif
