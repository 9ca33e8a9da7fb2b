"""Connections that orders carry through tunnels: what the peer hears, what comes of each answer, and what is recorded.

The service `odd` is on `outside`, where the test itself is the peer sidecar.
"""

import os
import socket
from collections.abc import Iterator

import pytest

from meshnet.codec.frames import Data, Fin, Opened, Ping, Refused, Reset, encode
from meshnet.model.connection import Connection, Security
from meshnet.model.resource import API_VERSION, BreakerSpec, ConnectSpec, Metadata, TrafficPolicy, TrafficPolicySpec
from tests.proxy.conftest import API, Hosts
from tests.proxy.far import Far, FarTunnel, serving
from tests.proxy.programs import Records, accept, converse, ended_by_rst, listen, read, reason, reset, stopped
from tests.proxy.test_orders import by_order, told
from tests.world import Host, wait_for

pytestmark = pytest.mark.netns

ODD, PORT = "10.96.0.60", 5000


@pytest.fixture
def far(hosts: Hosts) -> Iterator[Far]:
    odd = hosts.mesh.service("odd", [PORT], [hosts.outside], addresses=[ODD])
    connect = ConnectSpec(attempts=2, attempt_timeout="3s", total_timeout="6s")
    spec = TrafficPolicySpec(services=("odd",), connect=connect, breaker=BreakerSpec(failures=1_000_000))
    hosts.write(odd, TrafficPolicy(api_version=API_VERSION, metadata=Metadata(name="odd"), spec=spec))
    with serving(hosts.outside, hosts.mesh) as far:
        yield far


@pytest.fixture
def tunnel(hosts: Hosts, far: Far) -> FarTunnel:
    """One that stands, and whose next lease is under an order."""
    client = call(hosts)
    tunnel = far.accept()
    tunnel.asked()
    tunnel.say(tunnel.wire.opened())
    tunnel.converse(client)
    wait_until_it_stands(hosts)
    return tunnel


def call(hosts: Hosts, data: bytes = b"") -> socket.socket:
    client = hosts.web.connect(ODD, PORT)
    client.settimeout(5)
    if data:
        client.sendall(data)
    return client


def wait_until_it_stands(hosts: Hosts, peer: Host | None = None) -> None:
    address = (peer or hosts.outside).address

    def stands() -> bool:
        tunnels = hosts.sidecar(hosts.web).status().tunnels
        return any(address in each.peer and (each.idle, each.leased) == (1, 0) for each in tunnels)

    wait_for(stands, what="a tunnel between leases")


def usual(hosts: Hosts, tunnel: FarTunnel) -> None:
    """A whole connection more through the same tunnel, under an order."""
    wait_until_it_stands(hosts)
    before = by_order(hosts.web)
    client = call(hosts)
    tunnel.asked()
    tunnel.say(tunnel.wire.opened())
    tunnel.converse(client)
    wait_for(lambda: by_order(hosts.web) == before + 1, what="an order carried it")


def tried(connection: Connection) -> list[str]:
    return [attempt.result for attempt in connection.attempts]


def test_both_sides_tell_it_as_what_was_decided(hosts: Hosts) -> None:
    out, into, before = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(hosts.api)), by_order(hosts.web)
    with listen(hosts.api, 8080) as server:
        for _ in range(5):
            converse(hosts.web.connect(API, 8080), accept(server))
            wait_until_it_stands(hosts, hosts.api)
    decided, *ordered = out.ended(5)
    assert by_order(hosts.web) - before == 4
    assert decided.tls.mode is Security.MTLS
    expected = told(decided)
    expected["tls"] = {**expected["tls"], "handshakeMs": None, "resumed": False}  # type: ignore[dict-item] # a view of it
    assert [told(connection) for connection in ordered] == [expected] * 4
    assert {each.id for each in into.ended(5)} == {each.id for each in (decided, *ordered)}
    assert len({each.id for each in ordered}) == 4
    assert [each.id for each in ordered] == sorted(each.id for each in ordered)


def test_the_time_of_an_attempt_is_for_its_handshake_and_the_answer_together(hosts: Hosts, far: Far) -> None:
    client = call(hosts)
    tunnel = far.accept(shakes_after=0.6)
    assert 0 < tunnel.asked().deadline <= 2400  # ms, of the 3000 that an attempt may take
    tunnel.say(tunnel.wire.opened())
    tunnel.converse(client)
    wait_until_it_stands(hosts)
    client = call(hosts)
    assert tunnel.asked().deadline == 3000  # nothing of it went into a handshake
    tunnel.say(tunnel.wire.opened())
    tunnel.converse(client)


