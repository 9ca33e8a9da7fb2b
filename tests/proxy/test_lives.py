"""A connection's life through the mesh, as both sidecars record it."""

import os
import socket

import msgspec
import pytest

from meshnet.model.connection import Direction, Security, State
from meshnet.model.resource import EndpointSpec
from meshnet.model.service import TunnelKind
from meshnet.relay.native import MISSING
from tests.proxy.conftest import API, API6, PAIR, PLAIN, Hosts
from tests.proxy.programs import Records, accept, converse, is_reset, listen, nobody_came, reason
from tests.world import wait_for

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("address", [API, API6])
def test_a_connection_to_a_service_reaches_its_endpoint_and_both_sidecars_tell_the_same_story(
    hosts: Hosts, address: str
) -> None:
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(hosts.api))
    with listen(hosts.api, 8080) as server:
        client = hosts.web.connect(address, 8080)
        source = client.getsockname()
        converse(client, accept(server), b"q" * 1000, b"a" * 70_000)

    there, here = out.one(), into.one()
    assert there.id == here.id
    assert (there.direction, here.direction) == (Direction.OUTBOUND, Direction.INBOUND)
    web, api = hosts.mesh.identity("web"), hosts.mesh.identity("api")
    for record in (there, here):
        assert (record.bytes_sent, record.bytes_received) == (1000, 70_000)
        assert reason(record) == "ok by client in data"
        assert record.state is State.CLOSED
        assert (record.source.identity, record.destination.identity) == (web, api)
        assert record.destination.service == "api:8080"
        assert record.endpoint == f"{hosts.api.address}:8080"
        assert (record.tls.mode, record.tls.version) == (Security.MTLS, "TLSv1.3")
        assert [attempt.result for attempt in record.attempts] == ["ok"]
        assert record.connect_ms is not None
        assert 0 < record.connect_ms < record.duration_ms < 5000
        assert record.opened_at <= record.closed_at
        assert record.relay == os.environ.get("MESHNET_RELAY", "python" if MISSING else "native")
    assert there.tls.peer_identity == api
    assert here.tls.peer_identity == web
    assert there.original_destination == (f"[{address}]:8080" if ":" in address else f"{address}:8080")
    # The source is believed where it is on the peer's host; over another family it is not.
    port = f":{source[1]}"
    assert there.source.address.endswith(port)
    assert here.source.address.startswith(f"{hosts.web.address}:")
    assert here.source.address.endswith(port) is (":" not in address)


def test_a_connection_to_an_address_outside_the_mesh_passes_through_in_plain_text(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.outside, 5555) as server:
        client = hosts.web.connect(hosts.outside.address, 5555)
        converse(client, accept(server))
    record = out.one()
    assert reason(record) == "ok by client in data"
    assert record.tls.mode is Security.PLAIN
    assert (record.destination.service, record.destination.identity) == ("", "")
    assert record.endpoint == record.original_destination == f"{hosts.outside.address}:5555"


def test_an_ipv6_address_outside_the_mesh_passes_through_too(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.outside, 5555) as server:
        client = hosts.web.connect(hosts.outside.address6, 5555)
        converse(client, accept(server))
    assert out.one().endpoint == f"[{hosts.outside.address6}]:5555"


def test_a_service_of_plain_endpoints_is_balanced_and_not_encrypted(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.outside, 6000) as server:
        client = hosts.web.connect(PLAIN, 6000)
        converse(client, accept(server))
    record = out.one()
    assert (record.destination.service, record.tls.mode) == ("plain:6000", Security.PLAIN)
    assert record.endpoint == f"{hosts.outside.address}:6000"


@pytest.mark.parametrize("named", ["api", "twin"])
def test_a_client_that_names_an_endpoint_gets_that_endpoint_through_its_tunnel(hosts: Hosts, named: str) -> None:
    host = hosts.api if named == "api" else hosts.twin
    other = hosts.twin if named == "api" else hosts.api
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(host))
    with listen(host, 7000) as server, listen(other, 7000) as elsewhere:
        for _ in range(3):
            converse(hosts.web.connect(host.address, 7000), accept(server))
        assert nobody_came(elsewhere)
    for record in (*out.ended(3), *into.ended(3)):
        assert (record.tls.mode, record.destination.service) == (Security.MTLS, "pair:7000")


def test_both_endpoints_of_a_service_get_their_share(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 7000) as api, listen(hosts.twin, 7000) as twin:
        # Both stay open, so the least loaded endpoint of the second is the other one.
        clients = [hosts.web.connect(PAIR, 7000) for _ in range(2)]
        for client, app in zip(clients, (accept(api), accept(twin)), strict=True):
            client.close()
            app.close()
    assert {record.endpoint for record in out.ended(2)} == {
        f"{hosts.api.address}:7000",
        f"{hosts.twin.address}:7000",
    }


