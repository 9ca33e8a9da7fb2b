/* The clients: CONNECTIONS that do one kind of work, and what is said of it at the end. */
#include "load.h"

#include <arpa/inet.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>

enum work { RR, CRR, STREAM, BIDI, HOLD, SLOW, STUCK }; /* from HOLD on, they are only kept */
enum state { CLOSED, CONNECTING, WAITING, HELD, STREAMING, ENDING };
enum { OPENED_AT_ONCE = 16, SIP = 512 };
static const double PATIENCE = 10.0; /* seconds to set up, and to end in order */
static const double SIP_EVERY = 0.2;
static const uint64_t SIGNAL = UINT64_MAX;

struct connection {
    int fd;
    enum state state;
    size_t got;   /* of the response */
    double began; /* the request, or the connection itself in crr */
};

static enum work work;
static struct sockaddr_in server;
static struct connection *connections;
static int wanted, begun, open_now, held;
static bool running = true, counting;
static uint64_t units, bytes, opened, errors;
static char first_error[200];

static void begin(struct connection *connection);
static void end(struct connection *connection);
static void failed(struct connection *connection, const char *what);
static void hold(void);
static void work_until(double deadline);

int run_clients(int argc, char **argv) {
    static const char *const names[] = {"rr", "crr", "stream", "bidi", "hold", "slow", "stuck"};
    static const char services[] = {ECHO, ECHO, DOWNLOAD, BOTH_WAYS, ECHO, DOWNLOAD, DOWNLOAD};
    struct usage before = {0}, after = {0};
    double others = 0, stolen = 0;
    while (work < STUCK && strcmp(argv[1], names[work]) != 0)
        work++;
    server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[3]))};
    inet_pton(AF_INET, argv[2], &server.sin_addr);
    wanted = atoi(argv[4]);
    usage_of(argc - 7, argv + 7);
    message[0] = services[work];
    connections = calloc((size_t)wanted, sizeof *connections);
    for (int most = work >= HOLD && wanted > OPENED_AT_ONCE ? OPENED_AT_ONCE : wanted; begun < most;)
        begin(&connections[begun++]);

    if (work >= HOLD) {
        hold();
    } else {
        work_until(now() + atof(argv[5]));
        usage_now(&before);
        counting = true;
        work_until(before.at + atof(argv[6]));
        counting = false;
        usage_now(&after);
        noise_between(&before, &after, &others, &stolen);
    }
    running = false;
    for (int i = 0; i < wanted; i++)
        if (connections[i].state == HELD)
            end(&connections[i]);
    work_until(now() + (work >= HOLD ? 6 : 1) * PATIENCE);
    errno = 0;
    for (int i = 0; i < wanted; i++)
        if (connections[i].state != CLOSED)
            failed(&connections[i], "no end");
    printf("{\"units\":%llu,\"opened\":%llu,\"bytes\":%llu,\"seconds\":%.6f,\"cpu_seconds\":%.6f,\"others\":%.4f,",
           (unsigned long long)units, (unsigned long long)opened, (unsigned long long)bytes, after.at - before.at,
           after.sidecars - before.sidecars, others);
    printf("\"stolen\":%.4f,", stolen);
    printf("\"p50_us\":%.1f,\"p90_us\":%.1f,\"p99_us\":%.1f,\"p999_us\":%.1f,\"errors\":%llu,\"first_error\":\"%s\"}\n",
           percentile_us(0.5), percentile_us(0.9), percentile_us(0.99), percentile_us(0.999),
           (unsigned long long)errors, first_error);
    return errors != 0;
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
    opened++;
    open_now++;
    if (connect(connection->fd, (struct sockaddr *)&server, sizeof server) < 0 && errno != EINPROGRESS)
        failed(connection, "connect");
    else
        watch(EPOLL_CTL_ADD, connection->fd, EPOLLOUT, (uint64_t)(connection - connections));
}

static void ask(struct connection *connection) {
    connection->got = 0;
    connection->state = work == STREAM || work == BIDI ? STREAMING : WAITING;
    if (work != CRR)
        connection->began = now();
    if (send(connection->fd, message, MESSAGE, 0) != MESSAGE)
        failed(connection, "send");
}

