from collections.abc import Callable

import pytest

from meshnet.codec import frames
from meshnet.codec.frames import Data, Fin, Frame, GoAway, Open, Opened, Ping, Pong, Refused
from meshnet.errors import TunnelError
from meshnet.relay import Wire
from meshnet.tunnel.protocol import LocalError, Role, Tunnel
from tests.tunnel.leases import ASKED, GONE, REFUSED, asked, assert_free, heard, opened, say, tunnels


def test_a_tunnel_is_a_wire() -> None:
    wire: Wire = Tunnel(Role.CLIENT)
    assert wire.lease_over


def test_a_lease_from_open_to_the_second_fin() -> None:
    client, server = tunnels()
    assert server.receive(client.open(ASKED)) == [ASKED]
    assert client.leased
    assert server.leased
    assert not client.idle
    assert client.receive(server.opened()) == [Opened()]
    assert heard(server.receive(say(client, b"hello"))) == b"hello"
    assert server.receive(client.fin()) == [Fin()]
    assert (client.sent_end, client.received_end) == (True, False)
    assert (server.sent_end, server.received_end) == (False, True)
    assert heard(client.receive(say(server, b"world"))) == b"world"
    assert client.receive(server.fin()) == [Fin()]
    assert_free(client, server)


def test_data_and_fin_may_follow_open_at_once() -> None:
    client, server = tunnels()
    early = client.open(ASKED) + say(client, b"GET /") + client.fin()
    read = server.receive(early)
    assert read == [ASKED, Data(memoryview(b"GET /")), Fin()]
    client.receive(server.opened())
    assert heard(client.receive(say(server, b"200") + server.fin())) == b"200"
    assert_free(client, server)


def test_a_refusal_ends_the_lease_for_both_and_leftovers_are_passed_over() -> None:
    client, server = asked()
    refusal = server.refused(REFUSED)
    assert server.lease_over
    leftovers = say(client, b"x") + say(client, b"y") + client.fin()
    assert client.receive(refusal) == [REFUSED]
    assert client.lease_over
    with pytest.raises(LocalError):
        client.data(1)
    assert server.receive(leftovers) == []
    assert_free(client, server)


def test_after_a_refusal_the_next_open_or_ping_ends_the_leftovers() -> None:
    client, server = asked()
    early = say(client, b"x")
    client.receive(server.refused(REFUSED))
    assert server.receive(early + client.ping()) == [Ping()]
    with pytest.raises(TunnelError, match="DATA"):
        server.receive(b"\x00\x00\x00\x01x")


def test_leftovers_end_with_the_end_of_the_clients_half() -> None:
    client, server = asked()
    server.refused(REFUSED)
    assert server.receive(say(client, b"x") + client.fin()) == []
    with pytest.raises(TunnelError, match="DATA"):
        server.receive(b"\x00\x00\x00\x01x")


def test_a_reset_that_crosses_a_refusal_is_passed_over() -> None:
    client, server = asked()
    refusal, reset = server.refused(REFUSED), client.reset("peer.rst")
    assert client.receive(refusal) == []
    assert server.receive(reset) == []
    assert_free(client, server)


def test_a_pong_may_come_when_the_next_lease_has_begun() -> None:
    client, server = tunnels()
    assert server.receive(client.ping() + client.open(ASKED)) == [Ping(), ASKED]
    assert client.receive(server.opened() + server.pong()) == [Opened(), Pong()]
    with pytest.raises(LocalError):
        server.pong()
    with pytest.raises(TunnelError, match="PONG"):
        client.receive(frames.encode(Pong()))


def test_goaway_ends_no_lease_and_lets_none_begin() -> None:
    client, server = opened()
    assert client.receive(server.goaway() + say(server, b"still") + server.fin())[0] == GoAway()
    assert client.retired
    assert server.retired
    assert server.receive(say(client, b"here") + client.fin())[1] == Fin()
    assert client.lease_over
    assert not client.idle
    with pytest.raises(LocalError):
        client.open(ASKED)


def test_a_server_serves_an_open_that_crossed_its_goaway() -> None:
    client, server = tunnels()
    goaway, open_ = server.goaway(), client.open(ASKED)
    assert client.receive(goaway) == [GoAway()]
    assert server.receive(open_) == [ASKED]
    assert client.receive(server.opened() + server.fin()) == [Opened(), Fin()]
    assert server.receive(client.fin()) == [Fin()]


def test_a_client_that_said_goaway_opens_no_more() -> None:
    client, server = tunnels()
    assert server.receive(client.goaway()) == [GoAway()]
    assert not server.idle
    with pytest.raises(LocalError):
        client.open(ASKED)
    with pytest.raises(TunnelError, match="OPEN"):
        server.receive(frames.encode(ASKED))


