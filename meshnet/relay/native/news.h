/* What the core's parts speak of to each other and to Python: sources of events, addresses, bytes that wait,
 * commands, news. */
#ifndef MESHNET_NEWS_H
#define MESHNET_NEWS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What epoll's events lead to. */
struct source {
    enum { SOURCE_PLAIN, SOURCE_TUNNEL, SOURCE_LISTENER } kind;
};

/* An IP address and a port as they are on the wire; an IPv4 address fills the first four bytes. No padding. */
struct address {
    uint8_t host[16];
    uint16_t port, family;
};

/* Something that Python is to hear of; see core_tell. But for NEWS_TUNNEL_HEARD it is said once, and gives back a
 * reference that the core has held: behind it, no thread touches what it belongs to. (NEWS_TUNNEL_BACK:
 * the depot's, and until it is parked again.)
 */
struct news {
    enum {
        NEWS_LINK_ENDED,
        NEWS_LINK_ABORTED,
        NEWS_LINK_BEGUN, /* under an order; and again when its endpoint is up */
        NEWS_TUNNEL_HEARD,
        NEWS_TUNNEL_BACK, /* from a depot */
        NEWS_TUNNEL_GONE,
        NEWS_ACCEPTED,
        NEWS_LISTENER_STUCK,
        NEWS_LISTENER_GONE
    } kind;
    bool quiet;  /* nobody waits for it: it may wait for others */
    void *owner; /* the link, what was accepted, or the Python object */
    bool told;   /* in a list; guarded by core->lock */
    struct news *next;
};

enum command_kind {
    COMMAND_START,
    COMMAND_ABORT,
    COMMAND_HANDSHAKE,
    COMMAND_ADOPT,
    COMMAND_SAY,
    COMMAND_READ,
    COMMAND_CLOSE,
    COMMAND_SERVE,
    COMMAND_LISTEN,
    COMMAND_UNLISTEN
};

/* From Python to a core's thread. What ends something, and must not fail, lies in that itself: `core_post_last`. */
struct command {
    enum command_kind kind;
    void *target; /* the link, the tunnel or the listener */
    uint8_t *bytes;
    size_t size;
    bool is_last;
    struct command *next;
};

/* Bytes on their way to a socket that is full. */
struct backlog {
    uint8_t *bytes;
    size_t size;
};

bool backlog_append(struct backlog *backlog, const void *bytes, size_t size);

#endif
