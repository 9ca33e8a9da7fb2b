"""The connections that have ended, as far back as there is memory for them: what failed is forgotten last."""

from collections import deque
from collections.abc import Iterator
from heapq import merge
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

from meshnet.model.connection import Connection
from meshnet.proxy.packed import Ended, Packed, Segment

_BATCH = 32  # that have just ended, and are not packed yet: a fraction of a millisecond of work

Cursor = tuple[int, int]
"""A segment of those that ended well, and one of those that failed, by number: what came before is meant."""


class Page(NamedTuple):
    """A full segment, when its last connection ended (seconds since the epoch), and where to go on from."""

    packed: Packed
    last: float
    cursor: Cursor


class Past:
    """`most`: about how many bytes it may take. What ended well and what failed have half of it each, and what the
    other does not need: so a storm of failures does not take the place of everything, nor does a busy host that of a
    failure.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.well, self.failed = _Side(), _Side()

    def keep(self, ended: Ended, count: int = 1) -> None:
        """`count`: how many connections that is."""
        side = self.failed if ended.failed else self.well
        side.fresh.append(ended)
        side.waiting += count
        if side.waiting >= _BATCH:
            side.pack()
            while self.well.size + self.failed.size > self._most:
                (self.failed if self.failed.size > self._most // 2 else self.well).forget()

    def newest(self, *, well: bool) -> tuple[Iterator[Connection], Cursor]:
        """What is in no full segment, in the order in which we heard of it: what failed, and if `well` the others."""
        sides = [self.failed, self.well] if well else [self.failed]
        views = merge(*(side.newest() for side in sides), key=attrgetter("closed_at"))
        return views, (self.well.open_number if well else 0, self.failed.open_number)

    def page(self, cursor: Cursor) -> Page | None:
        """The full segment before `cursor` that ended last; None if there is none."""
        well, failed = self.well.before(cursor[0]), self.failed.before(cursor[1])
        if well is not None and (failed is None or well.last >= failed.last):
            return Page(well.packed(), well.last, (cursor[0] - 1, cursor[1]))
        return None if failed is None else Page(failed.packed(), failed.last, (cursor[0], cursor[1] - 1))

    def full(self) -> list[Packed]:
        """All full segments, for a thread to look through, in no order."""
        return [each.packed() for side in (self.failed, self.well) for each in side.segments if each.is_full]


class _Side:
    """`forgotten`: how many are; `since`: when the last of these ended, in seconds since the epoch. `size` in bytes;
    `waiting`: how many are `fresh`.
    """

    def __init__(self) -> None:
        self.fresh: list[Ended] = []
        self.segments: deque[Segment] = deque()
        self.size = self.forgotten = self.waiting = 0
        self.since = 0.0
        self._first = 1  # the number of the oldest segment

    @property
    def open_number(self) -> int:
        """Of the segment that grows, or of the next one."""
        end = self._first + len(self.segments)
        return end if not self.segments or self.segments[-1].is_full else end - 1

    def pack(self) -> None:
        if not self.segments or self.segments[-1].is_full:
            self.segments.append(Segment())
        segment = self.segments[-1]
        before = segment.size
        segment.add(self.fresh, self.waiting)
        self.size += segment.size - before
        self.fresh, self.waiting = [], 0

    def forget(self) -> None:
        """The oldest segment."""
        segment = self.segments.popleft()
        self._first += 1
        self.size -= segment.size
        self.forgotten += segment.count
        self.since = max(self.since, segment.last)

    def newest(self) -> Iterator[Connection]:
        """Of this moment, however long somebody takes to go through them."""
        fresh = (view for each in list(self.fresh) for view in each.views())
        grows = self.segments and not self.segments[-1].is_full
        return chain(self.segments[-1].packed().views(), fresh) if grows else fresh

    def before(self, number: int) -> Segment | None:
        """The segment ahead of that one; of a number that is not there yet (a worker was started again), the newest."""
        at = min(number, self.open_number) - 1 - self._first
        return self.segments[at] if 0 <= at < len(self.segments) else None
