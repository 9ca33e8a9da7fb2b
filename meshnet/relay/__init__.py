"""HOW BYTES MOVE between the two legs of a connection. Decides nothing: who may talk to whom is settled before.

A relay is anything with `name`, `fits` and `run`; tests/relay/contract.py says what each must keep.
"""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from meshnet.codec.frames import Frame
from meshnet.errors import EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Direction
from meshnet.net.tls import Channel, Depot, Tls
from meshnet.relay.rows import Rows

SILENCE = 60.0
"""Seconds: a peer that has answered nothing for so long, while bytes wait for it, is gone."""


class Wire(Protocol):
    """One lease on a tunnel, as a relay needs it; `meshnet.tunnel.protocol.Tunnel` is one."""

    def data(self, size: int) -> bytes:
        """The header that goes before `size` payload bytes."""

    def fin(self) -> bytes: ...

    def reset(self, reason: str) -> bytes:
        """Also after `fin`, until `lease_over`."""

    def receive(self, data: memoryview) -> Sequence[Frame]:
        """The frames that `data` completes; payloads are views, valid until the next call. Raises TunnelError."""

    def hand_over(self) -> bytes:
        """Gives away what has come and is no whole frame yet: somebody else takes frames apart from here on."""

    def take_back(self, sent: str, received: str) -> None:
        """The lease was ended elsewhere: `sent` and `received` are "FIN" or "RESET", or nothing."""

    @property
    def lease_over(self) -> bool:
        """Both sides have said FIN or RESET: the tunnel is free again."""


@dataclass(slots=True)
class PlainLeg:
    """A connected, non-blocking TCP socket. A relay owns it from `run` on, and has closed it when `run` is over."""

    sock: socket.socket


@dataclass(slots=True)
class TunnelLeg:
    """A lease on a tunnel. The channel stays its owner's; the relay borrows it for the length of `run`."""

    channel: Channel
    wire: Wire


@dataclass(slots=True)
class Link:
    """Both legs, up. The two `early` fields hold bytes that were read before the hand-over, still to be delivered.

    Frames that came with OPENED or OPEN go to `early_frames`, in order; `run` takes them out. While `run` runs,
    `abort` ends the link from outside: as a cancel does, but `run` returns. Who aborts or cancels may set
    `abort_reason` and `abort_by` first: they are what the peer sidecar is told. `outcome` is set when `run` is over,
    also when it raises. `leg_port` is ours of the endpoint leg, or 0 where nobody asks for it.
    """

    client: PlainLeg | TunnelLeg
    endpoint: PlainLeg | TunnelLeg
    to_client: bytes = b""
    to_endpoint: bytes = b""
    early_frames: list[Frame] = field(default_factory=list)
    abort_reason: Reason = Reason.DRAIN
    abort_by: EndedBy = EndedBy.PROXY
    abort: Callable[[], None] | None = None
    outcome: "Outcome | None" = None
    leg_port: int = 0


