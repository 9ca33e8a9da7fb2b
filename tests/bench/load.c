/* The server and the clients of the bench: one process each, one epoll, no threads.
 *
 *   load serve PORT
 *   load rr|crr|stream|hold HOST PORT CONNECTIONS WARM SECONDS [PID...]
 *
 * rr      ping-pong of 256 bytes on CONNECTIONS that stay open
 * crr     connect, one request, its response, close; CONNECTIONS at a time
 * stream  the server sends as fast as the client takes it
 * hold    opens CONNECTIONS, a few at a time, one request each, says `held`, and keeps them until SIGTERM
 *
 * A client prints one JSON object about the SECONDS that follow WARM seconds of the same work; cpu_seconds is what the
 * processes PID used meanwhile, user and system, all threads (proc(5), stat). Every connection must end in order: the
 * client shuts its half down, the server's end comes back. Whatever else happens is an error, counted and shown.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MESSAGE = 256, CHUNK = 1 << 18, EVENTS = 256, MOST_PIDS = 16, LISTEN_BACKLOG = 4096, OPENED_AT_ONCE = 16 };
enum { ECHO = 'E', DOWNLOAD = 'D' }; /* the first byte of a connection says which service it wants */
static const double PATIENCE = 10.0; /* seconds to set up, and to end in order */
static const uint64_t LISTENER = UINT64_MAX, SIGNAL = UINT64_MAX - 1;

static int epoll;
static char message[MESSAGE], chunk[CHUNK];

static _Noreturn void serve(int port);
static int measure(int argc, char **argv);

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    for (int i = 1; i < MESSAGE; i++)
        message[i] = (char)i;
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (argc == 3 && strcmp(argv[1], "serve") == 0)
        serve(atoi(argv[2]));
    if (argc >= 7)
        return measure(argc, argv);
    fprintf(stderr, "usage: load serve PORT | load rr|crr|stream|hold HOST PORT CONNECTIONS WARM SECONDS [PID...]\n");
    return 2;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void watch(int operation, int fd, uint32_t events, uint64_t tag) {
    struct epoll_event event = {.events = events, .data.u64 = tag};
    if (epoll_ctl(epoll, operation, fd, &event) < 0)
        die("epoll_ctl");
}

static void without_delay(int fd) {
    int on = 1;
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) < 0)
        die("TCP_NODELAY");
}

/* The server. */

static bool sending[1 << 20]; /* by descriptor: this connection is a download */

static void accept_all(int listener) {
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        if ((size_t)fd >= sizeof sending)
            exit(1);
        sending[fd] = false;
        without_delay(fd);
        watch(EPOLL_CTL_ADD, fd, EPOLLIN, (uint64_t)fd);
    }
}

/* Whether the connection goes on. */
static bool answer(int fd, uint32_t events) {
    if (events & EPOLLIN) {
        ssize_t size = recv(fd, chunk, CHUNK, 0);
        if (size <= 0)
            return size < 0 && errno == EAGAIN;
        if (chunk[0] == DOWNLOAD) {
            sending[fd] = true;
            watch(EPOLL_CTL_MOD, fd, EPOLLIN | EPOLLOUT, (uint64_t)fd);
        } else if (send(fd, chunk, (size_t)size, 0) != size) {
            return false; /* messages are small: a full socket means that the client breaks the rules */
        }
    }
    if (sending[fd] && events & EPOLLOUT)
        return send(fd, chunk, CHUNK, 0) > 0 || errno == EAGAIN;
    return !(events & EPOLLERR);
}

static _Noreturn void serve(int port) {
    int on = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, LISTEN_BACKLOG) < 0)
        die("listen");
    watch(EPOLL_CTL_ADD, listener, EPOLLIN, LISTENER);
    for (;;) {
        struct epoll_event events[EVENTS];
        int count = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            if (events[i].data.u64 == LISTENER)
                accept_all(listener);
            else if (!answer((int)events[i].data.u64, events[i].events))
                close((int)events[i].data.u64);
        }
    }
}

/* The clients. */

enum work { RR, CRR, STREAM, HOLD };
enum state { CLOSED, CONNECTING, WAITING, HELD, STREAMING, ENDING };