NOT_ON_A_FRESH_CLIENT: list[Callable[[Tunnel], bytes]] = [
    Tunnel.opened,
    Tunnel.pong,
    Tunnel.fin,
    lambda tunnel: tunnel.data(1),
    lambda tunnel: tunnel.reset("drain"),
    lambda tunnel: tunnel.refused(REFUSED),
]


@pytest.mark.parametrize("call", NOT_ON_A_FRESH_CLIENT)
def test_the_client_begins_with_open_and_nothing_else(call: Callable[[Tunnel], bytes]) -> None:
    client, server = tunnels()
    with pytest.raises(LocalError, match="not allowed on <Tunnel client"):
        call(client)
    assert_free(client, server)


@pytest.mark.parametrize("call", [*NOT_ON_A_FRESH_CLIENT, Tunnel.ping, lambda tunnel: tunnel.open(ASKED)])
def test_the_server_waits_to_be_asked(call: Callable[[Tunnel], bytes]) -> None:
    client, server = tunnels()
    with pytest.raises(LocalError, match="not allowed on <Tunnel server"):
        call(server)
    assert_free(client, server)


@pytest.mark.parametrize("call", [lambda tunnel: tunnel.open(ASKED), Tunnel.ping, Tunnel.opened])
def test_there_is_one_lease_at_a_time(call: Callable[[Tunnel], bytes]) -> None:
    client, _ = opened()
    with pytest.raises(LocalError):
        call(client)


def test_a_value_that_no_peer_would_take_changes_nothing() -> None:
    client, server = tunnels()
    with pytest.raises(ValueError, match="localhost"):
        client.open(Open(host="localhost", port=80))
    server.receive(client.open(ASKED))
    with pytest.raises(ValueError, match="regex"):
        server.refused(Refused(reason="No Reason"))
    client.receive(server.opened())
    with pytest.raises(ValueError, match="regex"):
        client.reset("No Reason")
    assert heard(server.receive(say(client, b"x"))) == b"x"


@pytest.mark.parametrize("frame", [Opened(), REFUSED, Data(memoryview(b"x")), Fin(), GONE, Ping(), Pong(), ASKED])
def test_a_fresh_client_takes_only_goaway(frame: Frame) -> None:
    client, _ = tunnels()
    with pytest.raises(TunnelError, match="not allowed"):
        client.receive(frames.encode(frame))


@pytest.mark.parametrize("frame", [Opened(), REFUSED, Data(memoryview(b"x")), Fin(), GONE, Pong()])
def test_a_fresh_server_takes_only_open_ping_and_goaway(frame: Frame) -> None:
    _, server = tunnels()
    with pytest.raises(TunnelError, match="not allowed"):
        server.receive(frames.encode(frame))


@pytest.mark.parametrize("frame", [Opened(), REFUSED, Ping(), Pong(), ASKED])
def test_a_server_in_a_lease_takes_only_data_and_an_end(frame: Frame) -> None:
    _, server = opened()
    with pytest.raises(TunnelError, match="not allowed"):
        server.receive(frames.encode(frame))


@pytest.mark.parametrize("frame", [Data(memoryview(b"x")), Fin()])
def test_a_client_that_was_not_answered_takes_only_an_answer(frame: Frame) -> None:
    client, _ = asked()
    with pytest.raises(TunnelError, match="not allowed"):
        client.receive(frames.encode(frame))


@pytest.mark.parametrize("frame", [Data(memoryview(b"x")), Fin(), GONE, Opened()])
@pytest.mark.parametrize("end", [Tunnel.fin, lambda tunnel: tunnel.reset("drain")])
def test_nothing_comes_after_an_end_but_a_reset_after_a_fin(end: Callable[[Tunnel], bytes], frame: Frame) -> None:
    client, server = opened()
    (ended,) = client.receive(end(server))
    if ended == Fin() and frame is GONE:
        assert client.receive(frames.encode(frame)) == [GONE]
        return
    with pytest.raises(TunnelError, match="not allowed"):
        client.receive(frames.encode(frame))


def test_once_broken_a_tunnel_stays_broken() -> None:
    client, server = tunnels()
    with pytest.raises(TunnelError, match="OPENED is not allowed"):
        client.receive(server_says := frames.encode(Opened()))
    for data in (server_says, b"", frames.encode(GoAway())):
        with pytest.raises(TunnelError, match="OPENED is not allowed"):
            client.receive(data)
    assert not client.idle
    assert server.idle
