"""What anybody on the network may send to a sidecar's ports; afterwards it must still be there and serve."""

import contextlib
import socket

import pytest

from meshnet.codec.frames import Fin, Open, Opened, Pong
from tests.proxy.conftest import API, Hosts
from tests.proxy.metrics import get
from tests.proxy.peer import TUNNEL_PORT, Peer, credentials, issue
from tests.proxy.programs import Records, accept, converse, listen, read, read_all, reason, reset

pytestmark = pytest.mark.netns

HEALTH_PORT = 15120


def serves(hosts: Hosts) -> None:
    with listen(hosts.api, 8080) as server:
        converse(hosts.web.connect(API, 8080), accept(server))


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n\r\n"])
@pytest.mark.parametrize("port", [TUNNEL_PORT, HEALTH_PORT, 15106, 8081])
def test_a_client_that_connects_and_resets_at_once_does_no_harm(hosts: Hosts, port: int, sent: bytes) -> None:
    for _ in range(20):
        # It may be faster than we are.
        with contextlib.suppress(ConnectionError), hosts.outside.connect(hosts.api.address, port) as client:
            client.sendall(sent)
            reset(client)
    serves(hosts)
    assert "Traceback" not in hosts.log(hosts.api)


@pytest.mark.produces("tls.handshake")
def test_plain_text_at_the_tunnel_port_is_a_failed_handshake(hosts: Hosts) -> None:
    into = Records(hosts.sidecar(hosts.api))
    with hosts.outside.connect(hosts.api.address, TUNNEL_PORT) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: api\r\n\r\n")
        try:
            while client.recv(4096):
                pass
        except ConnectionResetError:
            pass
    assert reason(into.one()).startswith("tls.handshake")


@pytest.mark.parametrize("method", ["HEAD", "GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", ["/healthz", "/metrics", "/readyz", "/nowhere", "/healthz?x=1"])
def test_the_health_port_answers_every_method_and_path(hosts: Hosts, method: str, path: str) -> None:
    with hosts.outside.connect(hosts.api.address, HEALTH_PORT) as client:
        client.sendall(f"{method} {path} HTTP/1.1\r\nHost: api\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert status == (405 if method in ("POST", "DELETE") else 404 if path == "/nowhere" else 200)
    assert (body == b"") is (method == "HEAD")
    serves(hosts)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /healthz HTTP/1.0\r\n\r\n",
        b"CONNECT api:80 HTTP/1.1\r\nHost: api\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: api\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: api\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: api\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: api\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: api\r\n\r\n" * 3,
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: api\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"A" * 100_000,
    ],
    ids=["1.0", "connect", "star", "upgrade", "expect", "chunk", "pipelined", "no-host", "9.9", "tls", "long"],
)
def test_the_health_port_outlives_every_kind_of_request(hosts: Hosts, sent: bytes) -> None:
    try:
        with hosts.outside.connect(hosts.api.address, HEALTH_PORT) as client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            read_all(client)
    except OSError:
        pass  # it need not hear us out
    assert get(hosts.api, "/healthz") == (200, "ok\n")
    assert "Traceback" not in hosts.log(hosts.api)


