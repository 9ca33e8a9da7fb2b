"""`meshnet ping` meets what a connection would meet, and leaves nothing behind."""

import json
import os
from pathlib import Path

import pytest
from msgspec import structs

from meshnet.errors import Reason
from meshnet.model.admin import Ping
from meshnet.model.ping import EndpointPing, PingResult
from meshnet.model.resource import (
    API_VERSION,
    BreakerSpec,
    CheckSpec,
    LimitsSpec,
    Metadata,
    TrafficPolicy,
    TrafficPolicySpec,
)
from meshnet_cli.client import ask
from tests.proxy.conftest import API, PAIR, PLAIN, SELF, Hosts
from tests.proxy.programs import Records, accept, echo, is_reset, listen, reason, stopped
from tests.proxy.test_config import policy
from tests.world import ProgramFailed, Sidecar, wait_for

pytestmark = pytest.mark.netns


def ping(sidecar: Sidecar, target: str, timeout: float = 3.0) -> PingResult:
    return ask(sidecar.settings.admin.socket, Ping(target=target, timeout=timeout), PingResult, timeout=timeout + 3)


def only(result: PingResult) -> EndpointPing:
    (item,) = result.items
    return item


def test_an_endpoint_is_reached_by_its_service_and_only_its_host_has_a_record(hosts: Hosts) -> None:
    web, api = hosts.sidecar(hosts.web), hosts.sidecar(hosts.api)
    wait_for(lambda: ping(web, f"{API}:8080").captured, what="capture is proved")
    into, out, tunnels = Records(api), Records(web), web.status().tunnels
    with echo(hosts.api, 8080) as count:
        result = ping(web, f"{API}:8080")
        assert count() == 1
    item = only(result)
    assert (result.route, result.service, result.captured, result.reason) == ("service", "api:8080", True, None)
    assert (item.endpoint, item.tunnel, item.breaker) == (f"{hosts.api.address}:8080", "meshnet", "closed")
    assert (item.identity, item.verdict, item.reason) == (hosts.mesh.identity("api"), "allowed", None)
    for milliseconds in (item.tcp_ms, item.tls_ms, item.open_ms):
        assert milliseconds is not None
        assert 0 < milliseconds < 3000
    assert reason(into.one()) == "ok by client in data"
    assert out.now() == []
    assert web.status().tunnels == tunnels


def test_it_can_be_named_by_service_or_by_endpoint_and_every_endpoint_is_tried(hosts: Hosts) -> None:
    web = hosts.sidecar(hosts.web)
    with echo(hosts.api, 7000), echo(hosts.twin, 7000):
        both = ping(web, "pair:7000")
        assert both.address == f"{PAIR}:7000"
        assert {item.identity for item in both.items} == {hosts.mesh.identity("api"), hosts.mesh.identity("twin")}
        assert all(item.reason is None for item in both.items)
        one = ping(web, f"{hosts.twin.address}:7000")
        assert (one.service, only(one).endpoint) == ("pair:7000", f"{hosts.twin.address}:7000")
    with pytest.raises(ProgramFailed, match="no service nobody:1 here"):
        web.meshnet("ping", "nobody:1")


def test_policy_of_the_far_side_is_heard_and_the_application_is_left_alone(hosts: Hosts) -> None:
    hosts.write(policy("not-web", hosts.mesh.identity("web")))
    with listen(hosts.api, 8080) as server:
        item = only(ping(hosts.sidecar(hosts.web), f"{API}:8080"))
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert (item.verdict, item.policy, item.identity) == ("denied", "not-web", hosts.mesh.identity("api"))
    assert item.reason is not None
    assert item.reason.code is Reason.AUTHZ_DENIED
    said = hosts.sidecar(hosts.web).meshnet("ping", "api:8080", check=False)
    assert "denied by not-web" in said
    with pytest.raises(ProgramFailed) as failed:
        hosts.sidecar(hosts.web).meshnet("ping", "api:8080")
    assert failed.value.status == 1


def test_nobody_listens_behind_a_sidecar_that_would_let_it_in(hosts: Hosts) -> None:
    item = only(ping(hosts.sidecar(hosts.web), f"{API}:8080"))
    assert item.reason is not None
    assert (item.reason.code, item.reason.phase, item.verdict) == (Reason.CONNECT_REFUSED, "connect", "allowed")


def test_somebody_else_than_the_mesh_says_is_not_spoken_to(hosts: Hosts) -> None:
    service = hosts.mesh.service("imposter", [8070], [hosts.api], addresses=["10.96.0.70"])
    (endpoint,) = service.spec.endpoints
    wrong = structs.replace(endpoint, identity=hosts.mesh.identity("twin"))
    hosts.write(structs.replace(service, spec=structs.replace(service.spec, endpoints=(wrong,))))
    with listen(hosts.api, 8070) as server:
        item = only(ping(hosts.sidecar(hosts.web), "10.96.0.70:8070"))
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert item.reason is not None
    assert (item.reason.code, item.identity, item.verdict) == (Reason.TLS_PEER_IDENTITY, "", "unknown")


