"""What peers ask for through tunnels, answered under standing orders: on the wire as before, and recorded as before."""

import itertools
import socket
import struct
from collections.abc import Iterator

import msgspec
import pytest

from meshnet.codec.frames import Data, Fin, GoAway, Open, Opened, Ping, Pong, Refused, Reset, encode
from meshnet.model.connection import Security
from meshnet.model.resource import API_VERSION, AccessPolicy, AccessPolicySpec, Metadata
from meshnet.model.service import Action, Rule, Source
from tests.proxy.conftest import API, Hosts
from tests.proxy.metrics import value
from tests.proxy.peer import Peer, credentials, issue
from tests.proxy.programs import Records, accept, converse, ended_by_rst, is_reset, listen, nobody_came, read, reason
from tests.proxy.test_orders import by_order, told
from tests.world import wait_for

pytestmark = pytest.mark.netns

PORT = 8080


@pytest.fixture
def server(hosts: Hosts) -> Iterator[socket.socket]:
    with listen(hosts.api, PORT) as server:
        yield server


@pytest.fixture
def ordered(hosts: Hosts, peer: Peer, server: socket.socket) -> Peer:
    """A tunnel on which connections to the server are under an order."""
    with_peer(hosts, peer, server)
    return peer


def with_peer(hosts: Hosts, peer: Peer, server: socket.socket) -> str:
    """A whole connection through the tunnel; its id."""
    connection_id = new_id()
    assert ask(hosts, peer, connection_id) == Opened()
    with accept(server) as app:
        peer.send(b"question")
        assert read(app, 8) == b"question"
        app.sendall(b"answer")
        peer.sock.sendall(peer.wire.fin())
        assert app.recv(1) == b""
    assert bytes(peer.frame().payload) == b"answer"  # type: ignore[union-attr] # it is DATA
    assert peer.frame() == Fin()
    return connection_id


def ask(hosts: Hosts, peer: Peer, connection_id: str = "", port: int = PORT) -> object:
    source = f"{hosts.web.address}:40000"
    return peer.open(hosts.api.address, port, source=source, id=connection_id or new_id())


_numbers = itertools.count(1)


def new_id() -> str:
    """Records are told apart by them, and each test looks at its own."""
    return f"own{next(_numbers):05}"


def test_both_sides_tell_it_as_before(hosts: Hosts, server: socket.socket) -> None:
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(hosts.api))
    before, count = by_order(hosts.api), 0
    while by_order(hosts.api) - before < 2:  # an OPEN that comes before Python waits for one is Python's own
        converse(hosts.web.connect(API, PORT), accept(server))
        count += 1
        assert count < 100
    decided, *ordered = into.ended(count)
    assert decided.tls.mode is Security.MTLS
    assert [told(connection) for connection in ordered] == [told(decided)] * (count - 1)
    sent = {each.id: (each.source.address, each.bytes_sent, each.bytes_received) for each in out.ended(count)}
    assert {each.id: (each.source.address, each.bytes_sent, each.bytes_received) for each in into.ended(count)} == sent
    labels = {"reporter": "destination", "connection_security_policy": "mutual_tls", "destination_service": "api:8080"}
    assert value(hosts.api, "meshnet_tcp_connections_closed_total", **labels) >= count


def test_one_lease_after_another_on_one_tunnel(hosts: Hosts, ordered: Peer, server: socket.socket) -> None:
    into, before = Records(hosts.sidecar(hosts.api)), by_order(hosts.api)
    ids = [with_peer(hosts, ordered, server) for _ in range(30)]
    assert [each.id for each in into.ended(30)] == ids
    assert by_order(hosts.api) - before == 30
    assert {each.source.address for each in into.now()} == {f"{hosts.web.address}:40000"}


def test_all_in_one_record_open_data_and_fin(hosts: Hosts, ordered: Peer, server: socket.socket) -> None:
    request = Open(host=hosts.api.address, port=PORT, source=f"{hosts.web.address}:5", id=new_id())
    wire = ordered.wire
    ordered.sock.sendall(wire.open(request) + wire.data(5) + b"early" + wire.fin())
    with accept(server) as app:
        assert read(app, 5) == b"early"
        assert app.recv(1) == b""
        app.sendall(b"late")
    assert [ordered.frame() for _ in range(1)] == [Opened()]
    assert bytes(ordered.frame().payload) == b"late"  # type: ignore[union-attr] # it is DATA
    assert ordered.frame() == Fin()
    with_peer(hosts, ordered, server)


def test_a_reset_right_behind_open_is_answered_by_the_rules(hosts: Hosts, ordered: Peer, server: socket.socket) -> None:
    into = Records(hosts.sidecar(hosts.api))
    request = Open(host=hosts.api.address, port=PORT, source=f"{hosts.web.address}:5", id=new_id())
    ordered.sock.sendall(ordered.wire.open(request) + ordered.wire.reset("peer.rst"))
    # OPENED, which the wire passes over, and then the end of the other half.
    wait_for(lambda: ordered.wire.lease_over or ordered.wire.receive(ordered.sock.recv(4096)), what="the lease is over")
    assert reason(into.one()) == "peer.rst by client in connect"
    server.settimeout(0.2)
    try:
        accept(server).close()  # the handshake may have been faster
    except TimeoutError:
        pass
    server.settimeout(5)
    with_peer(hosts, ordered, server)


