"""What an order's failure says of its endpoint, and what ends orders, in a state of its own."""

import errno
import time

import trio

from meshnet.codec.mesh import read_mesh
from meshnet.decide.breaker import BreakerState
from meshnet.errors import EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Direction, Security
from meshnet.model.snapshot import Snapshot
from meshnet.proxy.standing_order import StandingOrder
from meshnet.proxy.state import EndpointState, ProxyState
from meshnet.relay import Facts, Outcome, Target
from tests.proxy.test_state import a_state
from tests.relay.rig import tcp_pair

MESH = """\
apiVersion: meshnet.dev/v1
kind: Service
metadata: {name: api}
spec: {ports: [{port: 80}], endpoints: [{address: 10.1.0.1}]}
---
apiVersion: meshnet.dev/v1
kind: TrafficPolicy
metadata: {name: frail}
spec: {services: [api], breaker: {failures: 1, openTime: 50ms, jitter: 0}}
"""
SOURCES = ("10.9.0.1", "10.9.0.2")


def mesh() -> Snapshot:
    return read_mesh([("mesh.yaml", MESH)], 1)


def two_orders(state: ProxyState) -> tuple[EndpointState, list[StandingOrder]]:
    """To the same endpoint, from two hosts."""
    (service,) = state.snapshot.services
    (endpoint,) = service.endpoints
    known, held = state.endpoint(endpoint, service), state.service(service)
    for source in SOURCES:
        record = state.registry.life(Direction.OUTBOUND, Address(source, 1), None)
        record.security, record.original, record.service = Security.PLAIN, Address("10.96.0.1", 80), service.name
        target = Target(endpoint.address, 0, False, 2.0)
        state.orders.offer(record, target, state.orders.generation, held, known)
    assert len(known.orders) == 2
    return known, sorted(known.orders, key=lambda order: order.flow.source)


def fail(order: StandingOrder, error: int) -> None:
    """As the relay tells of a dial that failed."""
    now = time.monotonic()
    near, far = tcp_pair()
    facts = Facts(1234, now - 0.01, 0.0, now, 0, 0, 0.0, False, False, 0, 2, error, False, near.detach())
    with far:
        order.came_and_went(facts, Outcome(Reason.OK, EndedBy.CLIENT))


async def test_when_the_breaker_opens_no_order_dials_past_it() -> None:
    async with a_state(mesh(), "native") as state:
        known, (first, second) = two_orders(state)
        fail(first, errno.ECONNREFUSED)
        assert known.breaker.state(time.monotonic()) is BreakerState.OPEN
        assert first.revoked
        assert second.revoked


async def test_our_own_shortage_is_not_blamed_on_the_endpoint() -> None:
    async with a_state(mesh(), "native") as state:
        known, (first, second) = two_orders(state)
        fail(first, errno.EMFILE)
        assert known.breaker.state(time.monotonic()) is BreakerState.CLOSED
        assert not second.revoked


async def test_a_dial_from_before_the_breaker_opened_is_not_its_probe() -> None:
    async with a_state(mesh(), "native") as state:
        known, (first, second) = two_orders(state)
        fail(first, errno.ETIMEDOUT)
        await trio.sleep(known.breaker.open_for(time.monotonic()) + 0.01)
        assert known.breaker.state(time.monotonic()) is BreakerState.HALF_OPEN
        fail(second, errno.ETIMEDOUT)
        assert known.breaker.state(time.monotonic()) is BreakerState.HALF_OPEN
        assert known.breaker.failures == 1


async def test_an_address_that_comes_ends_orders_and_what_was_known_of_local_services() -> None:
    async with a_state(mesh(), "native") as state:
        known, orders = two_orders(state)
        assert state.service_at(Address("10.9.9.9", 80)) is None
        assert state._local_services
        state.addresses.forget()
        assert not state._local_services
        assert not any(order.in_force for order in orders)
        await state.orders.revoke_suspended()
        assert not known.orders


async def test_before_the_end_none_is_taken_any_more() -> None:
    async with a_state(mesh(), "native") as state:
        _, orders = two_orders(state)
        state.orders.stop()
        assert not any(order.in_force for order in orders)
        assert not state.orders.are_busy
        record = state.registry.life(Direction.OUTBOUND, Address("10.9.0.3", 1), None)
        record.original = Address("10.96.0.1", 80)
        state.orders.offer(record, orders[0].target, state.orders.generation)
        assert not len(state.orders)
