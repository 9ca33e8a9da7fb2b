"""Two tunnels driven by whatever applications and pipes may do end every lease cleanly."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshnet.codec.frames import Data, Fin, Frame, GoAway, Open, Opened, Ping, Pong, Refused, Reset
from meshnet.tunnel.protocol import Role, Tunnel
from tests.tunnel.leases import REFUSED, assert_free


class Side:
    """One tunnel, its unread bytes, and what its application said and heard in the present lease."""

    def __init__(self, role: Role) -> None:
        self.tunnel = Tunnel(role)
        self.inbox = bytearray()
        self.said: list[bytes] = []
        self.heard: list[bytes] = []
        self.pings = 0
        self.lease = 0
        self.was_reset = False
        self.refused = False
        self.waits_for_answer = False
        self.said_reset: set[int] = set()  # the leases in which
        self.read_reset = 0  # the lease in which that was last

    def begin(self) -> None:
        self.said, self.heard = [], []
        self.lease += 1
        self.was_reset = self.refused = False
        self.waits_for_answer = True


class TwoSides(RuleBasedStateMachine):
    """Two tunnels, joined by pipes that deliver any number of bytes at a time, and whatever applications may do."""

    @initialize()
    def join(self) -> None:
        self.client, self.server = Side(Role.CLIENT), Side(Role.SERVER)

    def send(self, side: Side, data: bytes) -> None:
        (self.server if side is self.client else self.client).inbox += data

    def sides(self, which: bool) -> tuple[Side, Side]:
        return (self.client, self.server) if which else (self.server, self.client)

    @precondition(lambda self: self.client.tunnel.idle)
    @rule()
    def open(self) -> None:
        self.client.begin()
        self.send(self.client, self.client.tunnel.open(Open(host="10.0.0.1", port=80, id=str(self.client.lease))))

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

    def may_reset_behind_fin(self, side: Side) -> bool:
        return side.tunnel.leased and side.tunnel.sent_end and side.lease not in side.said_reset

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
        if self.may_speak(side) or self.may_reset_behind_fin(side):
            side.was_reset = True
            side.said_reset.add(side.lease)
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
        side, other = self.sides(which)
        piece = bytes(side.inbox[:size])
        del side.inbox[:size]
        for frame in side.tunnel.receive(piece):
            self.read(side, other, frame)

    def read(self, side: Side, other: Side, frame: Frame) -> None:
        match frame:
            case Open():
                side.begin()
                assert frame.id == str(side.lease)
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
                assert side.lease in other.said_reset
                side.was_reset = True
                side.read_reset = side.lease
            case Ping():
                side.pings += 1
            case Pong():
                side.pings -= 1
            case Fin() | GoAway():
                pass

    @invariant()
    def what_was_heard_was_said(self) -> None:
        if self.server.lease == self.client.lease:
            for side, other in (self.sides(True), self.sides(False)):
                heard, said = b"".join(side.heard), b"".join(other.said)
                assert said.startswith(heard)

    @invariant()
    def a_reset_is_heard_by_who_has_not_ended(self) -> None:
        for side, other in (self.sides(True), self.sides(False)):
            if side.tunnel.leased and not side.tunnel.sent_end and not side.inbox and side.lease in other.said_reset:
                assert side.read_reset == side.lease

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
        quiet = not client.inbox and not server.inbox and server.lease
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
            side, _ = self.sides(which)
            self.reset(which) if side.read_reset == side.lease else self.fin(which)
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


TwoSides.TestCase.settings = settings(max_examples=100, stateful_step_count=60)
TestTwoSides = TwoSides.TestCase
