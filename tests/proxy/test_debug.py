"""What `meshnet log level debug` makes a sidecar tell, and that it tells no more of it afterwards."""

import pytest

from meshnet.model.resource import API_VERSION, CheckSpec, Metadata, TrafficPolicy, TrafficPolicySpec
from tests.proxy.conftest import API, Hosts
from tests.proxy.programs import Records, accept, is_reset, listen
from tests.world import wait_for

pytestmark = pytest.mark.netns


def test_attempts_handshakes_and_requests_are_told_for_as_long_as_they_are_asked_for(hosts: Hosts) -> None:
    web = hosts.sidecar(hosts.web)
    web.meshnet("log", "level", "proxy=debug", "tunnel=debug", "admin=debug")
    out = Records(web)
    assert is_reset(hosts.web, API, 8080)
    record = out.one()
    identity = hosts.mesh.identity("api")

    def told(text: str) -> bool:
        return text in hosts.log(hosts.web)

    wait_for(lambda: told(f"DEBUG meshnet.proxy '{record.id}': {record.endpoint} connect.refused after "))
    wait_for(lambda: told(f"DEBUG meshnet.tunnel tunnel to {hosts.api.address}:15108, {identity}: "))
    wait_for(lambda: told("DEBUG meshnet.admin asked by user 0: ListConnections("))
    web.meshnet("log", "level", "proxy=default", "tunnel=default", "admin=default")
    count = hosts.log(hosts.web).count("DEBUG")
    assert is_reset(hosts.web, API, 8080)
    last = out.ended(2)[-1]
    wait_for(lambda: told(f'{{"id":"{last.id}"'))
    assert hosts.log(hosts.web).count("DEBUG") == count


def test_who_opens_a_connection_is_told_while_it_is_open(hosts: Hosts) -> None:
    web, api = hosts.sidecar(hosts.web), hosts.sidecar(hosts.api)
    for sidecar in (web, api):
        sidecar.meshnet("log", "level", "access=debug", "--for", "10m")
    out, identity = Records(web), hosts.mesh.identity("web")
    with listen(hosts.api, 8080) as server, hosts.web.connect(API, 8080), accept(server):
        (record,) = out.open()
        opened = f"DEBUG meshnet.access opened '{record.id}': "
        wait_for(lambda: f"{opened}outbound {record.source.address} -> {API}:8080, " in hosts.log(hosts.web))
        wait_for(lambda: f"{opened}inbound " in hosts.log(hosts.api))
        (line,) = (line for line in hosts.log(hosts.api).splitlines() if opened in line)
        assert line.endswith(f"service 'api:8080', endpoint {hosts.api.address}:8080, as {identity!r}")
    for sidecar in (web, api):
        sidecar.meshnet("log", "level", "access=default")


def test_checks_are_told(hosts: Hosts) -> None:
    web = hosts.sidecar(hosts.web)
    web.meshnet("log", "level", "checks=debug")
    hosts.write(
        TrafficPolicy(
            api_version=API_VERSION,
            metadata=Metadata(name="patient"),
            spec=TrafficPolicySpec(services=("api", "pair"), check=CheckSpec(interval="100ms")),
        )
    )
    wait_for(
        lambda: f"DEBUG meshnet.checks check of {hosts.api.address}:8080 of api:8080: conn" in hosts.log(hosts.web)
    )
    web.meshnet("log", "level", "checks=default")
