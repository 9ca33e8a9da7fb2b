/* A connection under an order: its endpoint is dialled here, or asked for, and the link goes on as any other.
 *
 * If the endpoint cannot be reached, Python gets the client leg back, with what has been read of it, and decides anew.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

/* Seconds, as meshnet/net/sockets.py has them, and says why. */
#define KEEPALIVE_IDLE(fd) (25 + (fd) % 11)
#define KEEPALIVE_INTERVAL(fd) (7 + (fd) % 4)
#define KEEPALIVE_COUNT 6

static bool set(int fd, int level, int option, int value)
{
    return !setsockopt(fd, level, option, &value, sizeof value);
}

static bool tune(int fd, const struct order *order)
{
    return (!order->mark || set(fd, SOL_SOCKET, SO_MARK, (int)order->mark)) &&
           set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
}

/* By its port who looks at a connection finds its endpoint leg among the sockets of this host. */
static void note_port(struct link *link, int fd)
{
    struct sockaddr_storage name;
    socklen_t size = sizeof name;
    struct address ours;
    if (!getsockname(fd, (struct sockaddr *)&name, &size) && address_of(&ours, &name))
        atomic_store(&link->leg_port, ntohs(ours.port));
}

static bool keep_alive(const struct leg *leg)
{
    int fd = leg->fd;
    return leg->tunnel || leg->closed ||
           (set(fd, SOL_SOCKET, SO_KEEPALIVE, 1) && set(fd, IPPROTO_TCP, TCP_KEEPIDLE, KEEPALIVE_IDLE(fd)) &&
            set(fd, IPPROTO_TCP, TCP_KEEPINTVL, KEEPALIVE_INTERVAL(fd)) &&
            set(fd, IPPROTO_TCP, TCP_KEEPCNT, KEEPALIVE_COUNT));
}

/* Its legs get what only a connection needs that lasts. */
void dial_settle(struct link *link)
{
    const struct leg *leg = &link->endpoint;
    if (leg->tunnel || !leg->closed)
        note_port(link, link_fd(leg));
    if (!keep_alive(&link->client) || (!link->order->local && !keep_alive(&link->endpoint)))
        link_fail(link, REASON_INTERNAL, BY_PROXY, errno);
}

