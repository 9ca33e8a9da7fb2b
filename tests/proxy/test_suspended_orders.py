"""Very many orders that end together, in a state of its own: at once for who comes, and in slices for the loop."""

from itertools import pairwise

import trio

from meshnet.codec.mesh import read_mesh
from meshnet.model.snapshot import Snapshot
from meshnet.proxy.state import ProxyState
from tests.proxy.own_orders import order_all
from tests.proxy.test_state import a_state
from tests.world import eventually

MANY = 500
BETWEEN_LOOKS = 2 * 64  # a slice of the one task, and another: they have their turns in any order


def mesh(version: int, services: int = MANY) -> Snapshot:
    return read_mesh([("mesh.yaml", "---\n".join(map(service, range(services))))], version)


def service(number: int) -> str:
    return (
        f"apiVersion: meshnet.dev/v1\nkind: Service\nmetadata: {{name: service-{number}}}\n"
        "spec:\n  ports: [{port: 80}]\n"
        f"  endpoints: [{{address: 10.1.{number >> 8}.{number & 255}, tunnel: meshnet, identity: spiffe://a/b}}]\n"
    )


def places(state: ProxyState) -> int:
    return sum(held.limiter.open for held in state.services.values())


async def test_another_mesh_ends_all_in_one_step_and_what_they_have_comes_back_in_slices() -> None:
    async with a_state(mesh(1), "native") as state, trio.open_nursery() as nursery:
        order_all(state)
        assert len(state.orders) == MANY
        reserved = places(state) // MANY
        assert reserved
        seen = []
        nursery.start_soon(state.apply, mesh(2))
        while not seen or places(state):
            await trio.lowlevel.checkpoint()
            if not len(state.orders):
                seen.append(places(state) // reserved)
    assert max(seen) >= MANY - BETWEEN_LOOKS
    assert max(one - two for one, two in pairwise(seen)) <= BETWEEN_LOOKS


async def test_nobody_need_wait_for_what_an_address_of_the_host_has_ended() -> None:
    async with a_state(mesh(1, 2), "native") as state, trio.open_nursery() as nursery:
        order_all(state)
        nursery.start_soon(state.orders.run)
        state.orders.suspend_all()
        assert places(state)
        await eventually(lambda: not places(state), what="the places of suspended orders are free again")
        nursery.cancel_scope.cancel()


async def test_a_new_order_of_a_flow_outlives_the_suspended_one() -> None:
    async with a_state(mesh(1, 1), "native") as state:
        order_all(state)
        state.orders.suspend_all()
        assert not len(state.orders)
        order_all(state)
        (held,) = state.services.values()
        suspended, new = sorted(held.orders, key=lambda order: order.generation)
        assert (suspended.in_force, new.in_force) == (False, True)
        await state.orders.revoke_suspended()
        assert held.orders == {new}
        assert len(state.orders) == 1


async def test_who_finds_no_room_has_what_suspended_orders_have_reserved() -> None:
    async with a_state(mesh(1, 1), "native") as state:
        order_all(state)
        (held,) = state.services.values()
        state.orders.suspend_all()
        while held.orders:
            await state.enter(held)
        assert not held.limiter.pending
