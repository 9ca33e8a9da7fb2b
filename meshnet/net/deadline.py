"""Deadlines for waits on peers, without a cancel scope each: a scope costs as much as all else that a wait does."""

import heapq
import itertools
import math
from collections.abc import Callable

import trio


class Deadline:
    """`done` takes it back. `passed`: it came first, and `shut` was called."""

    __slots__ = ("_shut", "passed")

    def __init__(self, shut: Callable[[], None]) -> None:
        self._shut: Callable[[], None] | None = shut
        self.passed = False

    @property
    def is_done(self) -> bool:
        return self._shut is None

    def done(self) -> None:
        self._shut = None

    def come(self) -> None:
        shut, self._shut = self._shut, None
        if shut is not None:
            self.passed = True
            try:
                shut()
            except OSError:
                pass  # the peer was faster


class Deadlines:
    """Shuts down connections whose deadline passes: whoever waits for one wakes up and finds an end of file.

    For waits after whose failure the connection is of no use. Belongs to one trio run; a system task of it runs while
    there is a deadline to wait for.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Deadline]] = []
        self._sequence = itertools.count()
        self._runs = False
        self._next = math.inf
        self._earlier = trio.Event()

    def set(self, shut: Callable[[], None], seconds: float) -> Deadline:
        at = trio.current_time() + seconds
        deadline = Deadline(shut)
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
        while self._heap and (self._heap[0][0] <= now or self._heap[0][2].is_done):
            heapq.heappop(self._heap)[2].come()