/* 0, or errno. */
static int dial(struct link *link)
{
    const struct order *order = link->order;
    int fd = socket(order->target.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return errno;
    link_set_plain(&link->endpoint, fd);
    /* What is there to be sent goes with the last packet of the handshake, which it waits for then: tcp(7). */
    if (!tune(fd, order) || (link->early.size && !set(fd, IPPROTO_TCP, TCP_DEFER_ACCEPT, 1)))
        return errno;
    /* It is never connected on return, as far as it says: epoll will tell, also of what is already so. */
    if (connect(fd, (const struct sockaddr *)&order->target, order->target_size) && errno != EINPROGRESS)
        return errno;
    struct core *core = link->core;
    if (!link->client.tunnel && core_watch(core, link->client.fd, &link->client.source))
        return errno;
    return core_watch(core, fd, &link->endpoint.source) ? errno : 0;
}

/* Out of the list of those that are being dialled, if it is there. */
void dial_forget(struct link *link)
{
    if (!link->dialling_place)
        return;
    *link->dialling_place = link->next_dialling;
    if (link->next_dialling)
        link->next_dialling->dialling_place = link->dialling_place;
    link->dialling_place = NULL;
    link->endpoint.dialling = false;
}

/* What has come from a tunnel's peer since its OPEN goes to Python, as if nothing had happened. */
static void undo(struct link *link)
{
    struct tunnel *tunnel = link->client.tunnel;
    struct core *core = link->core;
    link->undone = true;
    pthread_mutex_lock(&core->lock);
    free(tunnel->inbox.bytes); /* a GOAWAY since OPEN, at most, which is in `opening` too */
    tunnel->inbox = tunnel->opening;
    tunnel->kept++;
    pthread_mutex_unlock(&core->lock);
    tunnel->opening = (struct backlog){0};
    tunnel->serving = false;
    frame_reader_free(&tunnel->frames);
    tunnel->frames = (struct frame_reader){0};
    link_end(link);
    core_tell(core, &tunnel->heard);
    core_read_on(core, tunnel);
}

/* Gives the client leg back; the endpoint leg is closed. */
static void hand_back(struct link *link, int error)
{
    link->error = error;
    link->ended.quiet = false;
    if (link->endpoint.tunnel && !link->endpoint.over)
        lease_cut(&link->endpoint);
    if (link->endpoint.fd < 0)
        link->endpoint.closed = true;
    if (link->client.tunnel) {
        undo(link);
        return;
    }
    link->handed_back = true;
    core_unwatch(link->core, link->client.fd);
    link->client.closed = true;
    link_end(link);
}

/* As new_id in meshnet/proxy/record.py, with the upper half of the counter. */
static void make_id(struct core *core, char *id)
{
    static const char alphabet[] = "0123456789abcdefghjkmnpqrstvwxyz";
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t milliseconds = (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
    uint64_t number = (milliseconds & 0x7FFFFFFF) << 9 | 0x100 | (core->numbered++ & 0xFF);
    for (int letter = 0; letter < ORDER_ID; letter++)
        id[letter] = alphabet[number >> 5 * (ORDER_ID - 1 - letter) & 31];
    memcpy(id + ORDER_ID, core->id_suffix, sizeof core->id_suffix);
}

static void begin(struct link *link, struct order *order, const struct address *source)
{
    struct core *core = order->core;
    if (!*link->id)
        make_id(core, link->id);
    link->order = order;
    link->source = *source;
    link->ended.quiet = true;
    link->begun = (struct news){.kind = NEWS_LINK_BEGUN, .owner = link, .quiet = true};
    link->endpoint.dialling = true;
    link->dial_until = core->now + order->patience;
    atomic_store(&link->opened_at, core->now);
    link_enlist(link);
    link->next_dialling = core->dialling;
    link->dialling_place = &core->dialling;
    if (core->dialling)
        core->dialling->dialling_place = &link->next_dialling;
    core->dialling = link;
    if (!core->dial_due || link->dial_until < core->dial_due)
        core->dial_due = link->dial_until;
}

/* What the client has said so far is in core->plain, and kept; the bytes. The link may have failed for it. */
size_t dial_early(struct leg *client)
{
    struct link *link = client->link;
    struct core *core = link->core;
    ssize_t size = recv(client->fd, core->plain, FRAME_MAX_DATA, 0);
    if (size < 0 && errno == EAGAIN)
        client->readable = false;
    else if (size < 0 && errno != EINTR)
        plain_fail(client, errno);
    if (size <= 0) /* an end is found again when it can be passed on */
        return 0;
    if (size < FRAME_MAX_DATA && !client->hung_up)
        client->readable = false;
    if (backlog_append(&link->early, core->plain, (size_t)size))
        return (size_t)size;
    link_fail(link, REASON_INTERNAL, BY_PROXY, ENOMEM);
    return 0;
}

/* Owns `client`, a place of the order, and the lease on `through`, if it is not NULL. False: no memory, and `client` is
 * the caller's again.
 */
bool dial_begin(struct order *order, int client, const struct address *source, struct tunnel *through)
{
    struct core *core = order->core;
    struct link *link = link_new(core);
    if (!link) {
        order_cancel(order);
        if (through)
            depot_return(through, true);
        return false;
    }
    link_set_plain(&link->client, client);
    begin(link, order, source);
    young_add(link);
    if (through) {
        link_set_tunnel(&link->endpoint, through);
        through->leg = &link->endpoint;
        ask(link);
        if (!link->over && !link->client.closed && core_watch(core, client, &link->client.source))
            link_fail(link, REASON_INTERNAL, BY_PROXY, errno);
        return true;
    }
    dial_early(&link->client);
    if (link->over)
        return true;
    int error = dial(link);
    if (error)
        hand_back(link, error);
    return true;
}

/* The endpoint will not be reached. */
void dial_failed(struct link *link, enum reason reason, int error)
{
    link->reason = reason;
    hand_back(link, error);
}

/* The endpoint is up. */
void dial_done(struct link *link)
{
    dial_forget(link);
    atomic_store(&link->connected_at, link->core->now);
    if (link->client.tunnel)
        young_add(link);
    else
        young_connected(link);
}

/* For a link whose client leg is a tunnel; as long as its application does not answer, Python does not hear of it. */
void dial_serve(struct order *order, struct link *link, const struct address *source)
{
    begin(link, order, source);
    int error = dial(link);
    if (error)
        hand_back(link, error);
}

void dial_on_event(struct leg *leg, uint32_t events)
{
    struct link *link = leg->link;
    if (events & (EPOLLERR | EPOLLHUP)) {
        int error = 0;
        socklen_t size = sizeof error;
        if (getsockopt(leg->fd, SOL_SOCKET, SO_ERROR, &error, &size))
            error = errno;
        hand_back(link, error ? error : ECONNRESET);
        return;
    }
    if (!(events & EPOLLOUT))
        return;
    dial_done(link);
    if (link->client.tunnel)
        lease_answer(&link->client);
    if (link->early.size) {
        leg->held = link->early;
        link->early = (struct backlog){0};
    }
    if (!leg->closed)
        plain_connected(leg);
    if (!leg->closed && events & (EPOLLIN | EPOLLRDHUP))
        plain_on_event(leg, events);
}

/* What has come by now counts, though nobody has been told yet: a busy host may have kept this thread waiting, and the
 * application may have accepted what would be dialled anew.
 */
static void look_once_more(struct leg *leg)
{
    struct tunnel *tunnel = leg->tunnel;
    struct pollfd seen = {.fd = link_fd(leg), .events = tunnel ? POLLIN : POLLOUT};
    if (poll(&seen, 1, 0) <= 0)
        return;
    if (tunnel)
        tunnel_on_event(tunnel, (uint32_t)seen.revents); /* as those of epoll: epoll_ctl(2) */
    else
        dial_on_event(leg, (uint32_t)seen.revents);
}

/* Those that are out of time. */
void dial_give_up(struct core *core)
{
    if (!core->dial_due || core->now < core->dial_due)
        return;
    core->dial_due = 0;
    for (struct link *link = core->dialling, *next; link; link = next) {
        next = link->next_dialling;
        if (link->dial_until <= core->now)
            look_once_more(&link->endpoint);
        if (!link->dialling_place)
            continue;
        if (link->dial_until <= core->now)
            hand_back(link, ETIMEDOUT);
        else if (!core->dial_due || link->dial_until < core->dial_due)
            core->dial_due = link->dial_until;
    }
}
