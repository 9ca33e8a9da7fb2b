"""However many peers and endpoints there are, the metrics stay bounded, and nothing is counted twice or not at all."""

import random

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from meshnet.codec.mesh import read_mesh
from meshnet.errors import EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Attempt, Direction
from meshnet.proxy.state import ProxyState
from tests.proxy.test_state import a_state, mesh, open_breaker

MOST = 2000


async def samples(state: ProxyState, name: str) -> list[Sample]:
    text = (await state.metrics.scrape()).decode()
    families = text_string_to_metric_families(text)
    return [sample for family in families for sample in family.samples if sample.name == name]


async def test_peers_beyond_the_bound_are_counted_together() -> None:
    async with a_state(mesh(1)) as state:
        for number in range(MOST + 100):
            with state.registry.life(Direction.INBOUND, Address("10.9.0.1", 1), None) as record:
                record.source_identity = f"spiffe://mesh.example/ns/default/sa/web-{number}"
                record.connected = record.opened
                record.end(Reason.OK, EndedBy.CLIENT, "")
        for name in ("meshnet_tcp_connections_opened_total", "meshnet_tcp_connections_closed_total"):
            found = await samples(state, name)
            assert len(found) == MOST + 1
            assert sum(sample.value for sample in found) == MOST + 100
        [dropped] = await samples(state, "meshnet_dropped_series_total")
        assert dropped.value >= 100


async def test_of_very_many_endpoints_those_whose_breakers_are_not_closed_come_first() -> None:
    addresses = [f"10.{number >> 8}.{number & 255}.1" for number in range(MOST + 500)]
    endpoints = ", ".join(f"{{address: {address}}}" for address in addresses)
    text = "apiVersion: meshnet.dev/v1\nkind: Service\nmetadata: {name: db}\n"
    snapshot = read_mesh([("db.yaml", f"{text}spec: {{ports: [{{port: 80}}], endpoints: [{endpoints}]}}\n")], 1)
    async with a_state(snapshot) as state:
        (service,) = snapshot.services
        for endpoint in service.endpoints:
            known = state.endpoint(endpoint, service)
        for _ in range(service.traffic.breaker.failures):
            assert known.breaker.admit(1.0)
            known.breaker.failed(1.0, random.Random(1))
        for name in ("meshnet_breaker_state", "meshnet_endpoint_failures", "meshnet_endpoint_connections"):
            assert len(await samples(state, name)) == MOST
        [troubled] = [each for each in await samples(state, "meshnet_breaker_state") if each.value > 0]
        assert troubled.labels["endpoint"] == f"{addresses[-1]}:80"
        [failing] = [each for each in await samples(state, "meshnet_endpoint_failures") if each.value > 0]
        assert failing.labels == troubled.labels
        for endpoint in service.endpoints:
            open_breaker(state.endpoint(endpoint, service))
        assert len(await samples(state, "meshnet_breaker_state")) == MOST


async def test_times_of_services_beyond_the_bound_are_counted_together() -> None:
    async with a_state(mesh(1)) as state:
        for number in range(600):
            with state.registry.life(Direction.OUTBOUND, Address("10.9.0.1", 1), None) as record:
                record.service, record.connected = f"service-{number}:80", record.opened
                record.end(Reason.OK, EndedBy.CLIENT, "")
        found = await samples(state, "meshnet_tcp_connect_seconds_count")
        assert len(found) == 501
        assert sum(sample.value for sample in found) == 600


async def test_time_in_the_queue_and_retries_are_counted_by_service() -> None:
    async with a_state(mesh(1)) as state:
        for denied in (False, True):
            with state.registry.life(Direction.OUTBOUND, Address("10.9.0.1", 1), None) as record:
                record.service, record.queued, record.retry_denied = "api:80", 0.02, denied
                record.attempts += [Attempt(endpoint=f"10.0.0.{at}:80", result="connect.refused", ms=1) for at in "123"]
                record.end(Reason.CONNECT_REFUSED, EndedBy.PROXY, "")
            view = record.view()
            assert (view.queue_ms, view.retries, view.retry_denied) == (20.0, 2, denied)
        retries = {each.labels["result"]: each.value for each in await samples(state, "meshnet_retries_total")}
        assert retries == {"made": 4, "denied": 1}
        [count] = await samples(state, "meshnet_tcp_queue_seconds_count")
        assert (count.value, count.labels["destination_service"]) == (2, "api:80")
