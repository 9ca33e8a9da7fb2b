"""Standing orders: what was decided for one connection, the relay does by itself with the next ones of its flow.

A flow is how connections came, from which host, and where they were going. Where nothing else can matter to a decision
(one endpoint, its breaker closed; policy that looks at addresses) it is made once. Whatever could change it revokes the
order: another mesh, another address of this host, a renewed certificate, a failure of the endpoint, limits that run
out. Each connection has its record all the same, told by the relay.
"""

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import trio

from meshnet.model.connection import Direction, Security
from meshnet.proxy.passed import Told
from meshnet.proxy.record import Record
from meshnet.proxy.standing_order import Asking, Before, StandingOrder, fail
from meshnet.relay import Flow, Target, Through

if TYPE_CHECKING:  # it holds orders
    from meshnet.proxy.state import EndpointState, ProxyState, ServiceState

_PLACES = 128  # of a service's limits; more as they are used
_FEWEST_PLACES = 16  # so near its limits each connection is a decision
_NO_LIMIT = 1 << 30
_MOST_ORDERS = 4096
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
        self.go_on: Callable[[Record, Before], None] = fail

    def __len__(self) -> int:
        return len(self._in_force)

    def offer(
        self,
        record: Record,
        target: Target,
        decided: int,
        held: "ServiceState | None" = None,
        known: "EndpointState | None" = None,
        asking: Asking | None = None,
    ) -> None:
        """`record` is of a connection whose endpoint is up, and every one of its flow is to be treated alike.

        `decided`: the generation before the decision. `held` and `known` are what the connections count against.
        `asking`: the endpoint is reached through a tunnel.
        """
        if record.direction is Direction.OUTBOUND and self._state.held is not None and self._state.held.wants_all:
            return  # the next one's SYN waits for a leg that Python has to dial
        relay = self._state.relays.available[0]
        if not relay.takes_orders or self._stopped or decided != self.generation or record.original is None:
            return
        is_served = record.direction is Direction.INBOUND and record.security is Security.MTLS
        asked_by = record.source_identity if is_served else ""
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
        through = None
        if asking is not None:
            depot = self._state.pool.lend(asking.key)
            assert depot is not None  # as the relay takes orders
            through = Through(depot, asking.opening(), self._state.registry.id_suffix)
        order = StandingOrder(
            state=self._state,
            flow=flow,
            target=target,
            told=Told(record, flow, str(target.address), relay.name),
            held=held,
            known=known,
            asking=asking,
        )
        order.handle = relay.order(flow, target, places, order, through)
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
            if order.asking is not None:
                self._state.pool.unlend(order.asking.key)

    async def run(self) -> None:
        """Reaps until it is cancelled."""
        while True:
            await trio.sleep(_REAP_EVERY)
            self.reap(time.monotonic())

    def reap(self, now: float) -> None:
        """Revokes those that nobody has used for a while. `now` is monotonic; to be called every few seconds."""
        self.revoke([order for order in self._in_force.values() if order.is_unused(now)])