def test_the_peer_hears_the_same_question(hosts: Hosts, far: Far) -> None:
    out = Records(hosts.sidecar(hosts.web))
    client = call(hosts)
    tunnel = far.accept()
    decided = tunnel.asked()
    assert decided.source == f"{hosts.web.address}:{client.getsockname()[1]}"
    tunnel.say(tunnel.wire.opened())
    tunnel.converse(client)
    wait_until_it_stands(hosts)
    client = call(hosts)
    ordered = tunnel.asked()
    assert ordered.source == f"{hosts.web.address}:{client.getsockname()[1]}"
    assert ordered.id != decided.id
    alike = ("host", "port", "service", "traceparent")
    assert [getattr(ordered, field) for field in alike] == [getattr(decided, field) for field in alike]
    assert decided.deadline <= ordered.deadline == 3000  # the first one's handshake took its part
    tunnel.say(tunnel.wire.opened())
    tunnel.converse(client)
    assert [each.id for each in out.ended(2)] == [decided.id, ordered.id]


def test_what_the_client_says_at_once_goes_along(hosts: Hosts, tunnel: FarTunnel) -> None:
    out = Records(hosts.sidecar(hosts.web))
    client = call(hosts, b"early")
    tunnel.asked()
    assert tunnel.read(5) == b"early"
    (asking,) = wait_for(out.now)
    assert asking.bytes_sent == 0, "nobody has said yet that it arrives"
    client.sendall(b"later")
    tunnel.say(tunnel.wire.opened())
    assert tunnel.read(5) == b"later"
    tunnel.converse(client)
    assert (out.one().bytes_sent, out.one().bytes_received) == (18, 6)


def test_more_than_a_frame_at_once(hosts: Hosts, tunnel: FarTunnel) -> None:
    data = os.urandom(200_000)
    client = call(hosts)
    client.settimeout(5)
    client.sendall(data)
    tunnel.asked()
    early = tunnel.frame()
    assert isinstance(early, Data)
    tunnel.say(tunnel.wire.opened())
    assert bytes(early.payload) + tunnel.read(len(data) - len(early.payload)) == data
    tunnel.converse(client)


def test_a_client_that_ends_before_the_answer_gets_its_answer(hosts: Hosts, tunnel: FarTunnel) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with call(hosts, b"all") as client:
        client.shutdown(socket.SHUT_WR)
        tunnel.asked()
        assert tunnel.read(3) == b"all"
        tunnel.say(tunnel.wire.opened())
        assert tunnel.frame() == Fin()
        tunnel.send(b"yes")
        tunnel.say(tunnel.wire.fin())
        assert client.recv(8) == b"yes"
        assert client.recv(8) == b""
    assert reason(out.one()) == "ok by client in data"
    usual(hosts, tunnel)


def test_an_answer_in_pieces(hosts: Hosts, tunnel: FarTunnel) -> None:
    client = call(hosts)
    tunnel.asked()
    answer = tunnel.wire.opened() + tunnel.wire.data(5) + b"hello"
    for at in range(len(answer)):
        tunnel.say(answer[at : at + 1])
    assert client.recv(5, socket.MSG_WAITALL) == b"hello"
    tunnel.converse(client)
    usual(hosts, tunnel)


def test_who_is_denied_is_reset_and_the_tunnel_serves_on(hosts: Hosts, tunnel: FarTunnel) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with call(hosts, b"early") as client:
        asked = tunnel.asked()
        tunnel.say(tunnel.wire.refused(Refused(reason="authz.denied", policy="strict", detail="not you")))
        assert ended_by_rst(client)
    denied = out.one()
    assert denied.id == asked.id
    assert reason(denied) == "authz.denied by policy in connect"
    assert (denied.policy, tried(denied), denied.bytes_sent) == ("strict", ["authz.denied"], 0)
    assert denied.tls.mode is Security.MTLS
    with call(hosts) as client:  # the order has gone, and this one is decided
        tunnel.asked()
        tunnel.say(tunnel.wire.opened())
        tunnel.converse(client)
    usual(hosts, tunnel)


def test_what_is_refused_is_tried_again_with_what_the_client_said(hosts: Hosts, tunnel: FarTunnel) -> None:
    out = Records(hosts.sidecar(hosts.web))
    client = call(hosts, b"early")
    first = tunnel.asked()
    assert tunnel.read(5) == b"early"
    tunnel.say(tunnel.wire.refused(Refused(reason="connect.refused", detail="nobody listens")))
    second = tunnel.asked()
    assert second.id == first.id
    assert tunnel.read(5) == b"early"
    tunnel.say(tunnel.wire.opened())
    tunnel.converse(client)
    recovered = out.one()
    assert tried(recovered) == ["connect.refused", "ok"]
    assert recovered.bytes_sent == 13


