"""One connection as operators see it: the item of `meshnet conns -o json` and of the access log."""

import enum

import msgspec

from meshnet.errors import EndedBy, Phase, Reason


class Shape(msgspec.Struct, frozen=True, kw_only=True, rename="camel", gc=False):
    """The base of what the admin socket and the log print. Within v1 fields are only ever added."""


class Direction(enum.StrEnum):
    OUTBOUND = "outbound"
    INBOUND = "inbound"


class State(enum.StrEnum):
    """Where a connection is in its life; the last four are ends."""

    CONNECTING = "connecting"
    QUEUED = "queued"
    OPEN = "open"
    HALF_IN = "half-in"  # the client has finished sending
    HALF_OUT = "half-out"  # the endpoint has finished sending
    CLOSED = "closed"
    REFUSED = "refused"  # by a limit, a breaker, or because there was nowhere to go
    DENIED = "denied"
    FAILED = "failed"


class Security(enum.StrEnum):
    MTLS = "mtls"
    PLAIN = "plain"
    NONE = "none"  # neither a tunnel nor a plain leg came to be


class Peer(Shape, frozen=True):
    address: str = ""
    identity: str = ""
    service: str = ""


class TlsView(Shape, frozen=True):
    mode: Security = Security.NONE
    version: str = ""
    cipher: str = ""
    peer_identity: str = ""
    handshake_ms: float | None = None  # None: the tunnel was already there
    resumed: bool = False


class Weighed(Shape, frozen=True, omit_defaults=True):
    """An endpoint as it was when one was chosen."""

    endpoint: str
    connections: int = 0
    score: float | None = None  # (connections + 1) / (weight * warmth); None: it was passed over
    why_not: str = ""  # beside a score: all were out, and it was taken all the same


class Attempt(Shape, frozen=True):
    """`weighed`: what there was to choose from, of more than eight what the balancer asked last."""

    endpoint: str
    result: str  # "ok" or a reason code
    ms: float
    detail: str = ""
    weighed: tuple[Weighed, ...] = ()


class ReasonView(Shape, frozen=True):
    code: Reason
    message: str = ""
    ended_by: EndedBy | None = None
    phase: Phase = Phase.ACCEPT


class Connection(Shape, frozen=True):
    """`sent` and `received` are bytes as this proxy's client leg saw them: sent by the client, received by it.

    `policy` names what denied or allowed it. Times are RFC 3339 UTC. `leg_port` is this proxy's own port of the leg to
    the endpoint, or of the tunnel to its host; None before there is one, and of what a relay did by itself in no time.
    `retries`: attempts behind the first; `retry_denied`: one more was wanted, and the service's budget was used up.
    `held`: its client's connect() waited for the endpoint. `ordered`: a standing order covered it. `passed_over`:
    endpoints, each with why, when there was none left to try.
    """

    id: str
    direction: Direction
    state: State
    source: Peer
    destination: Peer
    original_destination: str = ""
    endpoint: str = ""
    tls: TlsView = TlsView()
    policy: str = ""
    relay: str = ""
    attempts: tuple[Attempt, ...] = ()
    bytes_sent: int = 0
    bytes_received: int = 0
    opened_at: str = ""
    closed_at: str = ""
    duration_ms: float = 0.0
    connect_ms: float | None = None
    queue_ms: float | None = None
    idle_ms: float | None = None
    leg_port: int | None = None
    retries: int = 0
    retry_denied: bool = False
    held: bool = False
    ordered: bool = False
    passed_over: tuple[str, ...] = ()
    reason: ReasonView | None = None  # None while it is open
    trace: tuple[str, ...] = ()  # one line a step, for `explain`
