/* The server: echoes, sends, or sends and takes, as the first byte of each connection asks. */
#include "load.h"

#include <arpa/inet.h>
#include <sys/epoll.h>
#include <sys/socket.h>

enum { LISTEN_BACKLOG = 4096, MOST_DESCRIPTORS = 1 << 20 };
static const uint64_t LISTENER = UINT64_MAX;

static char service[MOST_DESCRIPTORS]; /* by descriptor; 0 until the first byte came */

static void accept_all(int listener);
static bool answer(int fd, uint32_t events);

_Noreturn void serve(int port) {
    int on = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(listener, SOL_SOCKET, SO_REUSEPORT, &on, sizeof on);
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

static void accept_all(int listener) {
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        if (fd >= MOST_DESCRIPTORS)
            exit(1);
        service[fd] = 0;
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
        if (!service[fd]) {
            service[fd] = chunk[0];
            if (service[fd] != ECHO)
                watch(EPOLL_CTL_MOD, fd, EPOLLIN | EPOLLOUT, (uint64_t)fd);
        }
        /* Messages are small: a full socket means that the client breaks the rules. */
        if (service[fd] == ECHO && send(fd, chunk, (size_t)size, 0) != size)
            return false;
    }
    if (service[fd] != ECHO && events & EPOLLOUT)
        return send(fd, chunk, CHUNK, 0) > 0 || errno == EAGAIN;
    return !(events & EPOLLERR);
}
