/* Peers that are gone while bytes wait for them.
 *
 * TCP_USER_TIMEOUT would end one that only does not read as well: what a closed window holds back counts, however often
 * the peer answers (tcp(7)). So it is not set, and the kernel is asked about links on which nothing has moved for long.
 * Where no bytes wait, keepalive finds it.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/socket.h>

#define LOOKS_PER_SILENCE 6
#define PROBES 3 /* of a closed window, ever further apart, that may be lost */

enum state { NOTHING_WAITS, WAITS, GONE };

static enum state state_of(int fd, uint64_t silence)
{
    struct tcp_info info = {0};
    socklen_t size = sizeof info;
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) || (!info.tcpi_unacked && !info.tcpi_notsent_bytes))
        return NOTHING_WAITS;
    bool answers = !info.tcpi_snd_wnd && info.tcpi_probes < PROBES;
    return !answers && info.tcpi_last_ack_recv >= silence / 1000000u ? GONE : WAITS;
}

/* Whether its peer is still to be asked about. */
static bool look_at(struct leg *leg, uint64_t silence)
{
    struct tunnel *tunnel = leg->tunnel;
    if (leg->over || (tunnel ? tunnel->lost || tunnel->closed : leg->closed))
        return false;
    enum state state = state_of(link_fd(leg), silence);
    if (state == GONE) {
        if (tunnel)
            tunnel_gone(tunnel);
        else
            plain_fail(leg, ETIMEDOUT);
    }
    return state == WAITS;
}

void gone_look(struct core *core)
{
    uint64_t next_due = core->now + core->silence / LOOKS_PER_SILENCE;
    if (!core->links)
        core->gone_due = 0;
    else if (!core->gone_due)
        core->gone_due = next_due;
    if (!core->gone_due || core->now < core->gone_due)
        return;
    core->gone_due = next_due;
    for (struct link *link = core->links, *next; link; link = next) {
        next = link->next;
        uint64_t moved_at = atomic_load_explicit(&link->moved_at, memory_order_relaxed);
        if (link->failed || link->endpoint.dialling || moved_at == link->looked_at ||
            core->now - moved_at < core->silence)
            continue;
        bool waits = look_at(&link->client, core->silence);
        if (!link->failed)
            waits |= look_at(&link->endpoint, core->silence);
        if (!link->failed && !waits)
            link->looked_at = moved_at; /* nothing can wait before something has moved again */
    }
}