@pytest.mark.parametrize(
    "request_line",
    [
        b"nonsense\n",
        b"{}\n",
        b'{"type":"conns","recent":"x"}\n',
        b'{"type":"status","deep":' + b"[" * 60_000 + b"\n",
        b'{"type":"explain","id":"\xff\xfe"}\n',
        b'{"type":"nothing"}\n',
    ],
    ids=["nonsense", "empty", "wrong", "deep", "not-utf-8", "unknown"],
)
def test_what_is_no_request_is_refused_by_the_admin_socket(hosts: Hosts, request_line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(hosts.sidecar(hosts.api).settings.admin.socket)
        client.sendall(request_line)
        assert b'"kind":"Error"' in client.makefile("rb").readline()
    assert hosts.sidecar(hosts.api).status().ready


def test_two_peers_that_give_their_connections_the_same_id_are_two_records(hosts: Hosts, peer: Peer) -> None:
    into = Records(hosts.sidecar(hosts.api))
    context = credentials(issue(hosts.mesh, "twin")).client
    with listen(hosts.api, 8080) as server, Peer(hosts.twin, hosts.api, context) as other:
        for tunnel in (peer, other):
            assert isinstance(tunnel.open(hosts.api.address, 8080, id="same"), Opened)
        first, second = accept(server), accept(server)
        with first, second:
            assert {record.source.identity for record in into.open(2)} == {
                hosts.mesh.identity("web"),
                hosts.mesh.identity("twin"),
            }
        for tunnel in (peer, other):
            tunnel.sock.close()
    assert {record.id for record in into.ended(2)} == {"same"}


def test_the_next_open_may_come_in_one_record_with_the_end_of_the_lease(hosts: Hosts, peer: Peer) -> None:
    with listen(hosts.api, 8080) as server:
        assert isinstance(peer.open(hosts.api.address, 8080), Opened)
        accept(server).close()
        assert isinstance(peer.frame(), Fin)
        open_next = Open(host=hosts.api.address, port=8080)
        peer.sock.sendall(peer.wire.fin() + peer.wire.open(open_next))
        with accept(server) as app:
            assert isinstance(peer.frame(), Opened)
            peer.send(b"again")
            assert read(app, 5) == b"again"


def test_a_ping_between_leases_is_answered(hosts: Hosts, peer: Peer) -> None:
    for _ in range(3):
        peer.sock.sendall(peer.wire.ping())
        assert isinstance(peer.frame(), Pong)


def test_a_peer_that_goes_away_is_let_go(hosts: Hosts, peer: Peer) -> None:
    peer.sock.sendall(peer.wire.goaway())
    assert peer.is_closed()


def test_a_peer_that_breaks_the_protocol_between_leases_loses_its_tunnel(hosts: Hosts, peer: Peer) -> None:
    peer.sock.sendall(b"\x00\x00\x00\x01x")
    assert peer.is_closed()
    serves(hosts)


@pytest.mark.produces("tunnel.protocol")
def test_a_peer_that_breaks_the_protocol_in_a_lease_resets_the_application(hosts: Hosts, peer: Peer) -> None:
    into = Records(hosts.sidecar(hosts.api))
    with listen(hosts.api, 8080) as server:
        peer.open(hosts.api.address, 8080)
        with accept(server) as app:
            peer.sock.sendall(b"\xff\xff\xff\xff")
            with pytest.raises(ConnectionResetError):
                app.recv(1)
    assert reason(into.one()) == "tunnel.protocol by peer-proxy in data"


@pytest.mark.produces("tunnel.lost")
def test_a_tunnel_that_is_torn_in_a_lease_resets_the_application(hosts: Hosts, peer: Peer) -> None:
    into = Records(hosts.sidecar(hosts.api))
    with listen(hosts.api, 8080) as server:
        peer.open(hosts.api.address, 8080)
        with accept(server) as app:
            peer.sock.close()
            with pytest.raises(ConnectionResetError):
                app.recv(1)
    assert reason(into.one()) == "tunnel.lost by peer-proxy in data"


def test_an_application_s_address_is_believed_only_if_it_is_on_the_peer_s_host(hosts: Hosts, peer: Peer) -> None:
    into = Records(hosts.sidecar(hosts.api))
    told = {f"{hosts.web.address}:1234": True, f"{hosts.twin.address}:1234": False, "nonsense": False}
    with listen(hosts.api, 8080) as server:
        for source, believed in told.items():
            peer.open(hosts.api.address, 8080, source=source)
            accept(server).close()
            peer.frame()
            peer.sock.sendall(peer.wire.fin())
            assert (into.now()[-1].source.address == source) is believed
            assert into.now()[-1].source.address.startswith(f"{hosts.web.address}:")