@pytest.mark.parametrize("by", ["client", "application"])
def test_a_reset_within_a_lease_costs_no_tunnel(hosts: Hosts, ordered: Peer, server: socket.socket, by: str) -> None:
    into = Records(hosts.sidecar(hosts.api))
    assert ask(hosts, ordered) == Opened()
    app = accept(server)
    if by == "client":
        ordered.sock.sendall(ordered.wire.reset("peer.rst"))
        with app:
            assert ended_by_rst(app)
        wait_for(lambda: ordered.wire.lease_over or ordered.wire.receive(ordered.sock.recv(4096)), what="it is over")
        assert reason(into.one()) == "peer.rst by client in data"
    else:
        app.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        app.close()
        assert ordered.frame() == Reset(reason="peer.rst")
        ordered.sock.sendall(ordered.wire.fin())
        assert reason(into.one()) == "peer.rst by server in data"
    with_peer(hosts, ordered, server)


def test_a_reset_that_comes_late_is_passed_over(hosts: Hosts, ordered: Peer, server: socket.socket) -> None:
    """Behind the FIN of a lease that is over by then: meshnet/tunnel/protocol.py."""
    for _ in range(3):
        with_peer(hosts, ordered, server)
        ordered.sock.sendall(encode(Reset(reason="peer.rst")))
    with_peer(hosts, ordered, server)


def test_pings_and_orders_take_turns(hosts: Hosts, ordered: Peer, server: socket.socket) -> None:
    for _ in range(5):
        ordered.sock.sendall(ordered.wire.ping())
        assert ordered.frame() == Pong()
        with_peer(hosts, ordered, server)


def test_open_in_pieces_is_for_python_and_served_all_the_same(
    hosts: Hosts, ordered: Peer, server: socket.socket
) -> None:
    request = ordered.wire.open(Open(host=hosts.api.address, port=PORT, source=f"{hosts.web.address}:9", id=new_id()))
    for at in range(0, len(request), 7):
        ordered.sock.sendall(request[at : at + 7])
    assert ordered.frame() == Opened()
    accept(server).close()
    assert ordered.frame() == Fin()
    ordered.sock.sendall(ordered.wire.fin())
    with_peer(hosts, ordered, server)


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        pytest.param({"source": "10.9.9.9:1"}, None, id="a source on another host"),
        pytest.param({"source": "nonsense"}, None, id="a source that is none"),
        pytest.param({"source": ""}, None, id="no source"),
        pytest.param({"id": "x" * 60}, 5, id="a long id"),
        pytest.param({"id": 'a"b'}, 5, id="an id that JSON escapes"),
        pytest.param({"traceparent": "00-" + "a" * 32}, 5, id="a field more"),
        pytest.param({"service": "\u00e4pi"}, 5, id="a service beyond ASCII"),
        pytest.param({"deadline": 300}, 5, id="in a hurry"),
    ],
)
def test_an_unusual_open_is_decided_as_ever(
    hosts: Hosts,
    ordered: Peer,
    server: socket.socket,
    fields: dict[str, str | int],
    source: int | None,
) -> None:
    into, before = Records(hosts.sidecar(hosts.api)), by_order(hosts.api)
    usual = {"source": f"{hosts.web.address}:5", "id": new_id()}
    ordered.sock.sendall(ordered.wire.open(Open(host=hosts.api.address, port=PORT, **(usual | fields))))  # type: ignore[arg-type] # all text
    assert ordered.frame() == Opened()
    accept(server).close()
    ordered.sock.sendall(ordered.wire.fin())
    assert ordered.frame() == Fin()
    one = into.one()
    assert one.id == (usual | fields)["id"]
    assert by_order(hosts.api) == before
    host, _, port = one.source.address.rpartition(":")
    assert host == hosts.web.address, "the tunnel's, if what the peer says is not believed"
    assert source is None or int(port) == source
    with_peer(hosts, ordered, server)


def test_another_target_is_another_decision(hosts: Hosts, ordered: Peer) -> None:
    refused = ask(hosts, ordered, port=15120)
    assert isinstance(refused, Refused)
    assert refused.reason == "loop"


