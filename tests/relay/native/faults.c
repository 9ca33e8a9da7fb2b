/* The native relay's own system calls, counted, and some of them failing.
 *
 * It is linked together with the relay, whose calls the linker gives to those below (ld's --wrap, builds.py): what
 * OpenSSL and Python ask for is theirs, and a sanitizer still sees every call that goes through.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

static const char *const names[] = {"recv",          "send",        "sendmsg",    "epoll_ctl",  "epoll_wait",
                                    "epoll_create1", "eventfd",     "shutdown",   "accept4",    "splice",
                                    "pipe2",         "fcntl",       "socket",     "connect",    "setsockopt",
                                    "getsockopt",    "getsockname", "malloc",     "calloc",     "realloc",
                                    "pthread_create"};
#define CALLS (sizeof names / sizeof *names)
static atomic_ulong counts[CALLS], first[CALLS], last[CALLS];
static atomic_int codes[CALLS];

static size_t number_of(const char *name)
{
    for (size_t which = 0; which < CALLS; which++) {
        if (!strcmp(names[which], name))
            return which;
    }
    abort();
}

/* All those that can be made to fail, from 0 on; NULL behind the last. */
const char *faults_name(unsigned long which)
{
    return which < CALLS ? names[which] : NULL;
}

/* Of the calls from now on the `from`th to the `to`th fail with `code`; 0: none does. */
void faults_arm(const char *name, unsigned long from, unsigned long to, int code)
{
    size_t which = number_of(name);
    codes[which] = 0;
    counts[which] = 0;
    first[which] = from;
    last[which] = to;
    codes[which] = code;
}

/* All calls are as they are without this. */
void faults_forget(void)
{
    for (size_t which = 0; which < CALLS; which++)
        codes[which] = 0;
}

/* How many there were since it was armed. */
unsigned long faults_count(const char *name)
{
    return counts[number_of(name)];
}

static bool fails(const char *name)
{
    size_t which = number_of(name);
    unsigned long count = ++counts[which];
    if (!codes[which] || count < first[which] || count > last[which])
        return false;
    errno = codes[which];
    return true;
}

#define WRAP(type, failed, name, parameters, arguments)                                                               \
    extern type __real_##name parameters;                                                                             \
    extern type __wrap_##name parameters;                                                                             \
    type __wrap_##name parameters                                                                                     \
    {                                                                                                                 \
        return fails(#name) ? failed : __real_##name arguments;                                                       \
    }

WRAP(ssize_t, -1, recv, (int fd, void *bytes, size_t size, int flags), (fd, bytes, size, flags))
WRAP(ssize_t, -1, send, (int fd, const void *bytes, size_t size, int flags), (fd, bytes, size, flags))
WRAP(ssize_t, -1, sendmsg, (int fd, const struct msghdr *message, int flags), (fd, message, flags))
WRAP(int, -1, epoll_wait, (int epoll, struct epoll_event *events, int most, int timeout),
     (epoll, events, most, timeout))
WRAP(int, -1, epoll_create1, (int flags), (flags))
WRAP(int, -1, eventfd, (unsigned count, int flags), (count, flags))
WRAP(int, -1, shutdown, (int fd, int how), (fd, how))
WRAP(int, -1, accept4, (int fd, struct sockaddr *peer, socklen_t *size, int flags), (fd, peer, size, flags))
WRAP(ssize_t, -1, splice, (int from, off64_t *at, int to, off64_t *there, size_t size, unsigned flags),
     (from, at, to, there, size, flags))
WRAP(int, -1, pipe2, (int ends[2], int flags), (ends, flags))
WRAP(int, -1, socket, (int family, int type, int protocol), (family, type, protocol))
WRAP(int, -1, connect, (int fd, const struct sockaddr *address, socklen_t size), (fd, address, size))
WRAP(int, -1, setsockopt, (int fd, int level, int option, const void *value, socklen_t size),
     (fd, level, option, value, size))

WRAP(int, -1, getsockopt, (int fd, int level, int option, void *value, socklen_t *size),
     (fd, level, option, value, size))
WRAP(int, -1, getsockname, (int fd, struct sockaddr *name, socklen_t *size), (fd, name, size))
/* It returns its error, and leaves errno alone. */
static int returned(void)
{
    int error = errno;
    errno = 0;
    return error;
}

WRAP(int, returned(), pthread_create,
     (pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument),
     (thread, attributes, run, argument))

WRAP(void *, NULL, malloc, (size_t size), (size))
WRAP(void *, NULL, calloc, (size_t count, size_t size), (count, size))
WRAP(void *, NULL, realloc, (void *memory, size_t size), (memory, size))

extern int __real_epoll_ctl(int epoll, int what, int fd, struct epoll_event *event);
extern int __wrap_epoll_ctl(int epoll, int what, int fd, struct epoll_event *event);

/* To take out what is in fails on no kernel (epoll_ctl(2)), and what is over would go on being told of. */
int __wrap_epoll_ctl(int epoll, int what, int fd, struct epoll_event *event)
{
    return what != EPOLL_CTL_DEL && fails("epoll_ctl") ? -1 : __real_epoll_ctl(epoll, what, fd, event);
}

extern int __real_fcntl(int fd, int command, ...);
extern int __wrap_fcntl(int fd, int command, ...);

/* What comes behind the command is a number or a pointer, if there is anything. */
int __wrap_fcntl(int fd, int command, ...)
{
    va_list more;
    va_start(more, command);
    void *argument = va_arg(more, void *);
    va_end(more);
    return fails("fcntl") ? -1 : __real_fcntl(fd, command, argument);
}
