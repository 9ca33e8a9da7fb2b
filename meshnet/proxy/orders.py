"""Standing orders: what was decided for one connection, the relay does by itself with the next ones of its flow.

A flow is how connections came, from which host, and where they were going. Where nothing else can matter to a decision
(one endpoint, its breaker closed; policy that looks at addresses) it is made once. Whatever could change it revokes the
order: another mesh, another address of this host, a renewed certificate, a failure of the endpoint, limits that run
out. Each connection has its record all the same, told by the relay.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from meshnet.decide.breaker import BreakerState, counts_against_endpoint
from meshnet.errors import ConnectionFailed, Reason
from meshnet.model.connection import Attempt, Direction, Security
from meshnet.net import sockets
from meshnet.proxy.passed import Passed, Told
from meshnet.proxy.record import Record, milliseconds, new_id
from meshnet.relay import Facts, Flow, Order, OrderedLink, Outcome, Target, Watcher

if TYPE_CHECKING:  # it holds orders
    from meshnet.proxy.state import EndpointState, ProxyState, ServiceState

_PLACES = 128  # of a service's limits; more as they are used
_FEWEST_PLACES = 16  # so near its limits each connection is a decision
_NO_LIMIT = 1 << 30
_MOST_ORDERS = 4096
_KEPT_UNUSED = 60.0  # seconds
_REAP_EVERY = 5.0


class Orders:
    """All that are in force. `go_on` takes a connection whose endpoint could not be reached under an order."""

    def __init__(self, state: "ProxyState") -> None:
        self._state = state
        self._in_force: dict[Flow, StandingOrder] = {}
        self.generation = 0
        """Grows with each `revoke_all`: what was decided before may not be offered after."""
        self._stopped = False
        self._ending: list[StandingOrder] = []
        self.go_on: Callable[[Record, ConnectionFailed], None] = fail

    def __len__(self) -> int:
        return len(self._in_force)

    def offer(
        self,
        record: Record,
        target: Target,
        decided: int,
        held: "ServiceState | None" = None,
        known: "EndpointState | None" = None,
    ) -> None:
        """`record` is of a connection whose endpoint is up, and every one of its flow is to be treated alike.

        `decided`: the generation before the decision. `held` and `known` are what the connections count against.
        """
        relay = self._state.relays.available[0]
        if not relay.takes_orders or self._stopped or decided != self.generation or record.original is None:
            return
        asked_by = record.source_identity if record.security is Security.MTLS else ""
        flow = Flow(record.direction, record.source.host, record.original, asked_by)
        if (order := self._in_force.get(flow)) is not None:
            order.widen()
            return
        if len(self._in_force) >= _MOST_ORDERS:
            return
        places = _NO_LIMIT if held is None else held.limiter.reserve(_PLACES)
        if places < _FEWEST_PLACES:
            if held is not None:
                self._state.leave(held, places)
            return
        order = StandingOrder(
            state=self._state,
            flow=flow,
            target=target,
            told=Told(record, flow, str(target.address), relay.name),
            held=held,
            known=known,
        )
        order.handle = relay.order(flow, target, places, order)
        self._in_force[flow] = order
        for counted in (held, known):
            if counted is not None:
                counted.orders.add(order)

    def revoke_all(self) -> None:
        self.generation += 1
        self.revoke(self._in_force.values())

    def stop(self) -> None:
        """Before the end: from now on each connection is decided, and says to its peer that we drain."""
        self._stopped = True
        self._ending = list(self._in_force.values())
        self.revoke_all()

    @property
    def are_busy(self) -> bool:
        """Whether a connection under one of those that were stopped lives, be it one that is not known of yet."""
        self._ending = [order for order in self._ending if order.handle.state()[1]]
        return bool(self._ending)

    def revoke(self, orders: "Iterable[StandingOrder]") -> None:
        """Those that are in force; of others it has been done before."""
        for order in [order for order in orders if not order.revoked]:
            self._in_force.pop(order.flow, None)
            for counted in (order.held, order.known):
                if counted is not None:
                    counted.orders.discard(order)
            unused = order.handle.revoke()
            order.revoked = True
            if order.held is not None and unused:
                self._state.leave(order.held, unused)

    async def run(self) -> None:
        """Reaps until it is cancelled."""
        while True:
            await trio.sleep(_REAP_EVERY)
            self.reap(time.monotonic())

    def reap(self, now: float) -> None:
        """Revokes those that nobody has used for a while. `now` is monotonic; to be called every few seconds."""
        self.revoke([order for order in self._in_force.values() if order.is_unused(now)])


@dataclass(slots=True, eq=False)
class StandingOrder:
    """One that was given to the relay, which tells it what comes of that."""

    state: "ProxyState"
    flow: Flow
    target: Target
    told: Told
    held: "ServiceState | None"
    known: "EndpointState | None"
    issued: float = field(default_factory=time.monotonic)
    revoked: bool = False
    handle: Order = field(init=False)

    def widen(self) -> None:
        """A connection came past it, for want of a place: it gets more, as far as there are."""
        if self.held is None:
            return
        places, taken, _ = self.handle.state()
        if taken == places and (more := self.held.limiter.reserve(places)):
            self.handle.widen(more)

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
        if facts.connected:
            self.state.registry.connected(record)
        if self.revoked:
            self.state.review(record)  # it came in just before, and what revoked the order has not seen it
        return _Carried(self, record, link)

    def came_and_went(self, facts: Facts, outcome: Outcome) -> None:
        """A connection that was over before anybody looked."""
        if facts.undone:
            # The application of this host could not be reached. The usual way is taken, which says so to the peer.
            self._leave(facts)
            self.state.orders.revoke([self])
            return
        if outcome.reason is not Reason.OK or not facts.connected:
            self.end(self._record(facts), facts, outcome)
            return
        self._dialled(facts)
        self._leave(facts)
        opened_at = time.time() + facts.opened - time.monotonic()
        registry = self.state.registry
        connection_id = facts.id or new_id(opened_at) + registry.id_suffix
        registry.passed(Passed(self.told, facts, outcome, opened_at, connection_id))

    def end(self, record: Record, facts: Facts, outcome: Outcome) -> None:
        self._leave(facts)
        if facts.client >= 0:
            self._hand_back(record, facts)
        else:
            self.told.note_end(record, facts, outcome)
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

    def _hand_back(self, record: Record, facts: Facts) -> None:
        """The endpoint could not be reached: it is judged, and what is to be done now is decided anew."""
        now = time.monotonic()
        failure = sockets.connect_failure(self.target.address, facts.error, self.target.patience)
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
        record.link = record.tally.live = None
        record.client = sockets.adopt(facts.client, self.flow.source)
        if self.flow.direction is Direction.OUTBOUND and self.told.service:
            self.state.orders.go_on(record, failure)
        else:
            fail(record, failure)

    def _blame(self, known: "EndpointState", failure: ConnectionFailed, now: float) -> None:
        known.last_error = f"{failure.reason}: {failure.detail}"
        if not counts_against_endpoint(failure.reason):
            return
        self.state.orders.revoke(known.orders)
        # Dialled before it opened says nothing new, and is not the probe either.
        if known.breaker.state(now) is BreakerState.CLOSED and known.breaker.admit(now):
            known.breaker.failed(now, self.state.dice)


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
        self._order.end(self._record, facts, self._link.outcome())


def fail(record: Record, failure: ConnectionFailed) -> None:
    """Ends it with that failure, which the client gets to know by RST."""
    with record:
        raise failure
