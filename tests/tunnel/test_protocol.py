from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshnet.codec import frames
from meshnet.codec.frames import Data, Fin, Frame, GoAway, Open, Opened, Ping, Pong, Refused, Reset
from meshnet.errors import TunnelError
from meshnet.relay import Wire
from meshnet.tunnel.protocol import LocalError, Role, Tunnel

ASKED = Open(host="10.0.0.1", port=5432, id="c-1")
REFUSED = Refused(reason="authz.denied", policy="lockdown")
GONE = Reset(reason="peer.rst")


def tunnels() -> tuple[Tunnel, Tunnel]:
    return Tunnel(Role.CLIENT), Tunnel(Role.SERVER)


def asked() -> tuple[Tunnel, Tunnel]:
    client, server = tunnels()
    assert server.receive(client.open(ASKED)) == [ASKED]
    return client, server


def opened() -> tuple[Tunnel, Tunnel]:
    client, server = asked()
    assert client.receive(server.opened()) == [Opened()]
    return client, server


def say(tunnel: Tunnel, payload: bytes) -> bytes:
    return tunnel.data(len(payload)) + payload


def heard(frames_read: list[Frame]) -> bytes:
    return b"".join(bytes(frame.payload) for frame in frames_read if isinstance(frame, Data))


def assert_free(client: Tunnel, server: Tunnel) -> None:
    """A lease with data both ways works, and ends."""
    assert client.idle
    assert server.idle
    assert server.receive(client.open(ASKED)) == [ASKED]
    assert client.receive(server.opened()) == [Opened()]
    assert heard(server.receive(say(client, b"again") + client.fin())) == b"again"
    assert heard(client.receive(say(server, b"and again") + server.fin())) == b"and again"
    assert client.lease_over
    assert server.lease_over


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


def test_a_reset_while_the_server_is_still_answering_is_answered_with_a_reset() -> None:
    client, server = asked()
    assert server.receive(client.reset("peer.rst")) == [GONE]
    assert client.receive(server.reset("peer.rst")) == [GONE]
    assert_free(client, server)


def test_an_answer_that_crosses_a_reset_is_swallowed() -> None:
    client, server = asked()
    answer = server.opened() + say(server, b"banner")
    reset = client.reset("peer.rst")
    assert client.receive(answer) == []
    assert server.receive(reset) == [GONE]
    assert client.receive(server.reset("peer.rst")) == [GONE]
    assert_free(client, server)


def test_the_server_resets_only_what_it_has_opened_or_was_reset() -> None:
    client, server = asked()
    with pytest.raises(LocalError):
        server.reset("drain")
    with pytest.raises(TunnelError, match="RESET"):
        client.receive(frames.encode(GONE))


def test_after_a_fin_nothing_can_be_taken_back() -> None:
    client, server = opened()
    client.fin()
    for again in (client.fin, lambda: client.reset("drain"), lambda: client.data(1)):
        with pytest.raises(LocalError):
            again()
    assert server.receive(b"") == []


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
def test_nothing_comes_after_an_end(frame: Frame) -> None:
    client, server = opened()
    client.receive(server.fin())
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


class Side:
    """One tunnel, its unread bytes, and what its application said and heard in the present lease."""

    def __init__(self, role: Role) -> None:
        self.tunnel = Tunnel(role)
        self.inbox = bytearray()
        self.said: list[bytes] = []
        self.heard: list[bytes] = []
        self.pings = 0
        self.was_reset = False
        self.refused = False
        self.waits_for_answer = False
        self.read_reset = False

    def begin(self) -> None:
        self.said, self.heard = [], []
        self.was_reset = self.refused = self.read_reset = False
        self.waits_for_answer = True


