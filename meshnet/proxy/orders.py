"""Standing orders: what was decided for one connection, the relay does by itself with the next ones of its flow.

A flow is how connections came, from which host, and where they were going. Where nothing else can matter to a decision
(one endpoint, its breaker closed; policy that looks at addresses) it is made once. Whatever could change it revokes the
order: another mesh, another address of this host, a renewed certificate, a failure of the endpoint, limits that run
out. What may change all decisions suspends all orders in one step, and they are revoked a few at a time. Each
connection has its record all the same, told by the relay.
"""

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import trio

from meshnet.model.connection import Direction, Security
from meshnet.proxy.passed import Told
from meshnet.proxy.record import Record
from meshnet.proxy.slices import slices, taken_off
from meshnet.proxy.standing_order import Asking, Before, StandingOrder, fail
from meshnet.relay import Flow, Target, Through

if TYPE_CHECKING:  # it holds orders
    from meshnet.proxy.state import EndpointState, ProxyState, ServiceState

_PLACES = 128  # of a service's limits; more as they are used
_FEWEST_PLACES = 16  # so near its limits each connection is a decision
_NO_LIMIT = 1 << 30
_MOST_ORDERS = 4096
_REVOKED_AT_ONCE = 64  # each takes some ten microseconds, of which most are for the tunnels that it gives back
_REAP_EVERY = 5.0


class Orders:
    """All that are in force. `go_on` takes a connection whose endpoint could not be reached under an order."""

    def __init__(self, state: "ProxyState") -> None:
        self._state = state
        self._in_force: dict[Flow, StandingOrder] = {}
        self.generation = 0
        """Grows with each `suspend_all`: what was decided before may not be offered after."""
        self._suspended: list[StandingOrder] = []  # still to be revoked
        self._some_are_suspended = trio.Event()
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
            through = Through(depot, asking.opening())
        order = StandingOrder(
            state=self._state,
            flow=flow,
            target=target,
            told=Told(record, flow, str(target.address), relay.name),
            generation=decided,
            held=held,
            known=known,
            asking=asking,
        )
        order.handle = relay.order(flow, target, places, order, through)
        self._in_force[flow] = order
        for counted in (held, known):
            if counted is not None:
                counted.orders.add(order)

    def suspend_all(self) -> None:
        """No connection begins under any of them from now on. `run` revokes them, or who waits for that."""
        self.generation += 1
        for relay in self._state.relays.available:
            relay.suspend_orders()
        self._suspended += self._in_force.values()
        self._in_force = {}
        self._some_are_suspended.set()

    async def revoke_suspended(self) -> None:
        """In slices; when it returns, it is done, by whomever."""
        for orders in taken_off(self._suspended, _REVOKED_AT_ONCE):
            self.revoke(orders)
            await trio.lowlevel.checkpoint()

    def stop(self) -> None:
        """Before the end: from now on each connection is decided, and says to its peer that we drain."""
        self._stopped = True
        self._ending = list(self._in_force.values())
        self.suspend_all()

    @property
    def are_busy(self) -> bool:
        """Whether a connection under one of those that were stopped lives, be it one that is not known of yet."""
        self._ending = [order for order in self._ending if order.handle.state()[1]]
        return bool(self._ending)

    def revoke(self, orders: "Iterable[StandingOrder]") -> None:
        """Those that are in force or suspended; of others it has been done before."""
        for order in [order for order in orders if not order.revoked]:
            if self._in_force.get(order.flow) is order:
                del self._in_force[order.flow]
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
        """Reaps, and revokes those that are suspended, until it is cancelled."""
        while True:
            with trio.move_on_after(_REAP_EVERY):
                await self._some_are_suspended.wait()
            if self._some_are_suspended.is_set():
                self._some_are_suspended = trio.Event()
                await self.revoke_suspended()
            await self._reap(time.monotonic())

    async def _reap(self, now: float) -> None:
        """Revokes those that nobody has used for a while. `now` is monotonic; to be called every few seconds."""
        unused: list[StandingOrder] = []
        for orders in slices(self._in_force.values()):
            unused += [order for order in orders if order.is_unused(now)]
            await trio.lowlevel.checkpoint()
        for orders in taken_off(unused, _REVOKED_AT_ONCE):
            self.revoke(order for order in orders if order.is_unused(now))
            await trio.lowlevel.checkpoint()
