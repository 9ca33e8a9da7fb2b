/* The server and the clients of the bench.
 *
 *   load serve PORT
 *   load rr|crr|stream|bidi|hold|slow|stuck HOST PORT CONNECTIONS WARM SECONDS [PID... [-- PID...]]
 *   load noise SECONDS [-- PID...]
 *   load spin
 *
 * serve   answers; of several on one port each gets its part of the connections
 * rr      ping-pong of 256 bytes on CONNECTIONS that stay open
 * crr     connect, one request, its response, close; CONNECTIONS at a time
 * stream  the server sends as fast as the client takes it, on CONNECTIONS
 * bidi    both send as fast as they can, on CONNECTIONS
 * hold    opens CONNECTIONS, a few at a time, one request each, says `held`, and keeps them until SIGTERM
 * slow    as hold, but the server sends as fast as it can; each reads 512 bytes five times a second
 * stuck   as slow, and reads nothing until SIGTERM
 * noise   says what others use of the processors
 * spin    keeps every processor we may use awake with a process of idle priority (SCHED_IDLE, sched(7)); prints their
 *         PIDs, ends with its input
 *
 * A client prints one JSON object about the SECONDS that follow WARM seconds of the same work; cpu_seconds is what the
 * processes PID used meanwhile, user and system, all threads; opened counts all connections, whenever they were begun.
 * PIDs after `--` are ours too: they are no noise. Every connection must end in order: the client shuts its half down,
 * the server's end comes back. Whatever else happens is an error, counted and shown.
 */
#include "load.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>

int epoll;
char message[MESSAGE], chunk[CHUNK];

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    for (int i = 1; i < MESSAGE; i++)
        message[i] = (char)i;
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (argc == 3 && strcmp(argv[1], "serve") == 0)
        serve(atoi(argv[2]));
    if (argc == 2 && strcmp(argv[1], "spin") == 0)
        spin();
    if (argc >= 3 && strcmp(argv[1], "noise") == 0) {
        usage_of(argc - 3, argv + 3);
        return show_noise(atof(argv[2]));
    }
    if (argc >= 7)
        return run_clients(argc, argv);
    fprintf(stderr, "usage: see the head of main.c\n");
    return 2;
}

_Noreturn void die(const char *what) {
    perror(what);
    exit(1);
}

void watch(int operation, int fd, uint32_t events, uint64_t tag) {
    struct epoll_event event = {.events = events, .data.u64 = tag};
    if (epoll_ctl(epoll, operation, fd, &event) < 0)
        die("epoll_ctl");
}

void without_delay(int fd) {
    int on = 1;
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) < 0)
        die("TCP_NODELAY");
}

double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}
