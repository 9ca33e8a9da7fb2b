/* A thread: its epoll, commands from Python in, news for Python out. */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

static uint64_t monotonic(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void ring(int eventfd)
{
    uint64_t one = 1;
    /* It cannot fail but by overflow, and then it rings already. */
    if (write(eventfd, &one, sizeof one) < 0)
        return;
}

static void hush(int eventfd)
{
    uint64_t count;
    if (read(eventfd, &count, sizeof count) < 0)
        return;
}

/* What a link's and a tunnel's legs need of the thread */

int core_watch(struct core *core, int fd, struct source *source)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = source};
    return epoll_ctl(core->epoll, EPOLL_CTL_ADD, fd, &event);
}

/* Before the descriptor is closed: as long as a process that was just forked has a copy of it, closing ours would not
 * end the events, epoll(7), question 6.
 */
void core_unwatch(struct core *core, int fd)
{
    epoll_ctl(core->epoll, EPOLL_CTL_DEL, fd, NULL);
}

/* When this round's events are done: who asks may be in the middle of its bytes. */
void core_read_on(struct core *core, struct tunnel *tunnel)
{
    if (tunnel->has_more)
        return;
    tunnel->has_more = true;
    tunnel->next_more = core->more;
    core->more = tunnel;
}

/* Its turn comes again at the end of this round, or in the next. */
void core_make_ready(struct core *core, struct link *link)
{
    if (link->ready)
        return;
    link->ready = true;
    link->next_ready = core->ready;
    core->ready = link;
}

/* It is cut LINGER_NS from now, unless it ends before. */
void core_linger(struct core *core, struct link *link)
{
    link->lingers = true;
    link->linger_until = core->now + LINGER_NS;
    link->next_linger = NULL;
    link->linger_place = core->last_lingering;
    *core->last_lingering = link;
    core->last_lingering = &link->next_linger;
}

void core_stop_lingering(struct core *core, struct link *link)
{
    *link->linger_place = link->next_linger;
    if (link->next_linger)
        link->next_linger->linger_place = link->linger_place;
    else
        core->last_lingering = link->linger_place;
}

/* Python hears of it when this round is over: until then what it belongs to may not go away. */
void core_tell(struct core *core, struct news *news)
{
    pthread_mutex_lock(&core->lock);
    bool told = news->told;
    news->told = true;
    pthread_mutex_unlock(&core->lock);
    if (told)
        return;
    news->next = NULL;
    *core->last_fresh = news;
    core->last_fresh = &news->next;
    core->urgent |= !news->quiet;
    if (!core->unrung++)
        core->unrung_since = core->now;
}

/* Python's side */

static void enqueue(struct core *core, struct command *command)
{
    pthread_mutex_lock(&core->lock);
    *core->last_command = command;
    core->last_command = &command->next;
    pthread_mutex_unlock(&core->lock);
    if (atomic_load(&core->asleep))
        ring(core->wake);
}

/* 0, or -1: no memory. */
int core_post(struct core *core, enum command_kind kind, void *target, const void *bytes, size_t size)
{
    struct command *command = malloc(sizeof *command);
    uint8_t *copy = size ? malloc(size) : NULL;
    if (!command || (size && !copy)) {
        free(command);
        free(copy);
        return -1;
    }
    if (size)
        memcpy(copy, bytes, size);
    *command = (struct command){.kind = kind, .target = target, .bytes = copy, .size = size};
    enqueue(core, command);
    return 0;
}

/* What ends `target`, and is asked for once: it takes no memory, so it cannot fail. */
void core_post_last(struct core *core, struct command *last, enum command_kind kind, void *target)
{
    last->kind = kind;
    last->target = target;
    last->is_last = true;
    enqueue(core, last);
}

/* What there is to tell since the last call, in order. Whoever takes them clears `told`, before looking at them.
 * `everything`: also of links that are young.
 */
struct news *core_take_news(struct core *core, bool everything)
{
    hush(core->bell);
    pthread_mutex_lock(&core->lock);
    if (everything)
        young_tell(core, core->last_told);
    struct news *news = core->told;
    core->told = NULL;
    core->last_told = &core->told;
    core->rung = false;
    pthread_mutex_unlock(&core->lock);
    return news;
}

