/* Bulk bytes between two plain sockets without a copy: splice(2) through pipes, borrowed while something is in them. */
#define _GNU_SOURCE
#include "core.h"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

static void discard(struct pipes *pipes, struct pipe *pipe)
{
    close(pipe->reader);
    close(pipe->writer);
    free(pipe);
    pipes->count--;
}

static struct pipe *make(struct pipes *pipes)
{
    int ends[2];
    struct pipe *pipe = malloc(sizeof *pipe);
    if (!pipe || pipe2(ends, O_NONBLOCK | O_CLOEXEC)) {
        free(pipe);
        return NULL;
    }
    *pipe = (struct pipe){.reader = ends[0], .writer = ends[1]};
    pipes->count++;
    if (fcntl(pipe->writer, F_SETPIPE_SZ, PIPE_SIZE) < 0 && fcntl(pipe->writer, F_GETPIPE_SZ) < PLAIN_READ) {
        discard(pipes, pipe); /* over the user's share, see pipe(7) */
        return NULL;
    }
    return pipe;
}

/* NULL: there is none left, or none worth having; copy instead. */
struct pipe *pipes_borrow(struct pipes *pipes, uint64_t now)
{
    struct pipe *pipe = pipes->idle;
    if (pipe) {
        pipes->idle = pipe->next;
        pipes->idle_count--;
        return pipe;
    }
    if (pipes->count == MAX_PIPES || now < pipes->refused_until)
        return NULL;
    pipe = make(pipes);
    if (!pipe)
        pipes->refused_until = now + PIPES_LATER_NS;
    return pipe;
}

/* What a failed link left in it is thrown away with the pipe. */
void pipes_give_back(struct pipes *pipes, struct pipe *pipe)
{
    if (pipe->held || pipes->idle_count == IDLE_PIPES) {
        discard(pipes, pipe);
        return;
    }
    pipe->next = pipes->idle;
    pipes->idle = pipe;
    pipes->idle_count++;
}

void pipes_close(struct pipes *pipes)
{
    while (pipes->idle) {
        struct pipe *pipe = pipes->idle;
        pipes->idle = pipe->next;
        discard(pipes, pipe);
    }
}
