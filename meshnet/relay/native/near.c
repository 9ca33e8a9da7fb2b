/* How much of a near peer's stream may wait in the kernel to be read.
 *
 * The kernel sizes a receive buffer by what is read in a round trip, and takes the time that bytes lie in the buffer
 * for a part of the trip. So between near hosts it grows to the end of tcp_rmem, 32 MiB in recent kernels, and what is
 * copied out of it has long left every cache. Far peers need such a window; a near one only fills it.
 *
 * A connection alone is left to the kernel: while there is a window the sender sends, in its own time; later it is for
 * whoever reads, and with that opens the window, to do it. Only several push each other out of the caches.
 */
#define _GNU_SOURCE
#include "core.h"

#include <linux/tcp.h>
#include <netinet/in.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#define NEAR_US 300
#define NEAR_QUIET_NS 1000000000u /* since its last bytes: others are not beside it any more */
#define NEAR_ASKS (512 * 1024) /* the kernel makes twice as much of it: 3 GB/s at NEAR_US */

static int most_by_itself(void)
{
    int most = 0;
    FILE *file = fopen("/proc/sys/net/ipv4/tcp_rmem", "re");
    if (!file)
        return 0;
    if (fscanf(file, "%*d %*d %d", &most) != 1)
        most = 0;
    fclose(file);
    return most;
}

/* By which socket option it can be had. 0: there would be a smaller one, that never grows again, or more than the
 * kernel may give by itself.
 */
int near_option(void)
{
    static const int options[] = {SO_RCVBUFFORCE, SO_RCVBUF}; /* the first needs CAP_NET_ADMIN, or it is rmem_max */
    int probe = most_by_itself() > 2 * NEAR_ASKS ? socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0) : -1, found = 0;
    for (int which = 0; probe >= 0 && which < 2 && !found; which++) {
        int wanted = NEAR_ASKS, granted = 0;
        socklen_t size = sizeof granted;
        if (!setsockopt(probe, SOL_SOCKET, options[which], &wanted, sizeof wanted) &&
            !getsockopt(probe, SOL_SOCKET, SO_RCVBUF, &granted, &size) && granted >= 2 * NEAR_ASKS)
            found = options[which];
    }
    if (probe >= 0)
        close(probe);
    return found;
}

static bool is_quiet(const struct link *link)
{
    return link->core->now - atomic_load(&link->moved_at) > NEAR_QUIET_NS;
}

/* Before the buffer has grown, which it does with the second large read: to make it smaller the kernel would have to
 * drop what is on its way. One that has grown by small reads is left alone.
 */
void near_bound(const struct leg *leg)
{
    int fd = link_fd(leg);
    struct core *core = leg->link->core;
    struct tcp_info info = {0};
    int buffer = 0;
    socklen_t size = sizeof buffer;
    if (!core->near_option || getsockopt(fd, SOL_SOCKET, SO_RCVBUF, &buffer, &size) || buffer > 2 * NEAR_ASKS)
        return;
    buffer = NEAR_ASKS;
    size = sizeof info;
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) || info.tcpi_min_rtt >= NEAR_US)
        return;
    if (core->near_alone && core->near_alone != leg->link && !is_quiet(core->near_alone))
        setsockopt(fd, SOL_SOCKET, core->near_option, &buffer, sizeof buffer);
    else
        core->near_alone = leg->link;
}
