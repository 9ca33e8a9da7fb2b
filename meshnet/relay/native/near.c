/* How much of a near peer's stream may wait in the kernel to be read.
 *
 * The kernel sizes a receive buffer by what is read in a round trip, and takes the time that bytes lie in the buffer
 * for a part of the trip. So between near hosts it grows to the end of tcp_rmem, 32 MiB in recent kernels, and what is
 * copied out of it has long left every cache. Far peers need such a window; a near one only fills it.
 */
#define _GNU_SOURCE
#include "core.h"

#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#define NEAR_US 300
#define NEAR_BUFFER (1024 * 1024) /* of which the kernel makes twice as much: 5 GB/s at NEAR_US */

/* Whether the kernel grants it (net.core.rmem_max), or would give a smaller one that never grows again. */
bool near_is_granted(void)
{
    int wanted = NEAR_BUFFER, granted = 0;
    socklen_t size = sizeof granted;
    int probe = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (probe < 0)
        return false;
    if (setsockopt(probe, SOL_SOCKET, SO_RCVBUF, &wanted, sizeof wanted) ||
        getsockopt(probe, SOL_SOCKET, SO_RCVBUF, &granted, &size))
        granted = 0;
    close(probe);
    return granted >= 2 * NEAR_BUFFER;
}

/* Before the buffer has grown: to shrink one, the kernel would drop what is on its way. True: there is no need to ask
 * again.
 */
bool near_bound(const struct core *core, int fd)
{
    struct tcp_info info = {0};
    socklen_t size = sizeof info;
    int buffer = NEAR_BUFFER;
    if (core->bounds_near && !getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) && info.tcpi_min_rtt < NEAR_US)
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer);
    return true;
}
