"""What `meshnet log level debug` makes a sidecar tell, and that it tells no more of it afterwards."""

import pytest

from meshnet.model.resource import API_VERSION, CheckSpec, Metadata, TrafficPolicy, TrafficPolicySpec
from tests.proxy.conftest import API, Hosts
from tests.proxy.programs import Records, is_reset
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
