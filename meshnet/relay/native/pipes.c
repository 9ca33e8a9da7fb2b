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

/* NULL: there is none left, or none worth having; copy instead. */
struct pipe *pipes_borrow(struct pipes *pipes)
{
    struct pipe *pipe = pipes->idle;
    if (pipe) {
        pipes->idle = pipe->next;
        return pipe;
    }
    int ends[2];
    if (pipes->count == MAX_PIPES || !(pipe = malloc(sizeof *pipe)))
        return NULL;
    if (pipe2(ends, O_NONBLOCK | O_CLOEXEC)) {
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

/* What a failed link left in it is thrown away with the pipe. */
void pipes_give_back(struct pipes *pipes, struct pipe *pipe)
{
    if (pipe->held) {
        discard(pipes, pipe);
        return;
    }
    pipe->next = pipes->idle;
    pipes->idle = pipe;
}

void pipes_close(struct pipes *pipes)
{
    while (pipes->idle) {
        struct pipe *pipe = pipes->idle;
        pipes->idle = pipe->next;
        discard(pipes, pipe);
    }
}