def test_a_tunnel_that_turns_out_to_be_dead_costs_nobody_a_connection(
    hosts: Hosts, far: Far, tunnel: FarTunnel
) -> None:
    out = Records(hosts.sidecar(hosts.web))
    client = call(hosts, b"early")
    first = tunnel.asked()
    reset(tunnel.sock)
    other = far.accept()
    assert other.asked().id == first.id
    assert other.read(5) == b"early"
    other.say(other.wire.opened())
    other.converse(client)
    assert tried(out.one()) == ["ok"], "it says nothing about the endpoint"
    usual(hosts, other)


def test_one_that_was_closed_while_it_stood_is_not_asked(hosts: Hosts, far: Far, tunnel: FarTunnel) -> None:
    tunnel.sock.close()
    client = call(hosts)
    other = far.accept()
    other.asked()
    other.say(other.wire.opened())
    other.converse(client)


def test_who_does_not_answer_is_given_up_in_time(hosts: Hosts, far: Far, tunnel: FarTunnel) -> None:
    out = Records(hosts.sidecar(hosts.web))
    client = call(hosts, b"early")
    asked = tunnel.asked()
    other = far.accept()
    assert other.asked().id == asked.id
    assert other.read(5) == b"early"
    other.say(other.wire.opened())
    other.converse(client)
    slow = out.one()
    assert tried(slow) == ["connect.timeout", "ok"]
    assert slow.attempts[0].detail == "the peer sidecar did not answer OPEN within 3 s"
    assert slow.attempts[0].ms >= 3000
    with pytest.raises((EOFError, ConnectionResetError)):
        tunnel.read(6)


@pytest.mark.parametrize("answer", ["opened", "refused"])
def test_a_client_that_gives_up_before_the_answer_costs_no_tunnel(hosts: Hosts, tunnel: FarTunnel, answer: str) -> None:
    out = Records(hosts.sidecar(hosts.web))
    client = call(hosts, b"early")
    tunnel.asked()
    assert tunnel.read(5) == b"early"
    reset(client)
    assert tunnel.frame() == Reset(reason="peer.rst")
    if answer == "opened":
        tunnel.say(tunnel.wire.opened(), tunnel.wire.fin())
    else:
        tunnel.say(tunnel.wire.refused(Refused(reason="connect.refused")))
    assert reason(out.one()) == "peer.rst by client in connect"
    usual(hosts, tunnel)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(encode(Fin()), id="an end before the answer"),
        pytest.param(b"\0\0\0\1x", id="bytes before the answer"),
        pytest.param(encode(Ping()), id="a question"),
        pytest.param(b"\xff\xff\xff\xff", id="no frame"),
        pytest.param(encode(Reset(reason="drain")) * 2, id="two late resets"),
        pytest.param(encode(Opened()) * 2, id="two answers"),
    ],
)
def test_a_peer_that_breaks_the_rules_loses_its_tunnel(
    hosts: Hosts, far: Far, tunnel: FarTunnel, answer: bytes
) -> None:
    out = Records(hosts.sidecar(hosts.web))
    client = call(hosts)
    tunnel.asked()
    tunnel.say(answer)
    if answer == encode(Opened()) * 2:  # it was up by then
        with client:
            assert ended_by_rst(client)
        assert reason(out.one()) == "tunnel.protocol by peer-proxy in data"
        return
    other = far.accept()
    other.asked()
    other.say(other.wire.opened())
    other.converse(client)
    assert tried(out.one()) == ["tunnel.protocol", "ok"]


def test_a_refusal_that_gives_no_reason_is_a_failure_like_others(hosts: Hosts, tunnel: FarTunnel) -> None:
    out = Records(hosts.sidecar(hosts.web))
    client = call(hosts)
    tunnel.asked()
    tunnel.wire.refused(Refused(reason="connect.refused"))
    tunnel.say(b"\3\0\0\2{}")
    tunnel.asked()
    tunnel.say(tunnel.wire.opened())
    tunnel.converse(client)
    assert tried(out.one()) == ["tunnel.protocol", "ok"]


def test_a_late_reset_before_the_answer_is_passed_over(hosts: Hosts, tunnel: FarTunnel) -> None:
    for _ in range(2):
        wait_until_it_stands(hosts)
        client = call(hosts)
        tunnel.asked()
        tunnel.say(encode(Reset(reason="peer.rst")), tunnel.wire.opened())
        tunnel.converse(client)


