"""Every connection that is open, the ones that ended lately, and who wants to hear of them."""

import heapq
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Protocol

import trio

from meshnet.errors import EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.admin import ConnectionEvent
from meshnet.model.connection import Direction, State
from meshnet.proxy.passed import Passed
from meshnet.proxy.record import Record

_FOLLOWER_BUFFER = 1024  # events a slow reader may lag behind before it is told that it lost some

_EVENTS = {State.CLOSED: "close", State.DENIED: "deny"}


class Observer(Protocol):
    """Metrics, for one."""

    def ended(self, record: Record) -> None: ...

    def passed(self, passed: Passed) -> None: ...


class Follower:
    """One reader of events. It never makes the proxy wait: what does not fit is counted and told."""

    def __init__(self) -> None:
        self._send, self.receive = trio.open_memory_channel[ConnectionEvent](_FOLLOWER_BUFFER)
        self._lost = 0

    def tell(self, event: ConnectionEvent) -> None:
        try:
            if self._lost:
                self._send.send_nowait(ConnectionEvent(event="lost", count=self._lost))
                self._lost = 0
            self._send.send_nowait(event)
        except trio.WouldBlock:
            self._lost += 1

    def lose(self, count: int) -> None:
        """That many events are not made at all."""
        self._lost += count


class Registry:
    """`log` gets each ended connection. Ids given here end with `id_suffix`, by which workers' ids differ.

    `keep` of those that ended well are remembered, and as many that failed: however busy a host is, what went wrong can
    be asked for later.
    """

    def __init__(
        self, *, keep: int, observer: Observer, log: Callable[[Record | Passed], None] | None, id_suffix: str = ""
    ) -> None:
        self.id_suffix = id_suffix
        self.open: dict[int, Record] = {}  # by id(): peers choose the ids of inbound ones, and two may choose the same
        self._well: deque[Record | Passed] = deque(maxlen=keep)
        self._failed: deque[Record] = deque(maxlen=keep)
        self.opened_total = 0
        self.failed_total = 0
        self._observer = observer
        self._log = log
        self._followers: set[Follower] = set()
        self.empty = trio.Event()
        self.empty.set()
        self.catch_up: Callable[[], None] = lambda: None
        """Brings in what the relay has begun or ended by itself, before somebody looks."""

    def life(
        self, direction: Direction, source: Address, client: socket.socket | None, connection_id: str = ""
    ) -> Record:
        """A context manager around one connection's life; see Record."""
        return Record(self, direction, source, client, connection_id)

    def began(self, record: Record) -> None:
        if id(record) in self.open:
            return  # under an order, and goes on without it
        if not self.open:
            self.empty = trio.Event()
        self.open[id(record)] = record
        self.opened_total += 1

    def connected(self, record: Record) -> None:
        """Both legs are up; a follower sees it with everything that is known by now."""
        if self._followers:
            self._tell("open", record)

    def ended(self, record: Record) -> None:
        if self.open.pop(id(record), None) is None:
            self.opened_total += 1  # it came and went under an order
        record.let_go()
        if not self.open:
            self.empty.set()
        if record.hidden:
            self.opened_total -= 1
            return
        if record.failed:
            self._failed.append(record)
            self.failed_total += 1
        else:
            self._well.append(record)
        self._observer.ended(record)
        if self._log is not None:
            self._log(record)
        if self._followers:
            self._tell(_EVENTS.get(record.state, "fail"), record)

    def passed(self, passed: Passed) -> None:
        """As `began` and `ended` of a connection that ended well."""
        self.opened_total += 1
        self._well.append(passed)
        self._observer.passed(passed)
        if self._log is not None:
            self._log(passed)
        if self._followers:
            self._tell("close", passed)

    def find(self, connection_id: str) -> Record | None:
        """The one that got the id from us, else the newest: a peer cannot put another in the place of ours."""
        self.catch_up()
        newest_first = chain(reversed(self.open.values()), _by_end(self._failed, self._well, newest_first=True))
        every = [record for record in newest_first if record.id == connection_id]
        found = next((record for record in every if record.direction is Direction.OUTBOUND), next(iter(every), None))
        return found.record(self) if isinstance(found, Passed) else found

    def listing(self, *, recent: float, everything: bool) -> Iterator[Record | Passed]:
        """Open ones, and of the ended those that failed within `recent` seconds, or all that are kept."""
        self.catch_up()
        now = time.monotonic()
        if everything:
            yield from _by_end(self._failed, self._well)
        else:
            yield from (record for record in self._failed if record.ended is None or now - record.ended <= recent)
        yield from self.open.values()

    def follow(self) -> Follower:
        """What is open comes first, as far as it fits; to look at all of ten thousand would hold up the loop."""
        self.catch_up()
        follower = Follower()
        for record in islice(self.open.values(), _FOLLOWER_BUFFER):
            follower.tell(ConnectionEvent(event="open", connection=record.view()))
        follower.lose(max(0, len(self.open) - _FOLLOWER_BUFFER))
        self._followers.add(follower)
        return follower

    def unfollow(self, follower: Follower) -> None:
        self._followers.discard(follower)

    def abort_all(self, reason: Reason, ended_by: EndedBy) -> None:
        self.catch_up()
        for record in list(self.open.values()):
            record.abort(reason, ended_by)

    def _tell(self, event: str, record: Record | Passed) -> None:
        message = ConnectionEvent(event=event, connection=record.view())
        for follower in self._followers:
            follower.tell(message)


def _by_end(*kept: deque[Record] | deque[Record | Passed], newest_first: bool = False) -> Iterator[Record | Passed]:
    """Those of all, in the order in which they have ended, as they are in each."""
    sides = (reversed(each) if newest_first else each for each in kept)
    return heapq.merge(*sides, key=lambda each: each.ended or 0.0, reverse=newest_first)
