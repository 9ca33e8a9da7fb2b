"""Deadlines for waits on sockets, without a cancel scope each: a scope costs as much as all else that a wait does."""

import heapq
import itertools
import math
import socket

import trio


class Deadline:
    """`done` takes it back. `passed`: it came first, and the socket was shut down."""

    __slots__ = ("_sock", "passed")

    def __init__(self, sock: socket.socket) -> None:
        self._sock: socket.socket | None = sock
        self.passed = False

    def done(self) -> None:
        self._sock = None

    def _pass(self) -> None:
        sock, self._sock = self._sock, None
        if sock is not None:
            self.passed = True
            try:
                # Not sock.shutdown: that of an SSLSocket forgets its TLS, which somebody is about to use.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                pass  # the peer was faster


class Deadlines:
    """Shuts down TCP sockets whose deadline passes: whoever waits for one wakes up and finds an end of file.

    For waits after whose failure the socket is of no use. Belongs to one trio run; a system task of it runs while
    there is a deadline to wait for.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Deadline]] = []
        self._sequence = itertools.count()
        self._runs = False
        self._next = math.inf
        self._earlier = trio.Event()

    def set(self, sock: socket.socket, seconds: float) -> Deadline:
        at = trio.current_time() + seconds
        deadline = Deadline(sock)
        heapq.heappush(self._heap, (at, next(self._sequence), deadline))
        if not self._runs:
            self._runs = True
            trio.lowlevel.spawn_system_task(self._run)
        elif at < self._next:
            self._earlier.set()
        return deadline

    async def _run(self) -> None:
        try:
            while self._heap:
                self._next = self._heap[0][0]
                with trio.move_on_at(self._next):
                    await self._earlier.wait()
                self._earlier = trio.Event()
                self._pass_until(trio.current_time())
        finally:
            self._runs = False

    def _pass_until(self, now: float) -> None:
        while self._heap and (self._heap[0][0] <= now or self._heap[0][2]._sock is None):
            heapq.heappop(self._heap)[2]._pass()