def test_an_endpoint_may_have_an_ipv6_address(hosts: Hosts) -> None:
    service = hosts.mesh.service("api", [8080], [hosts.api], addresses=[API])
    endpoint = EndpointSpec(address=hosts.api.address6, tunnel=TunnelKind.MESHNET, identity=hosts.mesh.identity("api"))
    spec = msgspec.structs.replace(service.spec, endpoints=(endpoint,))
    hosts.write(msgspec.structs.replace(service, spec=spec))
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(hosts.api))
    with listen(hosts.api, 8080) as server:
        converse(hosts.web.connect(API, 8080), accept(server))
    assert out.one().endpoint == into.one().endpoint == f"[{hosts.api.address6}]:8080"
    assert into.one().tls.mode is Security.MTLS


def test_what_a_host_says_to_itself_is_not_touched(hosts: Hosts) -> None:
    out, into = Records(hosts.sidecar(hosts.api)), Records(hosts.sidecar(hosts.api))
    with listen(hosts.api, 8080) as server:
        for address in ("127.0.0.1", "::1", hosts.api.address):
            converse(hosts.api.connect(address, 8080), accept(server))
    assert (out.now(), into.now()) == ([], [])


@pytest.mark.produces("no_endpoint")
def test_a_service_without_endpoints_is_reset_with_its_own_reason(hosts: Hosts) -> None:
    hosts.write(hosts.mesh.service("api", [8080], [], addresses=[API]))
    out = Records(hosts.sidecar(hosts.web))
    assert is_reset(hosts.web, API, 8080)
    record = out.one()
    assert reason(record).startswith("no_endpoint by proxy")
    assert record.state is State.REFUSED


def test_the_canary_is_answered_by_the_outbound_side_itself(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    for address in ("192.0.2.2", "2001:db8::2"):
        with hosts.web.connect(address, 15122) as client:
            host = f"[{address}]" if ":" in address else address
            assert client.makefile().read() == f"meshnet-canary {host}:15122\n"
    assert {reason(record) for record in out.ended(2)} == {"ok by proxy in accept"}


def test_a_proof_that_comes_time_and_again_leaves_no_record(hosts: Hosts) -> None:
    out, before = Records(hosts.sidecar(hosts.web)), hosts.sidecar(hosts.web).status().opened_total
    for address in ("192.0.2.2", "2001:db8::2", "192.0.2.3", "2001:db8::3"):
        with hosts.web.connect(address, 15123) as client:
            host = f"[{address}]" if ":" in address else address
            assert client.makefile().read() == f"meshnet-canary {host}:15123\n"
    wait_for(lambda: hosts.sidecar(hosts.web).status().open_connections == 0)
    assert out.now() == []
    assert hosts.sidecar(hosts.web).status().opened_total == before


def test_a_great_deal_of_data_arrives_whole_in_both_directions(hosts: Hosts) -> None:
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(hosts.api))
    block = bytes(range(256)) * 4096
    with listen(hosts.api, 8080) as server, hosts.web.connect(API, 8080) as client, accept(server) as app:
        for _ in range(8):
            for near, far in ((client, app), (app, client)):
                sent = 0
                near.setblocking(False)
                received = bytearray()
                while len(received) < len(block):
                    try:
                        sent += near.send(block[sent:]) if sent < len(block) else 0
                    except BlockingIOError:
                        pass
                    received += far.recv(len(block)) if sent > len(received) else b""
                near.settimeout(5)
                assert received == block
        client.shutdown(socket.SHUT_WR)
        assert app.recv(1) == b""
        app.close()
    for record in (out.one(), into.one()):
        assert (record.bytes_sent, record.bytes_received) == (8 * len(block), 8 * len(block))


def test_an_application_bound_to_loopback_only_stays_closed_kuma4630(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with hosts.api.open_socket() as server:
        server.bind(("127.0.0.1", 8080))
        server.listen()
        with pytest.raises(ConnectionResetError), hosts.web.connect(API, 8080) as client:
            client.recv(1)
        assert nobody_came(server)
    assert reason(out.one()).startswith("connect.refused")


def test_an_application_bound_to_the_hosts_address_only_is_reached_istio14738(hosts: Hosts) -> None:
    with hosts.api.open_socket() as server:
        server.settimeout(5)
        server.bind((hosts.api.address, 8080))
        server.listen()
        converse(hosts.web.connect(API, 8080), accept(server))