static void end(struct connection *connection) {
    connection->state = ENDING;
    watch(EPOLL_CTL_MOD, connection->fd, EPOLLIN, (uint64_t)(connection - connections));
    if (shutdown(connection->fd, SHUT_WR) < 0)
        failed(connection, "shutdown");
}

static void keep(struct connection *connection) {
    connection->state = HELD;
    held++;
    if (begun < wanted)
        begin(&connections[begun++]);
}

static void answered(struct connection *connection) {
    if (work == RR) {
        finished(connection->began);
        if (running) {
            ask(connection);
            return;
        }
    } else if (work == HOLD && running) {
        keep(connection);
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
    uint32_t events = work == BIDI ? EPOLLIN | EPOLLOUT : EPOLLIN;
    getsockopt(connection->fd, SOL_SOCKET, SO_ERROR, &errno, &length);
    if (errno) {
        failed(connection, "connect");
        return;
    }
    watch(EPOLL_CTL_MOD, connection->fd, events, (uint64_t)(connection - connections));
    ask(connection);
}

static void on_writable(struct connection *connection) {
    ssize_t size = send(connection->fd, chunk, CHUNK, 0);
    if (size > 0)
        bytes += counting ? (uint64_t)size : 0;
    else if (errno != EAGAIN)
        failed(connection, "send");
}

static void on_readable(struct connection *connection) {
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
    } else if (!(connection->state == ENDING && message[0] != ECHO)) {
        failed(connection, size ? "wrong bytes" : "early end");
    }
}

static void on_event(struct connection *connection, uint32_t events) {
    errno = 0;
    if (connection->state == CONNECTING) {
        on_connected(connection);
        return;
    }
    if (connection->state == WAITING && work > HOLD && running && events == EPOLLIN) {
        watch(EPOLL_CTL_MOD, connection->fd, 0, (uint64_t)(connection - connections)); /* it stays unread */
        keep(connection);
        return;
    }
    if (events & ~(uint32_t)EPOLLOUT)
        on_readable(connection);
    if (events & EPOLLOUT && connection->state == STREAMING)
        on_writable(connection);
}

static void work_until(double deadline) {
    while (open_now) {
        double left = deadline - now();
        if (left <= 0)
            return;
        struct epoll_event events[EVENTS];
        int count = epoll_wait(epoll, events, EVENTS, (int)(left * 1000) + 1);
        for (int i = 0; i < count; i++) {
            if (events[i].data.u64 == SIGNAL)
                running = false;
            else if (connections[events[i].data.u64].state != CLOSED)
                on_event(&connections[events[i].data.u64], events[i].events);
        }
    }
}

/* Each of the held ones reads a little. */
static void sip(void) {
    for (int i = 0; i < wanted; i++) {
        ssize_t size = connections[i].state == HELD ? recv(connections[i].fd, chunk, SIP, 0) : 0;
        if (size > 0)
            bytes += (uint64_t)size;
        else if (connections[i].state == HELD && (size == 0 || errno != EAGAIN))
            failed(&connections[i], "sip");
    }
}

static void hold(void) {
    bool told = false;
    int before = 0;
    double sipped = now();
    sigset_t asked;
    sigemptyset(&asked);
    sigaddset(&asked, SIGTERM);
    sigprocmask(SIG_BLOCK, &asked, NULL);
    watch(EPOLL_CTL_ADD, signalfd(-1, &asked, SFD_CLOEXEC), EPOLLIN, SIGNAL);
    for (double deadline = now() + 6 * PATIENCE; running && !errors && (told || now() < deadline);) {
        work_until(now() + 0.05);
        if (held > before) {
            before = held;
            deadline = now() + 6 * PATIENCE;
        }
        if (work == SLOW && now() > sipped + SIP_EVERY) {
            sipped = now();
            sip();
        }
        if (held == wanted && !told) {
            told = true;
            printf("held\n");
            fflush(stdout);
        }
    }
    units = (uint64_t)held;
}
