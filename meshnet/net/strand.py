"""Coroutines in trio's thread that are no tasks of trio, for as long as they need not wait for trio.

A connection's life waits for little, and mostly for the relay, which says by a call when it is over. As a task of trio
it would cost a task, a cancel scope's bookkeeping and a turn of the scheduler for each wait; as a strand it goes on
within the call that has the news. Before a strand awaits anything of trio's it says `await in_task()`, and is a task
from there on.
"""

import types
from collections.abc import Coroutine, Generator
from typing import Any

import trio

_NEEDS_TASK = object()

_current: "Strand | None" = None


class Strands:
    """Those of one nursery, which gets the ones that become tasks."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.running: set[Strand] = set()
        self.closed = False

    def start(self, life: Coroutine[Any, Any, None]) -> None:
        """Runs `life` up to its first wait; it must not raise."""
        strand = Strand(self, life)
        self.running.add(strand)
        strand.go_on()

    def close(self) -> None:
        """Ends all that are no tasks, where they wait, by GeneratorExit; no other is to be started."""
        self.closed = True
        for strand in list(self.running):
            strand.close()


class Strand:
    __slots__ = ("_life", "_strands", "_waits")

    def __init__(self, strands: Strands, life: Coroutine[Any, Any, None]) -> None:
        self._strands = strands
        self._life = life
        self._waits = True

    def go_on(self) -> None:
        """Until it waits again, or ends. Nothing if it was closed meanwhile."""
        global _current
        if not self._waits:
            return
        self._waits = False
        before, _current = _current, self
        try:
            trap = self._life.send(None)
            while not isinstance(trap, Wait) and trap is not _NEEDS_TASK:
                trap = self._life.throw(RuntimeError("a strand must await in_task() before it awaits trio"))
        except StopIteration:
            self._strands.running.discard(self)
            return
        finally:
            _current = before
        if isinstance(trap, Wait):
            self._waits = True
            trap.strand = self
        else:
            self._strands.running.discard(self)
            self._strands.nursery.start_soon(_finish, self._life)

    def close(self) -> None:
        self._waits = False
        self._strands.running.discard(self)
        self._life.close()


class Wait:
    """Something that happens once: `done`, called in trio's thread, lets whoever awaits it go on.

    Awaited by one strand. Tasks have trio's own means.
    """

    __slots__ = ("is_done", "strand")

    def __init__(self) -> None:
        self.is_done = False
        self.strand: Strand | None = None

    def done(self) -> None:
        self.is_done = True
        if self.strand is not None:
            self.strand.go_on()

    def __await__(self) -> Generator[Any, Any, None]:
        return self  # type: ignore[return-value] # any iterator does, and a generator is another object

    def __next__(self) -> "Wait":
        if self.is_done:
            raise StopIteration
        return self


def on_strand() -> bool:
    """Whether the caller runs on a strand, and so may await a `Wait` and nothing of trio's."""
    return _current is not None


@types.coroutine
def in_task() -> Generator[Any, Any, None]:
    """From here on the caller is a task of trio, if it was not one before."""
    if _current is not None:
        yield _NEEDS_TASK


async def _finish(life: Coroutine[Any, Any, None]) -> None:
    await _rest_of(life)


@types.coroutine
def _rest_of(life: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
    """Of a strand that is a task now: what it waits for is between it and trio."""
    answer: Any = None
    error: BaseException | None = None
    while True:
        try:
            trap = life.send(answer) if error is None else life.throw(error)
        except StopIteration:
            return
        try:
            answer, error = (yield trap), None
        except BaseException as thrown:
            answer, error = None, thrown
