"""What a sidecar says of itself: metrics, readiness and its log, in every form."""

import pytest

from meshnet.control.authority import CERTIFICATE
from tests.proxy.conftest import API, PAIR, Hosts
from tests.proxy.metrics import get, samples, value
from tests.proxy.programs import Records, accept, ask, converse, echo, is_reset, listen
from tests.world import Host, Mesh, World, wait_for

pytestmark = pytest.mark.netns

NAMES = {
    "meshnet_tcp_connections_opened_total",
    "meshnet_tcp_connections_closed_total",
    "meshnet_tcp_connections_failed_total",
    "meshnet_tcp_connections_open",
    "meshnet_tcp_sent_bytes_total",
    "meshnet_tcp_received_bytes_total",
    "meshnet_tcp_connection_duration_seconds_bucket",
    "meshnet_tcp_connection_duration_seconds_sum",
    "meshnet_tcp_connection_duration_seconds_count",
    "meshnet_tcp_connect_seconds_bucket",
    "meshnet_tls_handshake_seconds_bucket",
    "meshnet_tls_resumed_total",
    "meshnet_dropped_series_total",
    "meshnet_config_nacks_total",
    "meshnet_cert_renewals_total",
    "meshnet_event_loop_lag_seconds_bucket",
    "meshnet_build_info",
    "meshnet_breaker_state",
    "meshnet_endpoints",
    "meshnet_cert_expiry_timestamp_seconds",
    "meshnet_config_revision",
    "meshnet_config_age_seconds",
}


def test_prometheus_understands_every_metric(hosts: Hosts) -> None:
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(hosts.api))
    with echo(hosts.api, 8080):
        ask(hosts.web, API, 8080)
    assert is_reset(hosts.web, API, 8080)
    out.ended(2)
    wait_for(lambda: len(into.now()) == 4)  # the one that went well, and three attempts at the one that did not
    assert {sample.name for sample in samples(hosts.web)} >= NAMES
    # Only the inbound side asks for access, and only the outbound side has dialled an endpoint of the mesh.
    assert {sample.name for sample in samples(hosts.api)} >= NAMES - {"meshnet_breaker_state"} | {"meshnet_authz_total"}


def test_a_connection_is_counted_at_both_ends_with_who_and_what(hosts: Hosts) -> None:
    workloads = {
        "source_workload": "web",
        "source_workload_namespace": "default",
        "source_principal": hosts.mesh.identity("web"),
        "destination_service": "api:8080",
        "destination_workload": "api",
        "destination_principal": hosts.mesh.identity("api"),
        "connection_security_policy": "mutual_tls",
        "request_protocol": "tcp",
    }
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(hosts.api))
    ends = ((hosts.web, "source"), (hosts.api, "destination"))
    closed = "meshnet_tcp_connections_closed_total"
    before = [value(host, closed, reporter=reporter, **workloads) for host, reporter in ends]
    with echo(hosts.api, 8080):
        ask(hosts.web, API, 8080)
    out.one()
    into.one()
    after = [value(host, closed, reporter=reporter, **workloads) for host, reporter in ends]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1]


def test_a_failure_is_counted_under_its_reason(hosts: Hosts) -> None:
    failed = "meshnet_tcp_connections_failed_total"
    out = Records(hosts.sidecar(hosts.web))
    before = value(hosts.web, failed, response_flags="connect.refused")
    assert is_reset(hosts.web, PAIR, 7000)
    out.one()
    assert value(hosts.web, failed, response_flags="connect.refused") - before == 1


def test_a_sidecar_that_is_ready_says_so(hosts: Hosts) -> None:
    assert get(hosts.web, "/healthz") == (200, "ok\n")
    assert get(hosts.web, "/readyz") == (200, "ok\n")


def test_a_sidecar_without_a_mesh_or_a_certificate_lives_and_says_why_it_is_not_ready(world: World) -> None:
    web, mesh = world.host("web"), Mesh(world)
    mesh.directory.rmdir()
    sidecar = mesh.sidecar(web, start=False)
    (sidecar.config.parent / CERTIFICATE).unlink()
    sidecar.spawn()
    wait_for(lambda: web.listens(15120))
    wait_for(lambda: "no such directory" in why_not_ready(web))
    assert get(web, "/healthz")[0] == 200

    mesh.directory.mkdir()
    mesh.write(mesh.service("api", [8080], [world.host("api")], addresses=[API]))
    wait_for(lambda: "no certificate: there is no" in why_not_ready(web))
    assert "no such directory" not in why_not_ready(web)


def why_not_ready(host: Host) -> str:
    status, body = get(host, "/readyz")
    assert status == 503
    return body


@pytest.mark.parametrize("form", ["text", "off"])
def test_the_access_log_has_the_form_it_was_asked_for(hosts: Hosts, form: str) -> None:
    with listen(hosts.api, 8080) as server:
        host = hosts.world.host(f"logs-{form}")
        sidecar = hosts.mesh.sidecar(host, start=False, log={"access": form, "level": "error"})
        del hosts.mesh.sidecars[host.name]
        sidecar.start()
        sidecar.capture()
        converse(host.connect(API, 8080), accept(server))
    record = Records(sidecar, since_start=True).one()
    sidecar.stop()
    printed = sidecar.process.output if sidecar.process else ""
    if form == "off":
        assert printed == ""
    else:
        assert printed.count("\n") == 1
        assert f" {record.id} outbound {hosts.mesh.identity(host.name)} -> api:8080 " in printed
        assert printed.endswith("ok by client in data\n")
