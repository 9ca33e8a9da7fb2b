"""Bulk bytes between two plain sockets without a copy: splice(2) through pipes that are borrowed for as long as
something is in them.
"""

import fcntl
import os
from dataclasses import dataclass

PIPE_SIZE = 1 << 20
MAX_PIPES = 32  # a thread's; who finds none left copies. 64 of this size are what a user without privileges may have
_USEFUL_PIPE = 1 << 16
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


@dataclass(slots=True)
class Pipe:
    """`held`: bytes in it."""

    reader: int
    writer: int
    held: int = 0

    def fill(self, fd: int) -> int:
        """Moves what `fd` has into the pipe, which must be empty: full would look like dry. 0: end of stream."""
        self.held = os.splice(fd, self.writer, PIPE_SIZE, flags=_FLAGS)
        return self.held

    def drain(self, fd: int) -> int:
        """Moves what `fd` takes out of the pipe."""
        moved = os.splice(self.reader, fd, self.held, flags=_FLAGS)
        self.held -= moved
        return moved

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


class Pipes:
    """One loop's pipes, at most `most` at a time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._idle: list[Pipe] = []
        self._count = 0

    def borrow(self) -> Pipe | None:
        if self._idle:
            return self._idle.pop()
        if self._count == self._most:
            return None
        try:
            reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            size = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:  # over the user's share, see pipe(7), or no memory
            size = fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)
        pipe = Pipe(reader, writer)
        if size < _USEFUL_PIPE:
            pipe.close()
            return None
        self._count += 1
        return pipe

    def give_back(self, pipe: Pipe) -> None:
        """What a failed connection left in it is thrown away with the pipe."""
        if pipe.held:
            pipe.close()
            self._count -= 1
        else:
            self._idle.append(pipe)

    def close(self) -> None:
        for pipe in self._idle:
            pipe.close()
        self._idle = []