/* Takes back what Python has not taken. Only of a core that has been closed. */
void core_forget(struct core *core, struct news *news)
{
    struct news **place = &core->told;
    while (*place && *place != news)
        place = &(*place)->next;
    if (!*place)
        return;
    *place = news->next;
    if (!*place)
        core->last_told = place;
}

/* The thread */

static void carry_out(struct command *command)
{
    switch (command->kind) {
    case COMMAND_START:
        link_start(command->target);
        break;
    case COMMAND_ABORT:
        link_abort(command->target, command->bytes, command->size);
        break;
    case COMMAND_HANDSHAKE:
        tunnel_shake(command->target);
        break;
    case COMMAND_ADOPT:
        tunnel_adopt(command->target);
        break;
    case COMMAND_SAY:
        tunnel_say(command->target, command->bytes, command->size);
        break;
    case COMMAND_READ:
        tunnel_read(command->target);
        break;
    case COMMAND_CLOSE:
        tunnel_close(command->target);
        break;
    case COMMAND_SERVE:
        tunnel_serve(command->target, (const struct serving *)command->bytes);
        break;
    case COMMAND_LISTEN:
        listener_open(command->target);
        break;
    case COMMAND_UNLISTEN:
        listener_close(command->target);
        break;
    }
    if (command->is_last) /* Python is told of it at the end of this round: it is still there */
        return;
    free(command->bytes);
    free(command);
}

/* Returns whether to go on. */
static bool obey(struct core *core)
{
    pthread_mutex_lock(&core->lock);
    struct command *commands = core->commands;
    core->commands = NULL;
    core->last_command = &core->commands;
    bool go_on = !core->stopping;
    pthread_mutex_unlock(&core->lock);
    while (commands) {
        struct command *command = commands;
        commands = command->next;
        carry_out(command);
    }
    return go_on;
}

/* Links that a budget had cut off go on. */
static void take_turns(struct core *core)
{
    struct link *ready = core->ready;
    core->ready = NULL;
    while (ready) {
        struct link *link = ready;
        ready = link->next_ready;
        link->ready = false;
        link_continue(link);
    }
}

static void read_on(struct core *core)
{
    while (core->more) {
        struct tunnel *tunnel = core->more;
        core->more = tunnel->next_more;
        tunnel->has_more = false;
        tunnel_read(tunnel);
    }
}

static void cut_lingering(struct core *core)
{
    while (core->lingering && core->lingering->linger_until <= core->now)
        link_cut(core->lingering);
}

/* Links that are over leave the list of those that are ready: when Python has been told, they are gone. */
static void drop_ended(struct core *core)
{
    for (struct link **place = &core->ready; *place;) {
        if ((*place)->over)
            *place = (*place)->next_ready;
        else
            place = &(*place)->next_ready;
    }
}

static bool bell_is_due(const struct core *core)
{
    return core->unrung &&
           (core->urgent || core->unrung >= QUIET_MOST || core->now - core->unrung_since >= QUIET_NS);
}

static void report(struct core *core)
{
    bool due = bell_is_due(core);
    if (!core->fresh && !due)
        return;
    drop_ended(core);
    pthread_mutex_lock(&core->lock);
    if (core->fresh) {
        *core->last_told = core->fresh;
        core->last_told = core->last_fresh;
    }
    bool ring_now = due && !core->rung;
    core->rung |= due;
    pthread_mutex_unlock(&core->lock);
    core->fresh = NULL;
    core->last_fresh = &core->fresh;
    if (due) {
        core->unrung = 0;
        core->urgent = false;
    }
    if (ring_now)
        ring(core->bell);
}

