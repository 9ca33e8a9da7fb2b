"""Long work in trio's thread, a little at a time."""

import time
from collections.abc import Collection, Iterable, Iterator
from typing import TypeVar

import trio

_GENTLY = 32  # items between two breaks of a thread, a few hundred microseconds of work
_BREAK = 0.0005  # seconds

T = TypeVar("T")

_SIZE = 256  # at a few microseconds an item a slice takes a millisecond; trio's other tasks may run after each


def slices(items: Collection[T]) -> Iterator[list[T]]:
    """The items there are now, whatever is added or removed meanwhile."""
    now = list(items)
    for start in range(0, len(now), _SIZE):
        yield now[start : start + _SIZE]


def taken_off(items: list[T], size: int = _SIZE) -> Iterator[list[T]]:
    """Empties the list, whatever is added to it meanwhile, and whoever else empties it."""
    while items:
        taken = items[-size:]
        del items[-size:]
        yield taken


async def let_go(items: list[object]) -> None:
    """Empties the list: of much that nobody else has, to free all at once takes milliseconds."""
    while items:
        del items[-_SIZE:]
        await trio.lowlevel.checkpoint()


def gently(items: Iterable[T]) -> Iterator[T]:
    """For a thread: trio's own goes on in its breaks, and need not take Python's lock from one that works."""
    for number, item in enumerate(items):
        if number % _GENTLY == _GENTLY - 1:
            time.sleep(_BREAK)  # noqa: TID251  # a break, which is no wait for anything
        yield item
