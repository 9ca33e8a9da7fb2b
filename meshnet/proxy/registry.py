"""Every connection that is open, the ones that ended lately, and who wants to hear of them."""

import logging
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple, Protocol

import trio

from meshnet.errors import EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.admin import ConnectionEvent
from meshnet.model.connection import Connection, Direction, State
from meshnet.proxy.packed import Packed
from meshnet.proxy.passed import Passed
from meshnet.proxy.past import Cursor, Past
from meshnet.proxy.record import Record, rfc3339

_access = logging.getLogger("meshnet.access")

_FOLLOWER_BUFFER = 1024  # events a slow reader may lag behind before it is told that it lost some

_EVENTS = {State.CLOSED: "close", State.DENIED: "deny"}


class Observer(Protocol):
    """Metrics, for one."""

    def ended(self, record: Record) -> None: ...

    def passed(self, passed: Passed) -> None: ...


class Log(Protocol):
    def __call__(self, ended: Record | Passed, count: int = 1) -> None:
        """`count`: how many connections that is."""


class Follower:
    """One reader of events. It never makes the proxy wait: what does not fit is counted, and told in its place."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[ConnectionEvent](_FOLLOWER_BUFFER)
        self._lost = 0

    def __aiter__(self) -> "Follower":
        return self

    async def __anext__(self) -> ConnectionEvent:
        return self.take() or await self._receive.receive()

    def take(self) -> ConnectionEvent | None:
        """The next event, where there is one. Behind what did fit it is how many did not."""
        try:
            return self._receive.receive_nowait()
        except trio.WouldBlock:
            if not self._lost:
                return None
            lost, self._lost = self._lost, 0
            return ConnectionEvent(event="lost", count=lost)

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


class Listing(NamedTuple):
    """Some connections, and where to go on from; None: these were the last.

    Of those that came and went the views are not made: their lines are made in a fraction of the time.
    """

    connections: Iterator[Connection | Passed]
    before: Cursor | None


class Registry:
    """`log` gets each ended connection. Ids given here end with `id_suffix`, by which workers' ids differ.

    Those that have ended are remembered in about `memory` bytes.
    """

    def __init__(self, *, memory: int, observer: Observer, log: Log | None, id_suffix: str = "") -> None:
        self.id_suffix = id_suffix
        self.open: dict[int, Record] = {}  # by id(): peers choose the ids of inbound ones, and two may choose the same
        self.past = Past(memory)
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
        if _access.isEnabledFor(logging.DEBUG):
            _access.debug(
                "opened %r: %s %s -> %s, service %r, endpoint %s, as %r",
                record.id,
                record.direction,
                record.source,
                record.original,
                record.service,
                record.endpoint,
                record.source_identity,
            )
        if self._followers:
            self._tell("open", record.view())

    def ended(self, record: Record) -> None:
        if self.open.pop(id(record), None) is None:
            self.opened_total += 1  # it came and went under an order
        record.let_go()
        if not self.open:
            self.empty.set()
        if record.hidden:
            self.opened_total -= 1
            return
        self.failed_total += record.failed
        self.past.keep(record)
        self._observer.ended(record)
        if self._log is not None:
            self._log(record)
        if self._followers:
            self._tell(_EVENTS.get(record.state, "fail"), record.view())

    def passed(self, passed: Passed) -> None:
        """As `began` and `ended` of connections that ended well."""
        self.opened_total += len(passed)
        self.past.keep(passed, len(passed))
        self._observer.passed(passed)
        if self._log is not None:
            self._log(passed, len(passed))
        if self._followers:
            for view in passed.views():
                self._tell("close", view)

    async def find(self, connection_id: str) -> list[Connection]:
        """Those with that id, the newest first. More than one: peers choose ids."""
        self.catch_up()
        is_open = (record.view() for record in reversed(self.open.values()) if record.id == connection_id)
        newest, _ = self.past.newest(well=True)
        found = [*is_open, *reversed([each for each in newest if each.id == connection_id])]
        older = await trio.to_thread.run_sync(_look_through, self.past.full(), connection_id)
        return [*found, *older]

    def listing(self, *, recent: float, everything: bool, before: Cursor | None = None) -> Listing:
        """Open ones, and of the ended those that failed within `recent` seconds, or all that are kept: in parts.

        The first part has the open ones last; what it says of where to go on from is `before` for the next.
        """
        self.catch_up()
        earliest = "" if everything else rfc3339(time.time() - recent)
        if before is None:
            ended: Iterator[Connection | Passed]
            ended, cursor = self.past.newest(well=everything)
            is_open: Iterable[Connection] = (record.view() for record in list(self.open.values()))
        else:
            page = self.past.page(before)
            if page is None:
                return Listing(iter(()), None)
            ended, cursor, is_open = page.packed.items(), page.cursor, ()
        following = self.past.page(cursor)
        is_last = following is None or rfc3339(following.last) < earliest
        if earliest:  # only of those that failed, which are whole
            ended = (each for each in ended if isinstance(each, Passed) or each.closed_at >= earliest)
        return Listing(chain(ended, is_open), None if is_last else cursor)

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

    def _tell(self, event: str, connection: Connection) -> None:
        message = ConnectionEvent(event=event, connection=connection)
        for follower in self._followers:
            follower.tell(message)


def choose(found: Sequence[Connection]) -> Connection | None:
    """Of those with one id, the newest first: one that got it here. A peer cannot put another in the place of ours."""
    return max(found, key=lambda it: (it.direction is Direction.OUTBOUND, it.opened_at), default=None)


def _look_through(past: Sequence[Packed], connection_id: str) -> list[Connection]:
    found = [view for packed in past for view in packed.find(connection_id)]
    return sorted(found, key=lambda it: it.opened_at, reverse=True)
