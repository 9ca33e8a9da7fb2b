"""RESET, alone and behind FIN, whatever it crosses."""

from collections.abc import Callable

import pytest

from meshnet.codec import frames
from meshnet.codec.frames import Fin, Opened, Ping, Pong, Reset
from meshnet.errors import TunnelError
from meshnet.tunnel.protocol import LocalError, Tunnel
from tests.tunnel.leases import ASKED, GONE, REFUSED, asked, assert_free, opened, say


def test_after_our_reset_the_peer_is_not_heard_until_it_ends() -> None:
    client, server = opened()
    crossing = say(server, b"lost")
    reset = client.reset("drain")
    assert client.receive(crossing) == []
    assert not client.lease_over
    assert server.receive(reset) == [Reset(reason="drain")]
    assert client.receive(server.reset("drain")) == [Reset(reason="drain")]
    assert_free(client, server)


def test_two_resets_may_cross() -> None:
    client, server = opened()
    mine, theirs = client.reset("drain"), server.reset("peer.rst")
    assert client.receive(theirs) == [GONE]
    assert server.receive(mine) == [Reset(reason="drain")]
    assert_free(client, server)


def test_a_fin_may_cross_a_reset() -> None:
    client, server = opened()
    fin, reset = client.fin(), server.reset("peer.rst")
    assert client.receive(reset) == [GONE]
    assert server.receive(fin) == [Fin()]
    assert_free(client, server)


@pytest.mark.parametrize("after_fin", [False, True])
def test_a_server_that_was_reset_before_it_answered_may_refuse(after_fin: bool) -> None:
    client, server = asked()
    said = client.fin() if after_fin else b""
    assert server.receive(said + client.reset("peer.rst"))[-1] == GONE
    assert client.receive(server.refused(REFUSED)) == []
    assert_free(client, server)


@pytest.mark.parametrize("after_fin", [False, True])
def test_a_server_that_was_reset_before_it_answered_may_say_opened_and_reset(after_fin: bool) -> None:
    client, server = asked()
    said = client.fin() if after_fin else b""
    assert server.receive(said + client.reset("peer.rst"))[-1] == GONE
    assert client.receive(server.opened() + server.reset("peer.rst")) == [GONE]
    assert_free(client, server)


def test_an_answer_that_crosses_a_reset_is_swallowed() -> None:
    client, server = asked()
    answer = server.opened() + say(server, b"banner")
    reset = client.reset("peer.rst")
    assert client.receive(answer) == []
    assert server.receive(reset) == [GONE]
    assert client.receive(server.reset("peer.rst")) == [GONE]
    assert_free(client, server)


def test_a_reset_is_no_answer_not_even_to_a_reset() -> None:
    client, server = asked()
    reset = client.reset("peer.rst")
    for read in (b"", reset):
        server.receive(read)
        with pytest.raises(LocalError):
            server.reset("drain")
    with pytest.raises(TunnelError, match="RESET"):
        client.receive(frames.encode(GONE))


def one_and_other(opener: str) -> tuple[Tunnel, Tunnel]:
    client, server = opened()
    return (client, server) if opener == "client" else (server, client)


both_ways = pytest.mark.parametrize("who", ["client", "server"])


@both_ways
def test_a_reset_may_follow_a_fin_and_the_peer_ends_too(who: str) -> None:
    one, other = one_and_other(who)
    assert other.receive(one.fin()) == [Fin()]
    on_its_way = say(other, b"anybody?")
    assert other.receive(one.reset("peer.rst")) == [GONE]
    assert not other.lease_over
    assert one.receive(on_its_way) == []
    assert not one.lease_over
    assert one.receive(other.reset("peer.rst")) == [GONE]
    assert_free(*sorted((one, other), key=lambda tunnel: tunnel.role.value))