def test_a_peer_that_goes_away_is_asked_no_more(hosts: Hosts, far: Far, tunnel: FarTunnel) -> None:
    client = call(hosts)
    tunnel.asked()
    tunnel.say(tunnel.wire.opened(), tunnel.wire.goaway())
    tunnel.converse(client)
    client = call(hosts)
    other = far.accept()
    other.asked()
    other.say(other.wire.opened())
    other.converse(client)
    with pytest.raises(EOFError):
        tunnel.frame()


def test_a_word_between_leases_is_looked_at_and_the_tunnel_serves_on(hosts: Hosts, tunnel: FarTunnel) -> None:
    """A RESET that comes late: nobody may be left without a tunnel for it."""
    tunnel.say(encode(Reset(reason="peer.rst")))
    client = call(hosts)
    tunnel.asked()
    tunnel.say(tunnel.wire.opened())
    tunnel.converse(client)
    usual(hosts, tunnel)


def test_a_mesh_without_the_service_takes_its_tunnels_back(hosts: Hosts, far: Far, tunnel: FarTunnel) -> None:
    hosts.write(hosts.mesh.service("odd", [PORT + 1], [hosts.outside], addresses=[ODD]))
    client = hosts.web.connect(ODD, PORT + 1)
    client.settimeout(5)
    asked = tunnel.asked()
    assert asked.port == PORT + 1
    tunnel.say(tunnel.wire.opened())
    tunnel.converse(client)


def test_garbage_between_leases_costs_a_tunnel_and_nobody_a_connection(
    hosts: Hosts, far: Far, tunnel: FarTunnel
) -> None:
    with socket.socket(fileno=os.dup(tunnel.sock.fileno())) as raw:
        raw.send(b"this is no TLS record, whatever else it may be" * 3)
    client = call(hosts)
    other = far.accept()
    other.asked()
    other.say(other.wire.opened())
    other.converse(client)
    usual(hosts, other)


def test_what_was_said_early_goes_along_where_the_service_has_left_the_mesh(
    hosts: Hosts, far: Far, tunnel: FarTunnel
) -> None:
    """The application's own address: in the mesh a service's, without it nobody's."""
    address = hosts.outside.address
    client = hosts.web.connect(address, PORT)
    tunnel.asked()
    tunnel.say(tunnel.wire.opened())
    tunnel.converse(client)
    wait_until_it_stands(hosts)
    with listen(hosts.outside, PORT) as server, hosts.web.connect(address, PORT) as client:
        client.sendall(b"early")
        tunnel.asked()
        assert tunnel.read(5) == b"early"
        hosts.write()
        reset(tunnel.sock)
        with accept(server) as app:
            client.sendall(b"later")
            assert read(app, 10) == b"earlylater"


@pytest.mark.parametrize("ends", [False, True])
def test_not_a_byte_is_lost_where_the_tunnel_dies_while_much_is_said(
    hosts: Hosts, far: Far, tunnel: FarTunnel, ends: bool
) -> None:
    data = os.urandom(150_000)
    client = call(hosts)
    tunnel.asked()
    with stopped(hosts.sidecar(hosts.web)):  # so that all of this comes at once
        client.sendall(data)
        if ends:
            client.shutdown(socket.SHUT_WR)
        reset(tunnel.sock)
    other = far.accept()
    other.asked()
    other.say(other.wire.opened())
    assert other.read(len(data)) == data
    client.close()


def test_a_late_reset_after_a_client_that_had_gone_before_it_was_asked_for(hosts: Hosts, tunnel: FarTunnel) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with stopped(hosts.sidecar(hosts.web)):
        reset(call(hosts))
    gone = out.one()
    assert reason(gone) == "peer.rst by client in connect"
    assert gone.tls.mode is Security.NONE, "nothing was said to the peer"
    tunnel.say(encode(Reset(reason="peer.rst")))
    client = call(hosts)
    tunnel.asked()
    tunnel.say(tunnel.wire.opened())
    tunnel.converse(client)


def test_a_refusal_in_the_words_of_a_lost_tunnel_is_a_refusal(hosts: Hosts, tunnel: FarTunnel) -> None:
    out = Records(hosts.sidecar(hosts.web))
    client = call(hosts)
    tunnel.asked()
    tunnel.say(tunnel.wire.refused(Refused(reason="tunnel.lost", detail="behind me")))
    tunnel.asked()
    tunnel.say(tunnel.wire.opened())
    tunnel.converse(client)
    assert tried(out.one()) == ["tunnel.lost", "ok"]
