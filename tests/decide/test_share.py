import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.codec.mesh import read_mesh
from meshnet.decide.share import share_of, share_of_mesh
from meshnet.model.service import Limits

MESH = """\
apiVersion: meshnet.dev/v1
kind: Service
metadata: {name: api}
spec: {addresses: [10.96.0.1], ports: [{port: 80}, {port: 81}], endpoints: [{address: 10.1.0.1}, {address: 10.1.0.2}]}
---
apiVersion: meshnet.dev/v1
kind: Service
metadata: {name: free}
spec: {addresses: [10.96.0.2], ports: [{port: 80}], endpoints: [{address: 10.1.0.3}]}
---
apiVersion: meshnet.dev/v1
kind: TrafficPolicy
metadata: {name: api}
spec: {services: [api], limits: {maxConnections: 5, maxPending: 4, maxConnectionsPerEndpoint: 1, queueTimeout: 7s}}
---
apiVersion: meshnet.dev/v1
kind: TrafficPolicy
metadata: {name: free}
spec: {services: [free], limits: {maxConnections: 0, maxPending: 0}}
"""


@pytest.mark.parametrize(
    ("limit", "workers", "share"), [(1024, 2, 512), (5, 2, 3), (1, 2, 1), (1, 64, 1), (65, 64, 2), (7, 1, 7), (0, 8, 0)]
)
def test_a_share_is_rounded_up_and_no_limit_stays_none(limit: int, workers: int, share: int) -> None:
    limits = Limits(max_connections=limit, max_pending=limit, max_connections_per_endpoint=limit)
    assert share_of(limits, workers) == Limits(
        max_connections=share, max_pending=share, max_connections_per_endpoint=share
    )


@given(st.integers(1, 10**6), st.integers(1, 64))
def test_all_shares_together_are_the_limit_or_less_than_one_for_each_worker_above_it(limit: int, workers: int) -> None:
    together = share_of(Limits(max_connections=limit), workers).max_connections * workers
    assert limit <= together < limit + workers


def test_a_mesh_has_the_shares_wherever_it_names_a_service_and_nothing_else_is_changed() -> None:
    whole = read_mesh([("mesh.yaml", MESH)], 3)
    mine = share_of_mesh(whole, 2)
    by_name = {service.name: service.traffic.limits for service in mine.services}
    api = Limits(max_connections=3, max_pending=2, max_connections_per_endpoint=1, queue_timeout=7.0)
    assert by_name == {"api:80": api, "api:81": api, "free:80": Limits(max_connections=0, max_pending=0)}
    assert {service.traffic.limits for service in mine.by_address.values()} == set(by_name.values())
    assert all(any(service is known for known in mine.services) for service in mine.by_address.values())
    assert all(any(service is known for known in mine.services) for service, _ in mine.by_endpoint.values())
    assert mine.by_endpoint.keys() == whole.by_endpoint.keys()
    assert whole == read_mesh([("mesh.yaml", MESH)], 3)
    unlimited = [msgspec.structs.replace(service, traffic=whole.services[0].traffic) for service in mine.services]
    assert [msgspec.structs.replace(s, traffic=whole.services[0].traffic) for s in whole.services] == unlimited
