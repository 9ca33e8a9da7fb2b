"""Connections that the core accepts: those under an order, and those that are for Python to decide about."""

import errno
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio

from meshnet.errors import EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Direction
from meshnet.net import sockets
from meshnet.relay import Facts, Flow, Issuer, Outcome, Watcher
from meshnet.relay.native.reasons import ABORTED, ENDED_BY, link_outcome, reset_payload
from meshnet.relay.rows import Rows

if TYPE_CHECKING:
    from meshnet.relay.native._core import Core, Link
    from meshnet.relay.native._core import Order as Handle

_DIRECTIONS = tuple(Direction)
_SERVED = 2
_PASSED = 6  # of what the core says


def direction_of(flow: Flow) -> int:
    """As the core numbers them."""
    return _SERVED if flow.identity else _DIRECTIONS.index(flow.direction)


class Door:
    """A listening socket in the core's hands."""

    def __init__(self, direction: Direction, shared: bool, carry: Callable[[socket.socket, Address], object]) -> None:
        self._direction = _DIRECTIONS.index(direction)
        self._shared = shared
        self._carry = carry
        self._is_stuck = trio.Event()
        self._error = 0  # errno, when it is stuck

    async def accept_forever(self, core: "Core", listener: socket.socket) -> None:
        """See meshnet.net.sockets.accept_forever."""
        trouble = sockets.AcceptTrouble(listener)
        fd = os.dup(listener.fileno())
        try:
            handle = core.listen(fd, self._direction, self._shared, self)
        except BaseException:
            os.close(fd)
            raise
        try:
            while True:
                await self._is_stuck.wait()
                self._is_stuck = trio.Event()
                trouble.tell(self._error)
                await trio.sleep(sockets.ACCEPT_PAUSE)
                try:
                    handle.go_on()
                except MemoryError:  # it may well be for want of memory that it is stuck
                    self._error = errno.ENOMEM
                    self._is_stuck.set()
        finally:
            sockets.accept_the_rest(listener, self._carry)
            handle.close()

    def hear(self, what: int, about: tuple[int, int, str, int] | int) -> None:
        if isinstance(about, tuple):
            fd, _, host, port = about
            self._carry(sockets.adopt(fd, host), sockets.peer_address((host, port)))
        else:
            self._error = about
            self._is_stuck.set()


class NativeOrder:
    """See meshnet.relay.Order."""

    __slots__ = ("_in_force", "_issuer", "_serves", "handle")
    handle: "Handle"

    def __init__(self, issuer: Issuer, in_force: "set[NativeOrder]", *, serves: bool) -> None:
        """`in_force`: which it leaves when it is revoked.

        `serves`: what peers ask for, so the tunnel is on the side of the client.
        """
        self._serves = serves
        self._issuer = issuer
        self._in_force = in_force

    def revoke(self) -> int | None:
        self._in_force.discard(self)
        return self.handle.revoke()

    def widen(self, places: int) -> None:
        self.handle.widen(places)

    def state(self) -> tuple[int, int, float]:
        return self.handle.state()

    def hear(self, what: int, about: "Link | tuple[Any, ...]") -> None:
        if what == _PASSED:
            rows, cipher, ended_by = about  # type: ignore[misc] # as passed.c has them
            self._issuer.passed(Rows(rows, cipher, ENDED_BY[ended_by]))
        elif isinstance(about, tuple):
            facts = Facts._make(about)  # as doors.c has them
            outcome = link_outcome(facts.reason, facts.ended_by, facts.error, facts.reset, from_client=self._serves)
            self._issuer.came_and_went(facts, outcome)
        else:
            link = NativeOrderedLink(about, self._serves)
            link.watcher = self._issuer.began(link)


class NativeOrderedLink:
    """See meshnet.relay.OrderedLink."""

    __slots__ = ("_handle", "_served", "abort_by", "abort_reason", "watcher")
    watcher: Watcher

    def __init__(self, handle: "Link", served: bool) -> None:
        self._handle = handle
        self._served = served
        self.abort_reason = Reason.DRAIN
        self.abort_by = EndedBy.PROXY
        handle.await_end(self)

    @property
    def abort(self) -> Callable[[], None] | None:
        return self._abort

    def _abort(self) -> None:
        self._handle.abort(reset_payload(self.abort_reason))

    def live(self) -> tuple[int, int, bool, bool, float]:
        return self._handle.counts()

    @property
    def leg_port(self) -> int:
        return self._handle.leg_port()

    def facts(self) -> Facts:
        return Facts._make(self._handle.facts())

    def outcome(self) -> Outcome:
        reason, ended_by, error, *_, reset = self._handle.result()
        if reason == ABORTED:
            return Outcome(self.abort_reason, self.abort_by)
        return link_outcome(reason, ended_by, error, reset, from_client=self._served)

    def hear(self, what: int, about: None) -> None:
        self.watcher.connected()

    def wake(self) -> None:
        self.watcher.ended()