struct connection {
    int fd;
    enum state state;
    size_t got;   /* of the response */
    double began; /* the request, or the connection itself in crr */
};

enum { FINE_BITS = 6, FINE = 1 << FINE_BITS, BUCKETS = 64 * FINE }; /* buckets are at most 1/64 wide */

static enum work work;
static struct sockaddr_in server;
static struct connection *connections;
static int wanted, begun, open_now, held, pid_count, pids[MOST_PIDS];
static bool running = true, counting;
static uint64_t units, bytes, errors, latency[BUCKETS];
static char first_error[200];

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static double cpu_seconds(void) {
    unsigned long long total = 0;
    for (int i = 0; i < pid_count; i++) {
        char path[64], text[1024] = "";
        unsigned long long user, system;
        snprintf(path, sizeof path, "/proc/%d/stat", pids[i]);
        FILE *file = fopen(path, "re");
        if (!file || !fgets(text, sizeof text, file))
            die(path);
        fclose(file);
        char *rest = strrchr(text, ')'); /* a program's name may hold anything */
        if (!rest || sscanf(rest, ") %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %llu %llu", &user, &system) != 2)
            die(path);
        total += user + system;
    }
    return (double)total / (double)sysconf(_SC_CLK_TCK);
}

static void count_latency(double seconds) {
    uint64_t nanoseconds = (uint64_t)(seconds * 1e9) | FINE;
    int shift = 63 - __builtin_clzll(nanoseconds) - FINE_BITS;
    latency[(uint64_t)shift * FINE + (nanoseconds >> shift)]++;
}

/* Microseconds. */
static double percentile(double part) {
    uint64_t total = 0, seen = 0;
    for (int i = 0; i < BUCKETS; i++)
        total += latency[i];
    for (int i = 0; i < BUCKETS; i++)
        if ((seen += latency[i]) && (double)seen >= part * (double)total) {
            int shift = i < 2 * FINE ? 0 : i / FINE - 1;
            return ((double)(i - shift * FINE) + 0.5) * (double)(1ULL << shift) / 1e3;
        }
    return 0;
}

static void finished(double since) {
    if (counting) {
        units++;
        count_latency(now() - since);
    }
}

static void forget(struct connection *connection) {
    close(connection->fd);
    connection->state = CLOSED;
    open_now--;
}

static void failed(struct connection *connection, const char *what) {
    if (!errors++)
        snprintf(first_error, sizeof first_error, "%s: %s", what, errno ? strerror(errno) : "out of order");
    forget(connection);
}

static void begin(struct connection *connection) {
    connection->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (connection->fd < 0)
        die("socket");
    without_delay(connection->fd);
    connection->state = CONNECTING;
    connection->began = now();
    open_now++;
    if (connect(connection->fd, (struct sockaddr *)&server, sizeof server) < 0 && errno != EINPROGRESS)
        failed(connection, "connect");
    else
        watch(EPOLL_CTL_ADD, connection->fd, EPOLLOUT, (uint64_t)(connection - connections));
}

static void ask(struct connection *connection) {
    connection->got = 0;
    connection->state = work == STREAM ? STREAMING : WAITING;
    if (work != CRR)
        connection->began = now();
    if (send(connection->fd, message, MESSAGE, 0) != MESSAGE)
        failed(connection, "send");
}

static void end(struct connection *connection) {
    connection->state = ENDING;
    if (shutdown(connection->fd, SHUT_WR) < 0)
        failed(connection, "shutdown");
}

static void answered(struct connection *connection) {
    if (work == RR) {
        finished(connection->began);
        if (running) {
            ask(connection);
            return;
        }
    } else if (work == HOLD && running) {
        connection->state = HELD;
        held++;
        if (begun < wanted)
            begin(&connections[begun++]);
        return;
    }
    end(connection);
}

static void ended(struct connection *connection) {
    forget(connection);
    if (work == CRR) {
        finished(connection->began);
        if (running)
            begin(connection);
    }
}

static void on_connected(struct connection *connection) {
    socklen_t length = sizeof errno;
    getsockopt(connection->fd, SOL_SOCKET, SO_ERROR, &errno, &length);
    if (errno) {
        failed(connection, "connect");
        return;
    }
    watch(EPOLL_CTL_MOD, connection->fd, EPOLLIN, (uint64_t)(connection - connections));
    ask(connection);
}

