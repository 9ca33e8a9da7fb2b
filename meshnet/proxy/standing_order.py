"""One standing order, and what comes of it: connections that go on, come and go, or are given back."""

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from meshnet.codec.frames import decode_refused
from meshnet.decide.breaker import BreakerState, counts_against_endpoint, is_endpoints_fault
from meshnet.errors import ConnectionFailed, EndedBy, Reason
from meshnet.model.address import parse_address
from meshnet.model.connection import Attempt, Direction
from meshnet.net import sockets
from meshnet.proxy.passed import Passed, Told
from meshnet.proxy.record import Record, milliseconds
from meshnet.relay import TUNNEL_CLOSED, Facts, Flow, Order, OrderedLink, Outcome, Target, Watcher
from meshnet.relay.rows import Rows
from meshnet.tunnel.client import Key, no_answer, refusal

if TYPE_CHECKING:  # it holds orders
    from meshnet.proxy.state import EndpointState, ProxyState, ServiceState

_KEPT_UNUSED = 60.0  # seconds
_LOST = (Reason.TUNNEL_LOST, Reason.KEEPALIVE_DEAD)


class Asking(NamedTuple):
    """How an endpoint is asked for: through which tunnels, and what makes the words (meshnet.relay.Through.opening)."""

    key: Key
    opening: Callable[[], tuple[bytes, bytes, bytes]]


class Before(NamedTuple):
    """What became of a connection before it is decided about: how an attempt at the endpoint that its record names has
    failed, if one has, and what was read of its client then."""

    failed: ConnectionFailed | None = None
    early: bytes = b""