/* Milliseconds it may sleep: who posts a command after this look finds it asleep, and rings. */
static int patience(struct core *core)
{
    atomic_store(&core->asleep, true);
    pthread_mutex_lock(&core->lock);
    bool busy = core->commands || core->stopping;
    pthread_mutex_unlock(&core->lock);
    if (busy || core->ready)
        return 0;
    uint64_t until = UINT64_MAX;
    if (core->lingering)
        until = core->lingering->linger_until;
    if (core->dial_due && core->dial_due < until)
        until = core->dial_due;
    if (core->shared && core->look_due < until)
        until = core->look_due;
    if (core->young_due && core->young_due < until)
        until = core->young_due;
    if (core->gone_due && core->gone_due < until)
        until = core->gone_due;
    if (core->unrung && core->unrung_since + QUIET_NS < until)
        until = core->unrung_since + QUIET_NS;
    if (until == UINT64_MAX)
        return -1;
    return until <= core->now ? 0 : (int)((until - core->now) / 1000000u) + 1;
}

/* No more events will come: all connections would stand still, and nobody know. Whoever looks after the process starts
 * it again.
 */
static _Noreturn void give_up(const char *call)
{
    fprintf(stderr, "meshnet: the native relay cannot go on: %s: %s\n", call, strerror(errno));
    abort();
}

static void *run(void *argument)
{
    struct core *core = argument;
    struct epoll_event events[EVENTS_PER_ROUND];
    bool go_on = true;
    while (go_on) {
        int count = epoll_wait(core->epoll, events, EVENTS_PER_ROUND, patience(core));
        if (count < 0 && errno != EINTR)
            give_up("epoll_wait");
        atomic_store(&core->asleep, false);
        core->now = monotonic();
        for (int which = 0; which < count; which++) {
            struct source *source = events[which].data.ptr;
            if (!source)
                hush(core->wake);
            else if (source->kind == SOURCE_TUNNEL)
                tunnel_on_event((struct tunnel *)source, events[which].events);
            else if (source->kind == SOURCE_LISTENER)
                listener_on_event((struct listener *)source);
            else
                plain_on_event((struct leg *)source, events[which].events);
        }
        go_on = obey(core);
        take_turns(core);
        read_on(core);
        cut_lingering(core);
        dial_give_up(core);
        young_grow(core);
        gone_look(core);
        listeners_look(core);
        report(core);
    }
    while (core->links)
        link_cut(core->links);
    while (core->tunnels)
        tunnel_abandon(core->tunnels);
    report(core);
    return NULL;
}

int core_open(struct core *core)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    sigset_t all, before;
    core->near_option = near_option();
    core->last_fresh = &core->fresh;
    core->last_lingering = &core->lingering;
    core->last_young = &core->young;
    core->last_command = &core->commands;
    core->last_told = &core->told;
    pthread_mutex_init(&core->lock, NULL);
    uint8_t *buffers = malloc(FRAME_HEADER + PLAIN_READ + 2 * CIPHER_READ + 2 * RECORD_SIZE);
    core->epoll = epoll_create1(EPOLL_CLOEXEC);
    core->wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    core->bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (!buffers || core->epoll < 0 || core->wake < 0 || core->bell < 0 ||
        epoll_ctl(core->epoll, EPOLL_CTL_ADD, core->wake, &event))
        goto failed;
    core->plain = buffers + FRAME_HEADER;
    core->cipher = core->plain + PLAIN_READ;
    core->clear = core->cipher + CIPHER_READ;
    /* Signals are for Python's threads. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&core->thread, NULL, run, core);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!error) {
        pthread_setname_np(core->thread, core->name);
        return 0;
    }
    errno = error;
failed:;
    int reason = errno;
    int descriptors[] = {core->epoll, core->wake, core->bell};
    for (int which = 0; which < 3; which++) {
        if (descriptors[which] >= 0)
            close(descriptors[which]);
    }
    free(buffers);
    core->bell = -1;
    errno = reason;
    return -1;
}

/* Ends the thread; links still running are reset, tunnels are lost, and their news waits to be taken. Without Python's
 * lock.
 */
void core_close(struct core *core)
{
    pthread_mutex_lock(&core->lock);
    core->stopping = true;
    pthread_mutex_unlock(&core->lock);
    ring(core->wake);
    pthread_join(core->thread, NULL);
    pipes_close(&core->pipes);
    close(core->epoll);
    close(core->wake);
    free(core->plain - FRAME_HEADER);
    free(core->out.bytes);
    free(core->spare);
}