def test_plain_endpoints_strangers_and_the_sidecar_itself(hosts: Hosts) -> None:
    web = hosts.sidecar(hosts.web)
    with echo(hosts.outside, 6000):
        item = only(ping(web, f"{PLAIN}:6000"))
        assert (item.tunnel, item.tls_ms, item.verdict, item.reason) == ("none", None, "unknown", None)
        past = ping(web, f"[{hosts.outside.address6}]:6000")
        assert (past.route, past.service, only(past).reason) == ("passthrough", "", None)
    own = ping(web, f"{hosts.web.address}:15101")
    assert own.reason is not None
    assert (own.route, own.reason.code, own.items) == ("refused", Reason.LOOP, ())


def test_an_endpoint_on_this_host_is_asked_of_its_own_policy(hosts: Hosts) -> None:
    web = hosts.sidecar(hosts.web)
    with echo(hosts.web, 9000):
        item = only(ping(web, f"{SELF}:9000"))
        assert (item.tunnel, item.verdict, item.reason) == ("local", "allowed", None)
        direct = ping(web, f"{hosts.web.address}:9000")
        assert (direct.captured, direct.capture) == (False, "capture.loopback_ports leaves it alone")
        for_all = policy("not-web", hosts.mesh.identity("web"))
        hosts.write(structs.replace(for_all, spec=structs.replace(for_all.spec, services=())))
        item = only(ping(web, f"{SELF}:9000"))
    assert item.reason is not None
    assert (item.verdict, item.policy, item.reason.code) == ("denied", "not-web", Reason.AUTHZ_DENIED)


def test_an_application_that_goes_on_is_reset_and_the_peer_has_no_connection_left(hosts: Hosts) -> None:
    api = hosts.sidecar(hosts.api)
    into = Records(api)
    with listen(hosts.api, 8080) as server:
        item = only(ping(hosts.sidecar(hosts.web), f"{API}:8080"))
        assert (item.reason, item.verdict) == (None, "allowed")
        with accept(server):
            assert reason(into.one()).startswith("peer.rst by client")
    assert api.status().open_connections == 0


def test_a_peer_that_stands_still_takes_no_longer_than_asked_and_leaves_no_socket(hosts: Hosts) -> None:
    web = hosts.sidecar(hosts.web)
    before = descriptors(web)
    with stopped(hosts.sidecar(hosts.api)):
        item = only(ping(web, f"{API}:8080", 0.5))
    assert item.reason is not None
    assert (item.reason.code, item.reason.phase, item.tcp_ms) == (Reason.TLS_HANDSHAKE, "tls", None)
    wait_for(lambda: descriptors(web) <= before, what="as many descriptors as before")


def test_what_checks_keep_connections_from_is_told(hosts: Hosts) -> None:
    spec = TrafficPolicySpec(services=("pair",), check=CheckSpec(interval="100ms", fall=1))
    hosts.write(TrafficPolicy(api_version=API_VERSION, metadata=Metadata(name="patient"), spec=spec))  # instead
    web = hosts.sidecar(hosts.web)
    with echo(hosts.api, 7000):

        def checks() -> dict[str, str]:
            return {item.identity: item.check for item in ping(web, "pair:7000").items}

        wanted = {hosts.mesh.identity("api"): "passing", hosts.mesh.identity("twin"): "failing"}
        wait_for(lambda: checks() == wanted, what="both are checked")
        assert "1 of 2 reached" in web.meshnet("ping", "pair:7000")  # a connection would get the other one
        assert only(ping(web, f"{hosts.twin.address}:7000")).check == ""  # who names it gets it all the same


def test_breakers_and_limits_of_connections_know_nothing_of_it(hosts: Hosts) -> None:
    spec = TrafficPolicySpec(
        services=("shaky",), breaker=BreakerSpec(failures=1, open_time="60s"), limits=LimitsSpec(max_connections=1)
    )
    hosts.write(
        hosts.mesh.service("shaky", [8090], [hosts.api], addresses=["10.96.0.60"]),
        TrafficPolicy(api_version=API_VERSION, metadata=Metadata(name="shaky"), spec=spec),
    )
    web = hosts.sidecar(hosts.web)
    assert only(ping(web, "shaky:8090")).reason is not None
    (view,) = web.endpoints("shaky").items
    assert (view.breaker, view.failures, view.connections) == ("closed", 0, 0)
    assert is_reset(hosts.web, "10.96.0.60", 8090)
    with echo(hosts.api, 8090):
        item = only(ping(web, "shaky:8090"))
        assert (item.reason, item.breaker) == (None, "open")
        told = json.loads(web.meshnet("ping", "shaky:8090", "-o", "json", check=False))
        assert told["items"][0]["items"][0]["breaker"] == "open"
        with pytest.raises(ProgramFailed):  # a connection would get none
            web.meshnet("ping", "shaky:8090")


def descriptors(sidecar: Sidecar) -> int:
    assert sidecar.process is not None
    return len(os.listdir(Path(f"/proc/{sidecar.process.pid}/fd")))