@dataclass(slots=True, eq=False)
class StandingOrder:
    """One that was given to the relay, which tells it what comes of that."""

    state: "ProxyState"
    flow: Flow
    target: Target
    told: Told
    generation: int
    held: "ServiceState | None"
    known: "EndpointState | None"
    asking: Asking | None
    issued: float = field(default_factory=time.monotonic)
    revoked: bool = False
    heard: int = 0
    """How many of its connections count with its endpoint's."""
    handle: Order = field(init=False)

    @property
    def in_force(self) -> bool:
        return not self.revoked and self.generation == self.state.orders.generation

    def widen(self) -> None:
        """A connection came past it, for want of a place: it gets more, as far as there are."""
        if self.held is None:
            return
        places, taken, _ = self.handle.state()
        if taken == places and (more := self.held.limiter.reserve(places)):
            self.handle.widen(more)

    def unheard(self) -> int:
        """How many connections it has beyond these; fewer than none, if the end of some has not been heard."""
        return self.handle.state()[1] - self.heard

    def is_unused(self, now: float) -> bool:
        _, taken, used_at = self.handle.state()
        return not taken and now - max(used_at, self.issued) > _KEPT_UNUSED

    def began(self, link: OrderedLink) -> Watcher:
        """A connection that goes on."""
        facts = link.facts()
        record = self._record(facts)
        record.link = link
        record.tally.live = link.live
        self.state.registry.began(record)
        if self.known is not None:
            self.known.open += 1
            self.heard += 1
        if facts.connected:
            self.state.registry.connected(record)
        if not self.in_force:
            self.state.review(record)  # it came in just before, and what ended the order has not seen it
        return _Carried(self, record, link)

    def came_and_went(self, facts: Facts, outcome: Outcome) -> None:
        """A connection that was over before anybody looked, and of which there is something to say."""
        if facts.undone:
            # The application of this host could not be reached. The usual way is taken, which says so to the peer.
            self._leave(facts)
            self.state.orders.revoke([self])
            return
        self.end(self._record(facts), facts, outcome)

    def passed(self, rows: Rows) -> None:
        """Connections of which there is not: nearly all of a busy host, so nothing is done for each of them."""
        if self.held is not None:
            self.held.budget.dialled(time.monotonic(), len(rows))
        if self.known is not None:
            self.known.resets.in_a_row = 0
        self.state.registry.passed(Passed(self.told, rows))

    def end(self, record: Record, facts: Facts, outcome: Outcome) -> None:
        self._leave(facts)
        if facts.client >= 0:
            self._hand_back(record, facts, outcome)
        else:
            self.told.note_end(record, facts, outcome)
            if self.known is not None:
                self.state.ended(record, self.known)
            self.state.registry.ended(record)

    def _dialled(self, facts: Facts) -> None:
        if self.held is not None:
            self.held.budget.dialled(facts.opened)

    def _leave(self, facts: Facts) -> None:
        """Gives back the place in the limits that the order could not take back, once it was revoked."""
        if facts.owes and self.held is not None:
            self.state.leave(self.held)

    def _record(self, facts: Facts) -> Record:
        self._dialled(facts)
        return self.told.record(self.state.registry, facts)

    def _hand_back(self, record: Record, facts: Facts, outcome: Outcome) -> None:
        """The endpoint could not be reached: it is judged, and what is to be done now is decided anew."""
        record.link = record.tally.live = None
        record.client = sockets.adopt(facts.client, self.flow.source)
        if outcome.reason in _LOST and not facts.reset:
            # The peer had hung up on a kept tunnel: that says nothing about the endpoint.
            record.forget_tunnel()
            self.state.orders.go_on(record, Before(early=facts.early))
            return
        now = time.monotonic()
        failure = self._failure(facts, outcome)
        record.attempts.append(
            Attempt(
                endpoint=self.told.endpoint,
                result=str(failure.reason),
                ms=milliseconds(facts.ended - facts.opened),
                detail=failure.detail,
            )
        )
        self.state.orders.revoke([self])
        if self.known is not None:
            self._blame(self.known, failure, now)
        before = Before(failure, facts.early)
        if self.flow.direction is Direction.OUTBOUND and self.told.service:
            self.state.orders.go_on(record, before)
        else:
            fail(record, before)

    def _failure(self, facts: Facts, outcome: Outcome) -> ConnectionFailed:
        if self.asking is None:
            return sockets.connect_failure(self.target.address, facts.error, self.target.patience)
        if facts.error == errno.ETIMEDOUT:
            return no_answer(self.target.patience)
        if not facts.reset:
            return ConnectionFailed(outcome.reason, outcome.detail, ended_by=outcome.ended_by)
        try:
            return refusal(decode_refused(facts.reset))
        except ValueError as error:
            return ConnectionFailed(Reason.TUNNEL_PROTOCOL, str(error), ended_by=EndedBy.PEER_PROXY)

    def _blame(self, known: "EndpointState", failure: ConnectionFailed, now: float) -> None:
        known.last_error = f"{failure.reason}: {failure.detail}"
        if not counts_against_endpoint(failure.reason):
            return
        self.state.orders.revoke(known.orders)
        # Dialled before it opened says nothing new, and is not the probe either.
        if known.breaker.state(now) is BreakerState.CLOSED and known.breaker.admit(now):
            known.breaker.failed(now, self.state.dice)
            found = self.state.snapshot.by_endpoint.get(parse_address(self.told.endpoint))
            if found and is_endpoints_fault(failure.reason):
                self.state.blamed(*found, known, now)


class _Carried:
    """A connection that goes on under an order."""

    __slots__ = ("_link", "_order", "_record")

    def __init__(self, order: StandingOrder, record: Record, link: OrderedLink) -> None:
        self._order = order
        self._record = record
        self._link = link

    def connected(self) -> None:
        if self._record.connected is None:
            self._order.told.note_connected(self._record, self._link.facts())
            self._order.state.registry.connected(self._record)

    def ended(self) -> None:
        facts = self._link.facts()
        if facts.connected:
            self.connected()
        if self._order.known is not None:
            self._order.known.open -= 1
            self._order.heard -= 1
        self._order.end(self._record, facts, self._link.outcome())


def fail(record: Record, before: Before) -> None:
    """Ends it with that failure, which the client gets to know by RST."""
    with record:
        raise before.failed or ConnectionFailed(Reason.TUNNEL_LOST, TUNNEL_CLOSED)