static void on_event(struct connection *connection) {
    errno = 0;
    if (connection->state == CONNECTING) {
        on_connected(connection);
        return;
    }
    ssize_t size = recv(connection->fd, chunk, CHUNK, 0);
    if (size < 0) {
        if (errno != EAGAIN)
            failed(connection, "recv");
    } else if (connection->state == ENDING && size == 0) {
        ended(connection);
    } else if (connection->state == STREAMING && size > 0) {
        bytes += counting ? (uint64_t)size : 0;
        if (!running)
            end(connection);
    } else if (connection->state == WAITING && size > 0 && connection->got + (size_t)size <= MESSAGE &&
               memcmp(chunk, message + connection->got, (size_t)size) == 0) {
        connection->got += (size_t)size;
        if (connection->got == MESSAGE)
            answered(connection);
    } else if (!(connection->state == ENDING && work == STREAM)) {
        failed(connection, size ? "wrong bytes" : "early end");
    }
}

static void work_until(double deadline, const bool *enough) {
    while (open_now && !*enough) {
        double left = deadline - now();
        if (left <= 0)
            return;
        struct epoll_event events[EVENTS];
        int count = epoll_wait(epoll, events, EVENTS, (int)(left * 1000) + 1);
        for (int i = 0; i < count; i++) {
            if (events[i].data.u64 == SIGNAL)
                running = false;
            else if (connections[events[i].data.u64].state != CLOSED)
                on_event(&connections[events[i].data.u64]);
        }
    }
}

static void hold(void) {
    static bool all_held, told;
    sigset_t asked;
    sigemptyset(&asked);
    sigaddset(&asked, SIGTERM);
    sigprocmask(SIG_BLOCK, &asked, NULL);
    watch(EPOLL_CTL_ADD, signalfd(-1, &asked, SFD_CLOEXEC), EPOLLIN, SIGNAL);
    for (double deadline = now() + 6 * PATIENCE; running && !errors && now() < deadline;) {
        work_until(now() + 0.05, &all_held);
        if (held == wanted && !told) {
            told = true;
            printf("held\n");
            fflush(stdout);
        }
    }
    units = (uint64_t)held;
}

static int measure(int argc, char **argv) {
    static const char *const names[] = {"rr", "crr", "stream", "hold"};
    static bool never;
    while (work < HOLD && strcmp(argv[1], names[work]) != 0)
        work++;
    server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[3]))};
    inet_pton(AF_INET, argv[2], &server.sin_addr);
    wanted = atoi(argv[4]);
    for (int i = 7; i < argc && pid_count < MOST_PIDS; i++)
        pids[pid_count++] = atoi(argv[i]);
    message[0] = work == STREAM ? DOWNLOAD : ECHO;
    connections = calloc((size_t)wanted, sizeof *connections);
    for (int most = work == HOLD && wanted > OPENED_AT_ONCE ? OPENED_AT_ONCE : wanted; begun < most;)
        begin(&connections[begun++]);

    double seconds = 0, cpu = 0;
    if (work == HOLD) {
        hold();
    } else {
        work_until(now() + atof(argv[5]), &never);
        double cpu_before = cpu_seconds(), started = now();
        counting = true;
        work_until(started + atof(argv[6]), &never);
        counting = false;
        seconds = now() - started;
        cpu = cpu_seconds() - cpu_before;
    }
    running = false;
    for (int i = 0; i < wanted; i++)
        if (connections[i].state == HELD)
            end(&connections[i]);
    work_until(now() + PATIENCE, &never);
    errno = 0;
    for (int i = 0; i < wanted; i++)
        if (connections[i].state != CLOSED)
            failed(&connections[i], "no end");
    printf("{\"units\":%llu,\"bytes\":%llu,\"seconds\":%.6f,\"cpu_seconds\":%.3f,\"p50_us\":%.1f,\"p99_us\":%.1f,"
           "\"errors\":%llu,\"first_error\":\"%s\"}\n",
           (unsigned long long)units, (unsigned long long)bytes, seconds, cpu, percentile(0.5), percentile(0.99),
           (unsigned long long)errors, first_error);
    return errors != 0;
}
