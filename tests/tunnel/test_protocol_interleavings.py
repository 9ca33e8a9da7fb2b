"""Every interleaving, not a sample of them: two tunnels, and all that both may say and the pipes may deliver.

DATA behind DATA is left out and one PING is under way at most, so the states are finite: a client is never more than a
lease ahead of its server.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from meshnet.codec.frames import Data, Kind, Open, Opened, Ping, Pong, Refused, Reset
from meshnet.tunnel.protocol import Half, LocalError, Role, Tunnel

SAYINGS: dict[Kind, Callable[[Tunnel], bytes]] = {
    Kind.OPEN: lambda tunnel: tunnel.open(Open(host="10.0.0.1", port=80)),
    Kind.OPENED: Tunnel.opened,
    Kind.REFUSED: lambda tunnel: tunnel.refused(Refused(reason="authz.denied")),
    Kind.DATA: lambda tunnel: tunnel.data(1) + b"x",
    Kind.FIN: Tunnel.fin,
    Kind.RESET: lambda tunnel: tunnel.reset("peer.rst"),
    Kind.PING: Tunnel.ping,
    Kind.PONG: Tunnel.pong,
}


@dataclass
class Side:
    tunnel: Tunnel
    lease: int = 0
    inbox: list[tuple[Kind, bytes, int]] = field(default_factory=list)  # with the lease they were said in
    was_reset: bool = False  # and has heard it, in this lease

    def copy(self) -> "Side":
        # Frames are delivered whole, so the readers hold nothing and may be shared.
        return replace(self, tunnel=copy.copy(self.tunnel), inbox=self.inbox.copy())


@dataclass
class Pair:
    client: Side = field(default_factory=lambda: Side(Tunnel(Role.CLIENT)))
    server: Side = field(default_factory=lambda: Side(Tunnel(Role.SERVER)))

    def copy(self) -> "Pair":
        return Pair(self.client.copy(), self.server.copy())

    def state(self) -> object:
        """What tells this one from others; of a lease's number only how far the client is ahead of it."""
        newest = self.client.lease
        return tuple(
            (
                side.tunnel._mine,
                side.tunnel._theirs,
                side.tunnel._pings,
                newest - side.lease,
                side.was_reset,
                tuple((kind, newest - lease) for kind, _, lease in side.inbox),
            )
            for side in (self.client, self.server)
        )

    def steps(self) -> Iterator["Pair"]:
        """All that may happen next. Raises TunnelError if one side says what the other does not take."""
        for is_client in (True, False):
            for kind in SAYINGS:
                after = self.copy()
                if after.say(is_client, kind):
                    yield after
            after = self.copy()
            if after.hear(is_client):
                yield after

    def sides(self, is_client: bool) -> tuple[Side, Side]:
        return (self.client, self.server) if is_client else (self.server, self.client)

    def say(self, is_client: bool, kind: Kind) -> bool:
        """Whether it could be said."""
        side, other = self.sides(is_client)
        if kind is Kind.DATA and other.inbox and other.inbox[-1][0] is Kind.DATA:
            return False
        if kind is Kind.PING and side.tunnel._pings:
            return False
        try:
            said = SAYINGS[kind](side.tunnel)
        except LocalError:
            return False
        if kind is Kind.OPEN:
            side.lease, side.was_reset = side.lease + 1, False
        other.inbox.append((kind, said, side.lease))
        return True

    def hear(self, is_client: bool) -> bool:
        """Whether there was anything on its way."""
        side, _ = self.sides(is_client)
        if not side.inbox:
            return False
        kind, said, lease = side.inbox.pop(0)
        had_ended, was_over = side.tunnel.sent_end, side.tunnel.lease_over
        heard = side.tunnel.receive(said)
        if kind is Kind.OPEN:
            side.lease, side.was_reset = side.lease + 1, False
        assert not heard or isinstance(heard[0], Ping | Pong) or lease == side.lease, "heard in another lease"
        if kind is Kind.RESET and lease == side.lease and not had_ended:
            assert heard == [Reset(reason="peer.rst")], "a RESET in time was not heard"
        if was_over:
            assert not heard or isinstance(heard[0], Open | Ping | Pong), "heard when the lease was over"
        if heard and isinstance(heard[0], Reset):
            side.was_reset = True
        if heard and isinstance(heard[0], Data | Opened):
            assert not side.was_reset
        return True

    def end(self) -> None:
        """Both say their ends as soon as they may; afterwards the tunnel is free on both sides."""
        while self.hear(True) or self.hear(False) or any(self.say(False, kind) for kind in (Kind.OPENED, Kind.PONG)):
            pass
        for is_client in (True, False):
            side, _ = self.sides(is_client)
            self.say(is_client, Kind.RESET if side.was_reset else Kind.FIN)
        while self.hear(True) or self.hear(False):
            pass
        assert self.client.tunnel.idle, self.state()
        assert self.server.tunnel.idle, self.state()


def test_in_every_interleaving_both_agree_and_can_end_the_lease() -> None:
    start = Pair()
    seen, unvisited = {start.state()}, [start]
    halves: dict[Role, set[Half]] = {Role.CLIENT: set(), Role.SERVER: set()}
    while unvisited:
        pair = unvisited.pop()
        for after in pair.steps():
            if (state := after.state()) not in seen:
                seen.add(state)
                unvisited.append(after)
        for side in (pair.client, pair.server):
            halves[side.tunnel.role].add(side.tunnel._theirs)
        pair.end()
    # As each side may see its peer; so nothing was left out that the table has.
    assert halves[Role.CLIENT] == set(Half) - {Half.REFUSED}
    assert halves[Role.SERVER] == set(Half) - {Half.ASKED, Half.ASKED_NEXT}