@both_ways
@pytest.mark.parametrize("end", [Tunnel.fin, lambda tunnel: tunnel.reset("drain")])
def test_a_reset_behind_a_fin_that_crosses_the_peers_end_is_passed_over(
    who: str, end: Callable[[Tunnel], bytes]
) -> None:
    one, other = one_and_other(who)
    assert other.receive(one.fin()) == [Fin()]
    theirs, late = end(other), one.reset("peer.rst")
    assert other.lease_over
    assert other.receive(late) == []
    assert len(one.receive(theirs)) == 1
    assert_free(*sorted((one, other), key=lambda tunnel: tunnel.role.value))


def test_two_resets_behind_two_fins_may_cross() -> None:
    client, server = opened()
    mine, theirs = client.fin() + client.reset("drain"), server.fin() + server.reset("peer.rst")
    assert client.receive(theirs) == [Fin()]
    assert server.receive(mine) == [Fin()]
    assert_free(client, server)


@pytest.mark.parametrize("next_is_reset", [False, True])
def test_a_late_reset_of_the_server_is_not_taken_for_the_next_lease(next_is_reset: bool) -> None:
    client, server = opened()
    client.receive(server.fin())
    said = client.fin()
    late = server.reset("peer.rst")
    said += client.open(ASKED) + (client.reset("drain") if next_is_reset else b"")
    assert client.receive(late) == []
    assert client.leased
    assert server.receive(said)[:2] == [Fin(), ASKED]
    assert client.receive(server.opened()) == ([] if next_is_reset else [Opened()])
    assert client.receive(server.reset("peer.rst")) == [GONE]
    assert client.sent_end is next_is_reset


def test_a_late_reset_of_the_server_may_find_the_client_between_leases() -> None:
    client, server = opened()
    client.receive(server.fin())
    said = client.fin() + client.ping()
    assert client.receive(server.reset("peer.rst")) == []
    assert server.receive(said) == [Fin(), Ping()]
    assert client.receive(server.pong()) == [Pong()]
    assert_free(client, server)


def test_a_refusal_crosses_a_fin_and_a_reset_behind_it() -> None:
    client, server = asked()
    refusal = server.refused(REFUSED)
    assert server.receive(say(client, b"x") + client.fin() + client.reset("peer.rst")) == []
    assert client.receive(refusal) == []
    assert_free(client, server)


@both_ways
def test_a_late_reset_comes_once(who: str) -> None:
    one, other = one_and_other(who)
    other.receive(one.fin())
    other.fin()
    assert other.receive(frames.encode(GONE)) == []
    with pytest.raises(TunnelError, match="RESET"):
        other.receive(frames.encode(GONE))


def test_a_late_reset_of_the_client_does_not_come_behind_its_next_words() -> None:
    for said in (Ping(), ASKED):
        client, server = opened()
        server.receive(client.fin())
        server.fin()
        server.receive(frames.encode(said))
        if said is ASKED:
            server.refused(REFUSED)
            server.receive(frames.encode(GONE))  # of this lease
        with pytest.raises(TunnelError, match="RESET"):
            server.receive(frames.encode(GONE))


def test_a_late_reset_of_the_server_does_not_come_behind_its_next_answer() -> None:
    client, server = opened()
    client.fin()
    client.receive(server.fin())
    client.open(ASKED)
    assert client.receive(frames.encode(REFUSED)) == [REFUSED]
    with pytest.raises(TunnelError, match="RESET"):
        client.receive(frames.encode(GONE))


@both_ways
def test_after_a_fin_comes_nothing_but_a_reset_and_that_only_until_the_lease_is_over(who: str) -> None:
    one, other = one_and_other(who)
    one.fin()
    for again in (one.fin, lambda: one.data(1)):
        with pytest.raises(LocalError):
            again()
    one.receive(other.fin())
    assert one.lease_over
    with pytest.raises(LocalError):
        one.reset("drain")


def test_a_reset_is_said_once() -> None:
    client, _ = opened()
    client.fin()
    client.reset("drain")
    with pytest.raises(LocalError):
        client.reset("drain")
