"""Long work in trio's thread, a little at a time."""

from collections.abc import Collection, Iterator
from typing import TypeVar

import trio

T = TypeVar("T")

_SIZE = 256  # at a few microseconds an item a slice takes a millisecond; trio's other tasks may run after each


def slices(items: Collection[T]) -> Iterator[list[T]]:
    """The items there are now, whatever is added or removed meanwhile."""
    now = list(items)
    for start in range(0, len(now), _SIZE):
        yield now[start : start + _SIZE]


async def let_go(items: list[object]) -> None:
    """Empties the list: of much that nobody else has, to free all at once takes milliseconds."""
    while items:
        del items[-_SIZE:]
        await trio.lowlevel.checkpoint()
