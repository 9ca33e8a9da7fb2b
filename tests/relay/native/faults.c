/* A program that this is preloaded into has its native relay's system calls counted, and some of them fail.
 *
 * Only of those that the library itself makes: who calls is told by the address to return to. What OpenSSL and Python
 * ask for is theirs.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
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
static atomic_uintptr_t low, high;

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *memory, size_t size);

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

/* The library's text lies there. */
void faults_watch(uintptr_t from, uintptr_t to)
{
    low = from;
    high = to;
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
    low = high = 0;
    for (size_t which = 0; which < CALLS; which++)
        codes[which] = 0;
}

/* How many there were since it was armed. */
unsigned long faults_count(const char *name)
{
    return counts[number_of(name)];
}

static bool fails(const char *name, const void *caller)
{
    uintptr_t at = (uintptr_t)caller;
    if (at < low || at >= high)
        return false;
    size_t which = number_of(name);
    unsigned long count = ++counts[which];
    if (!codes[which] || count < first[which] || count > last[which])
        return false;
    errno = codes[which];
    return true;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(type, failed, name, parameters, arguments)                                                               \
    type name parameters                                                                                              \
    {                                                                                                                 \
        static _Atomic(__typeof__(&name)) next;                                                                       \
        if (fails(#name, __builtin_return_address(0)))                                                                \
            return failed;                                                                                            \
        if (!next)                                                                                                    \
            next = NEXT(name);                                                                                        \
        return next arguments;                                                                                        \
    }

WRAP(ssize_t, -1, recv, (int fd, void *bytes, size_t size, int flags), (fd, bytes, size, flags))
WRAP(ssize_t, -1, send, (int fd, const void *bytes, size_t size, int flags), (fd, bytes, size, flags))
WRAP(ssize_t, -1, sendmsg, (int fd, const struct msghdr *message, int flags), (fd, message, flags))
WRAP(int, -1, epoll_ctl, (int epoll, int what, int fd, struct epoll_event *event), (epoll, what, fd, event))
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

/* What comes behind the command is a number or a pointer, if there is anything. */
int fcntl(int fd, int command, ...)
{
    va_list more;
    va_start(more, command);
    void *argument = va_arg(more, void *);
    va_end(more);
    return fails("fcntl", __builtin_return_address(0)) ? -1 : NEXT(fcntl)(fd, command, argument);
}

void *malloc(size_t size)
{
    return fails("malloc", __builtin_return_address(0)) ? NULL : __libc_malloc(size);
}

void *calloc(size_t count, size_t size)
{
    return fails("calloc", __builtin_return_address(0)) ? NULL : __libc_calloc(count, size);
}

void *realloc(void *memory, size_t size)
{
    return fails("realloc", __builtin_return_address(0)) ? NULL : __libc_realloc(memory, size);
}