class TwoSides(RuleBasedStateMachine):
    """Two tunnels, joined by pipes that deliver any number of bytes at a time, and whatever applications may do."""

    @initialize()
    def join(self) -> None:
        self.client, self.server = Side(Role.CLIENT), Side(Role.SERVER)
        self.opened_leases = 0
        self.began = 0

    def send(self, side: Side, data: bytes) -> None:
        (self.server if side is self.client else self.client).inbox += data

    def sides(self, which: bool) -> tuple[Side, Side]:
        return (self.client, self.server) if which else (self.server, self.client)

    @precondition(lambda self: self.client.tunnel.idle)
    @rule()
    def open(self) -> None:
        self.client.begin()
        self.opened_leases += 1
        self.send(self.client, self.client.tunnel.open(Open(host="10.0.0.1", port=80, id=str(self.opened_leases))))

    @precondition(lambda self: self.server.waits_for_answer)
    @rule(yes=st.booleans())
    def answer(self, yes: bool) -> None:
        self.server.waits_for_answer = False
        if yes:
            self.send(self.server, self.server.tunnel.opened())
        else:
            self.server.refused = True
            self.send(self.server, self.server.tunnel.refused(REFUSED))

    def may_speak(self, side: Side) -> bool:
        return not side.tunnel.sent_end and not (side is self.server and side.waits_for_answer)

    @rule(which=st.booleans(), payload=st.binary(min_size=1, max_size=40))
    def say(self, which: bool, payload: bytes) -> None:
        side, _ = self.sides(which)
        if self.may_speak(side):
            side.said.append(payload)
            self.send(side, side.tunnel.data(len(payload)) + payload)

    @rule(which=st.booleans())
    def fin(self, which: bool) -> None:
        side, _ = self.sides(which)
        if self.may_speak(side):
            self.send(side, side.tunnel.fin())

    @rule(which=st.booleans())
    def reset(self, which: bool) -> None:
        side, _ = self.sides(which)
        if self.may_speak(side) or (side is self.server and side.waits_for_answer and side.read_reset):
            side.waits_for_answer = False
            side.was_reset = True
            self.send(side, side.tunnel.reset("peer.rst"))

    @precondition(lambda self: self.client.tunnel.lease_over)
    @rule()
    def ping(self) -> None:
        self.client.pings += 1
        self.send(self.client, self.client.tunnel.ping())

    @precondition(lambda self: self.server.pings)
    @rule()
    def pong(self) -> None:
        self.server.pings -= 1
        self.send(self.server, self.server.tunnel.pong())

    # One time in twelve: after a GOAWAY little else happens.
    @rule(which=st.booleans(), die=st.integers(1, 12))
    def goaway(self, which: bool, die: int) -> None:
        side, _ = self.sides(which)
        if die == 12:
            self.send(side, side.tunnel.goaway())

    @rule(which=st.booleans(), size=st.one_of(st.integers(1, 9), st.just(10_000)))
    def deliver(self, which: bool, size: int) -> None:
        side, _ = self.sides(which)
        piece = bytes(side.inbox[:size])
        del side.inbox[:size]
        for frame in side.tunnel.receive(piece):
            self.read(side, frame)

    def read(self, side: Side, frame: Frame) -> None:
        match frame:
            case Open():
                side.begin()
                self.began += 1
                assert frame.id == str(self.began)
            case Opened():
                assert side.waits_for_answer
                side.waits_for_answer = False
            case Refused():
                side.waits_for_answer = False
                side.refused = True
            case Data(payload):
                assert not side.was_reset
                side.heard.append(bytes(payload))
            case Reset():
                side.was_reset = side.read_reset = True
            case Ping():
                side.pings += 1
            case Pong():
                side.pings -= 1
            case Fin() | GoAway():
                pass

    @invariant()
    def what_was_heard_was_said(self) -> None:
        if self.began == self.opened_leases and self.began:
            for side, other in (self.sides(True), self.sides(False)):
                heard, said = b"".join(side.heard), b"".join(other.said)
                assert said.startswith(heard)

    @invariant()
    def a_lease_that_is_over_for_the_client_is_over_for_the_server(self) -> None:
        """But for bytes on their way: the server has said its last, and the client's last is in the pipe at most."""
        if self.client.tunnel.lease_over:
            assert self.server.tunnel.sent_end
        if self.client.tunnel.lease_over and not self.server.inbox:
            assert self.server.tunnel.lease_over

    @invariant()
    def a_clean_end_has_lost_nothing(self) -> None:
        client, server = self.client, self.server
        quiet = not client.inbox and not server.inbox and self.began
        if quiet and client.tunnel.lease_over and not (client.was_reset or client.refused or server.was_reset):
            assert server.tunnel.lease_over
            assert b"".join(client.heard) == b"".join(server.said)
            assert b"".join(server.heard) == b"".join(client.said)

    def teardown(self) -> None:
        """Whatever happened, both can still finish, and the tunnel then serves the next connection."""
        if not hasattr(self, "client"):
            return
        self.drain()
        if self.server.waits_for_answer:
            self.answer(yes=True)
        for which in (True, False):
            self.drain()
            self.reset(which) if self.sides(which)[0].was_reset else self.fin(which)
        self.drain()
        while self.server.pings:
            self.pong()
        self.drain()
        assert self.client.tunnel.lease_over
        assert self.server.tunnel.lease_over
        assert self.client.pings == 0
        self.a_clean_end_has_lost_nothing()
        if not self.client.tunnel.retired:
            assert_free(self.client.tunnel, self.server.tunnel)

    def drain(self) -> None:
        while self.client.inbox or self.server.inbox:
            self.deliver(True, 10_000)
            self.deliver(False, 10_000)


TwoSides.TestCase.settings = settings(deadline=None, max_examples=100, stateful_step_count=60)
TestTwoSides = TwoSides.TestCase
