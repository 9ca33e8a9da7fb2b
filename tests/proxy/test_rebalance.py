"""Which connections are ended for others to take their share: only where somebody equally near would take them."""

import pytest
import trio
from msgspec import structs

from meshnet.codec.mesh import read_mesh
from meshnet.model.address import Address
from meshnet.model.connection import Direction
from meshnet.model.service import Locality
from meshnet.model.snapshot import Snapshot
from meshnet.proxy.record import Record
from meshnet.proxy.state import ProxyState
from meshnet.proxy.upkeep import Upkeep
from tests.proxy.test_state import a_state

MESH = """\
apiVersion: meshnet.dev/v1
kind: Service
metadata: {name: db}
spec:
  ports: [{port: 80}]
  endpoints: [{address: 10.1.0.1, zone: here}, {address: 10.1.0.2, %(second)s}]
---
apiVersion: meshnet.dev/v1
kind: TrafficPolicy
metadata: {name: share}
spec: {services: [db], balance: %(balance)s, rebalance: {above: 1.2, perMinute: 600}}
"""


def mesh(second: str, balance: str = "least_conn") -> Snapshot:
    return read_mesh([("mesh.yaml", MESH % {"second": second, "balance": balance})], 1)


def hold(state: ProxyState, count: int) -> list[Record]:
    """So many connections to the first endpoint, idle for a while."""
    (service,) = state.snapshot.services
    first = service.endpoints[0]
    state.endpoint(first, service).open = count
    records = []
    for number in range(count):
        record = state.registry.life(Direction.OUTBOUND, Address("10.9.0.1", 1 + number), None).__enter__()
        record.endpoint, record.service, record.connected = first.name, service.name, record.opened
        record.opened -= 60
        records.append(record)
    return records


async def ended(snapshot: Snapshot) -> int:
    """How many of ten are ended."""
    async with a_state(snapshot) as state:
        state.here = Locality(zone="here")
        records = hold(state, 10)
        upkeep = Upkeep(state)
        upkeep._read_policies()
        await upkeep._rebalance()
        await trio.lowlevel.checkpoint()
        return sum(record.abort_reason is not None for record in records)


@pytest.mark.parametrize(
    ("second", "balance", "count"),
    [
        ("zone: here", "least_conn", 5),
        ("zone: elsewhere", "least_conn", 0),
        ("zone: here, weight: 0", "least_conn", 0),
        ("zone: here", "maglev", 0),
        ("zone: here", "first", 0),
    ],
)
async def test_they_are_ended_where_another_would_take_them(second: str, balance: str, count: int) -> None:
    assert await ended(mesh(second, balance)) == count


async def test_who_is_to_get_none_keeps_those_it_has() -> None:
    snapshot = mesh("zone: here")
    (service,) = snapshot.services
    first, second = service.endpoints
    drained = (structs.replace(first, weight=0), second)
    assert await ended(snapshot.with_ports({id(service): structs.replace(service, endpoints=drained)})) == 0