@dataclass(slots=True)
class Tally:
    """Grows while the relay runs, exact when it ends, however it ends. Bytes of the application only.

    `sent` went from client to endpoint, `received` the other way: counted when handed to the next socket.
    `moved_at` is time.monotonic() of the last byte. Where another thread counts, `live` asks it, in the order of the
    fields: whoever reads a tally that may still grow calls `refresh` first.
    """

    sent: int = 0
    received: int = 0
    client_done: bool = False
    endpoint_done: bool = False
    moved_at: float = 0.0
    live: Callable[[], tuple[int, int, bool, bool, float]] | None = None

    def refresh(self) -> None:
        if self.live is not None:
            self.sent, self.received, self.client_done, self.endpoint_done, self.moved_at = self.live()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended. `reusable`: the tunnel leg, if there was one, is between leases again.

    `late` are frames that came in one piece with the end of the lease and belong behind it: the peer's next OPEN.
    """

    reason: Reason
    ended_by: EndedBy
    detail: str = ""
    reusable: bool = False
    late: Sequence[Frame] = ()


TUNNEL_CLOSED = "the peer sidecar closed the tunnel within a lease"
_FAR_LEG = frozenset({Reason.PEER_RST, Reason.KEEPALIVE_DEAD})  # said of the leg behind the peer sidecar


def reset_by_peer(text: str, far: EndedBy) -> tuple[Reason, EndedBy, str]:
    """What a RESET frame with the reason `text` means for an Outcome. `far`: who is behind the peer sidecar."""
    try:
        reason = Reason(text)
    except ValueError:
        reason = Reason.PEER_RST  # a newer peer knows more reasons
    return reason, far if text in _FAR_LEG else EndedBy.PEER_PROXY, f"the peer sidecar reset the lease: {text}"


class Flow(NamedTuple):
    """All connections of a kind: how they came, from which host, and where they were going.

    `identity`: of the peer that asked for them through a tunnel; empty: they came by themselves, in plain text.
    """

    direction: Direction
    source: str
    original: Address
    identity: str = ""


class Target(NamedTuple):
    """Where connections of a flow are dialled: `mark` for SO_MARK, `local` on this host, `patience` in seconds."""

    address: Address
    mark: int
    local: bool
    patience: float


class Through(NamedTuple):
    """The tunnels by which the target is reached, and the OPEN that is said there.

    `opening`: what its payload says before, between and behind the port of the source and the id.
    """

    depot: Depot
    opening: tuple[bytes, bytes, bytes]


class Facts(NamedTuple):
    """What became of a connection under an order; monotonic seconds, 0 for what has not been yet.

    `port` is its client's. `owes`: the order was revoked while the connection lived, so its place is not the order's
    again. `client`: the descriptor of the client leg, of which only `early` was read, when the endpoint could not
    be reached; -1 when the connection was carried to its end; -2 when all was put back as it was, and who decides about
    such connections is asked about this one too. `error` is an errno. `id` and `cipher`: what who asked called it, and
    the tunnel's. `reset`: the payload of the peer's RESET, or of the REFUSED by which it was not to be reached.
    """

    port: int
    opened: float
    connected: float
    ended: float
    sent: int
    received: int
    moved_at: float
    client_done: bool
    endpoint_done: bool
    reason: int
    ended_by: int
    error: int
    owes: bool
    client: int
    id: str = ""
    cipher: str = ""
    reset: bytes = b""
    early: bytes = b""

    @property
    def undone(self) -> bool:
        return self.client == -2


class OrderedLink(Protocol):
    """A connection that an order began and that goes on. `abort` as in Link."""

    abort_reason: Reason
    abort_by: EndedBy

    @property
    def abort(self) -> Callable[[], None] | None: ...

    @property
    def leg_port(self) -> int:
        """Ours of the endpoint leg, of a connection that has lived for a moment; 0 before."""

    def live(self) -> tuple[int, int, bool, bool, float]:
        """For Tally.live."""

    def facts(self) -> Facts: ...

    def outcome(self) -> Outcome:
        """Once it has ended."""


class Watcher(Protocol):
    """Who is told of a connection that goes on under an order."""

    def connected(self) -> None:
        """Its endpoint is up."""

    def ended(self) -> None: ...


class Issuer(Protocol):
    """Who gave an order is told what comes of it, of each connection once: by one of the three."""

    def began(self, link: OrderedLink) -> Watcher: ...

    def came_and_went(self, facts: Facts, outcome: Outcome) -> None:
        """One that was over before anybody looked, and of which there is something to say."""

    def passed(self, rows: Rows) -> None:
        """Those of which there is not: they were connected, and ended well."""


class Order(Protocol):
    """What a relay does by itself with all connections of a flow, until the order is revoked."""

    def revoke(self) -> int | None:
        """No connection begins under it any more. The places that no connection has; None: it was revoked before."""

    def widen(self, places: int) -> None:
        """Gives it so many more."""

    def state(self) -> tuple[int, int, float]:
        """Its places, how many are taken, and when a connection last came under it: monotonic seconds, or 0."""


class Relay(Protocol):
    """Moves bytes until both directions are over."""

    @property
    def name(self) -> str: ...

    @property
    def tls(self) -> Tls:
        """Whose channels it takes."""

    @property
    def takes_orders(self) -> bool:
        """Whether `order` may be called."""

    def fits(self, link: Link) -> bool: ...

    async def run(self, link: Link, tally: Tally) -> Outcome:
        """Returns when both directions have ended. Never raises for what the network does; that is the Outcome.

        Cancelled: resets both legs with `link.abort_reason`, waits at most a second for the tunnel's peer, and only
        then raises trio.Cancelled, the tally exact and every descriptor of a plain leg closed.
        """

    async def accept_forever(
        self,
        listener: socket.socket,
        direction: Direction,
        carry: Callable[[socket.socket, Address], object],
        *,
        shared: bool,
    ) -> None:
        """As meshnet.net.sockets.accept_forever; `carry` is called with connections that no order covers.

        `shared`: other processes accept at the same socket.
        """

    def order(self, flow: Flow, target: Target, places: int, issuer: Issuer, through: Through | None = None) -> Order:
        """From now on the relay itself dials and carries connections of `flow`, at most `places` at once.

        With `through` it asks for them there, as long as it finds a tunnel. Of several orders for a flow the latest is
        in force.
        """

    def suspend_orders(self) -> None:
        """No connection begins under any order there is, from one moment on. Each is still to be revoked."""

    def catch_up(self) -> None:
        """Tells issuers and watchers at once what they would soon be told anyway."""


@dataclass(slots=True)
class Relays:
    """Fastest first; `missing` says why another is not among them."""

    available: list[Relay]
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def tls(self) -> Tls:
        """Whose channels the fastest one takes."""
        return self.available[0].tls

    def catch_up(self) -> None:
        for relay in self.available:
            relay.catch_up()

    def choose(self, link: Link) -> Relay:
        return next(relay for relay in self.available if relay.fits(link))