def test_another_identity_from_the_same_host_is_another_decision(
    hosts: Hosts, ordered: Peer, server: socket.socket
) -> None:
    """It is denied, though the order for the first one stands."""
    rule = Rule(source=Source(principals=(hosts.mesh.identity("web"),)))
    hosts.write(
        AccessPolicy(
            api_version=API_VERSION,
            metadata=Metadata(name="only-web"),
            spec=AccessPolicySpec(action=Action.ALLOW, services=("api",), rules=(rule,)),
        )
    )
    with_peer(hosts, ordered, server)
    with_peer(hosts, ordered, server)
    with Peer(hosts.web, hosts.api, credentials(issue(hosts.mesh, "mallory")).client) as other:
        refused = ask(hosts, other)
    assert isinstance(refused, Refused)
    assert refused.reason == "authz.denied"
    assert nobody_came(server)


def test_policy_that_forbids_it_ends_the_order_and_what_it_began(
    hosts: Hosts, ordered: Peer, server: socket.socket
) -> None:
    into = Records(hosts.sidecar(hosts.api))
    assert ask(hosts, ordered) == Opened()
    app = accept(server)
    rule = Rule(source=Source(principals=(hosts.mesh.identity("web"),)))
    spec = AccessPolicySpec(action=Action.DENY, rules=(rule,))
    hosts.write(AccessPolicy(api_version=API_VERSION, metadata=Metadata(name="not-web"), spec=spec))
    with app:
        assert ended_by_rst(app)
    assert ordered.frame() == Reset(reason="authz.revoked")
    ordered.sock.sendall(ordered.wire.fin())
    refused = ask(hosts, ordered)
    assert isinstance(refused, Refused)
    assert (refused.reason, refused.policy) == ("authz.denied", "not-web")
    assert [reason(each).partition(" ")[0] for each in into.ended(2)] == ["authz.revoked", "authz.denied"]


def test_an_application_that_is_gone_is_told_once_and_costs_no_tunnel(hosts: Hosts, peer: Peer) -> None:
    with listen(hosts.api, PORT) as server:
        with_peer(hosts, peer, server)
        with_peer(hosts, peer, server)
    into = Records(hosts.sidecar(hosts.api))
    ids = [new_id(), new_id()]
    for connection_id in ids:
        refused = ask(hosts, peer, connection_id)
        assert isinstance(refused, Refused)
        assert refused.reason == "connect.refused"
    why = "connect.refused by proxy in connect"
    assert [(each.id, reason(each)) for each in into.ended(2)] == [(ids[0], why), (ids[1], why)]
    with listen(hosts.api, PORT) as server:
        with_peer(hosts, peer, server)


def test_a_tunnel_that_breaks_within_a_lease_resets_the_application(
    hosts: Hosts, ordered: Peer, server: socket.socket
) -> None:
    into = Records(hosts.sidecar(hosts.api))
    assert ask(hosts, ordered) == Opened()
    with accept(server) as app:
        ordered.sock.close()
        assert ended_by_rst(app)
    assert reason(into.one()) == "tunnel.lost by peer-proxy in data"


def test_a_peer_that_breaks_the_protocol_within_a_lease_ends_it(
    hosts: Hosts, ordered: Peer, server: socket.socket
) -> None:
    into = Records(hosts.sidecar(hosts.api))
    assert ask(hosts, ordered) == Opened()
    with accept(server) as app:
        ordered.sock.sendall(encode(Ping()))
        assert ended_by_rst(app)
    assert reason(into.one()) == "tunnel.protocol by peer-proxy in data"


def test_a_goaway_of_the_peer_within_a_lease_lets_it_end_well(
    hosts: Hosts, ordered: Peer, server: socket.socket
) -> None:
    assert ask(hosts, ordered) == Opened()
    with accept(server) as app:
        ordered.sock.sendall(encode(GoAway()))
        app.sendall(b"x")
        assert isinstance(ordered.frame(), Data)
        ordered.sock.sendall(ordered.wire.fin())
        assert app.recv(1) == b""
    assert ordered.frame() == Fin()
    assert ordered.is_closed(), "it will carry no other lease"


def test_what_came_behind_open_is_not_lost_when_the_application_is_gone(hosts: Hosts, peer: Peer) -> None:
    with listen(hosts.api, PORT) as server:
        with_peer(hosts, peer, server)
    into = Records(hosts.sidecar(hosts.api))
    request = Open(host=hosts.api.address, port=PORT, source=f"{hosts.web.address}:5", id=new_id())
    peer.sock.sendall(peer.wire.open(request) + peer.wire.data(5) + b"early" + encode(GoAway()) + peer.wire.fin())
    refused = peer.frame()
    assert isinstance(refused, Refused)
    assert refused.reason == "connect.refused"
    assert into.one().id == request.id
    assert peer.is_closed(), "it has said GOAWAY"


def test_a_client_whose_call_is_refused_by_nobody_listening(hosts: Hosts) -> None:
    with listen(hosts.api, PORT) as server:
        for _ in range(3):
            converse(hosts.web.connect(API, PORT), accept(server))
    out = Records(hosts.sidecar(hosts.web))
    assert is_reset(hosts.web, API, PORT)
    failed = out.one()
    assert reason(failed).startswith("connect.refused")
    assert msgspec.to_builtins(failed)["attempts"]
