"""What is said over the admin socket: one JSON line a request, one or more JSON lines in answer."""

from typing import Literal

import msgspec

from meshnet.model.capture import CaptureStatus
from meshnet.model.connection import Connection, Direction, Shape

GROUP = "meshnet"  # the group whose members may ask a sidecar how it is, and nothing else


SUBSYSTEMS = ("access", "admin", "capture", "checks", "identity", "names", "net", "proxy", "relay", "tunnel")
"""The parts of a sidecar that log for themselves."""

Level = Literal["debug", "info", "warning", "error"]


class ListConnections(Shape, frozen=True, tag="conns"):
    """Open ones, those that ended badly in the last `recent` seconds; `all`: instead every ended one that is kept.

    They are answered in parts, the newest first: the metadata's `before` of one part asks for the one before it. `id`:
    those with this id instead, all of them at once.
    """

    recent: float = 60.0
    all: bool = False
    before: tuple[int, ...] = ()
    id: str = ""


class FollowConnections(Shape, frozen=True, tag="follow"):
    """A stream of ConnectionEvent: first every open connection, then events as they come."""


class ExplainConnection(Shape, frozen=True, tag="explain"):
    id: str


class ExplainRoute(Shape, frozen=True, tag="explain-route"):
    """Where an outbound connection to `target` would go now: HOST:PORT, or a service's name with its port."""

    target: str


class ExplainAdmission(Shape, frozen=True, tag="explain-admission"):
    """Whether a connection from `source`, an address, would be let in to `target` (HOST:PORT), an application here."""

    source: str
    target: str


class GetStatus(Shape, frozen=True, tag="status"):
    pass


class ListEndpoints(Shape, frozen=True, tag="endpoints"):
    service: str = ""


class Drain(Shape, frozen=True, tag="drain"):
    """Stop accepting and end when nothing is open or the time (seconds) is over; answered at once."""

    timeout: float = 30.0


class Reload(Shape, frozen=True, tag="reload"):
    """Read the mesh files again; answered at once."""


class GetMetrics(Shape, frozen=True, tag="metrics"):
    """What /metrics is made of, in numbers."""


class ConnectionKey(Shape, frozen=True):
    """Which connection is meant, in its own record's words. Its id alone may be that of several: peers choose ids."""

    id: str
    direction: Direction
    opened_at: str
    source: str


class KillConnections(Shape, frozen=True, tag="kill"):
    """Reset those of them that are still open; answered at once with how many those are."""

    connections: tuple[ConnectionKey, ...]


class Ping(Shape, frozen=True, tag="ping"):
    """Dial what a connection to `target` could be dialled to, and end it at once.

    `target`: an address and port, or a service's name with its port. `timeout` seconds are for each endpoint, all steps
    together.
    """

    target: str
    timeout: float = 3.0


class ListUncaptured(Shape, frozen=True, tag="uncaptured"):
    """Connections of this host that do not come through the sidecar, but for those that stay on it."""


class ListLogLevels(Shape, frozen=True, tag="log-levels"):
    pass


class SetLogLevel(Shape, frozen=True, tag="log-level"):
    """`subsystem`: one of SUBSYSTEMS; empty: all of them, but for those that have a level of their own.

    `level`: None takes back what was set. `seconds`: how long it lasts; 0: until the sidecar ends.
    """

    subsystem: str = ""
    level: Level | None = None
    seconds: float = 0.0


Question = (
    ListConnections
    | ExplainConnection
    | ExplainRoute
    | ExplainAdmission
    | GetStatus
    | ListEndpoints
    | Drain
    | Reload
    | GetMetrics
    | KillConnections
    | Ping
    | ListUncaptured
    | ListLogLevels
    | SetLogLevel
)
"""It has one answer."""
Request = Question | FollowConnections


class ConnectionListMetadata(Shape, frozen=True):
    """`open`, `failed` and `plaintext` are of this part. `before`: there are more that have ended; see ListConnections.

    `forgotten`: how many have ended that the sidecar does not remember any more; every one that ended after
    `reaches_back` is there, and those that failed after `failed_reach_back`; empty: since it began.
    """

    node: str
    generated_at: str
    open: int
    failed: int
    plaintext: int
    silent_workers: int = 0  # that did not answer: what they have is missing
    before: tuple[int, ...] = ()
    forgotten: int = 0
    reaches_back: str = ""
    failed_reach_back: str = ""
    uncaptured: int = 0  # open ones beside these, that should have come through the sidecar; as of the last look


class ConnectionList(Shape, frozen=True):
    metadata: ConnectionListMetadata
    items: tuple[Connection, ...] = ()
    api_version: str = "meshnet.dev/v1"
    kind: str = "ConnectionList"


class ConnectionEvent(Shape, frozen=True):
    """`event` is open, update, close, fail, deny, or lost (then `count` events were not sent to a slow reader)."""

    event: str
    connection: Connection | None = None
    count: int = 0


class CertificateStatus(Shape, frozen=True):
    identity: str = ""
    not_before: str = ""
    not_after: str = ""
    issuer: str = ""
    serial: str = ""
    begins_in_seconds: float = 0.0  # 0 once it has begun
    expires_in_seconds: float = 0.0
    problem: str = ""

    @property
    def is_valid(self) -> bool:
        """By the sidecar's clock."""
        return self.expires_in_seconds > 0 and not self.begins_in_seconds


class ConfigStatus(Shape, frozen=True):
    version: int
    directory: str
    services: int
    policies: int
    age_seconds: float
    problem: str = ""  # why the newest files were refused; the last good state stays in force


class RelayStatus(Shape, frozen=True):
    in_use: tuple[str, ...]
    not_in_use: dict[str, str] = {}  # relay: why


class TunnelStatus(Shape, frozen=True):
    peer: str
    idle: int
    leased: int


class WorkerStatus(Shape, frozen=True):
    """One of several processes that share a sidecar's listeners. `pid` is 0 while it is not running."""

    number: int
    pid: int
    ready: bool
    open_connections: int
    deaths: int  # how often it was started again
    uptime_seconds: float
    problem: str = ""


class TruthfulStatus(Shape, frozen=True):
    """Truthful connect: whether the sidecar has the queue, and since it began, who `held` for an endpoint, and who came
    `unheld`, past the queue, to be told by a reset.
    """

    in_force: bool
    waiting: int = 0
    held: int = 0
    unheld: int = 0
    problem: str = ""  # why it is not in force


class Status(Shape, frozen=True):
    node: str
    version: str
    pid: int
    uptime_seconds: float
    ready: bool
    not_ready_because: tuple[str, ...]
    draining: bool
    listeners: dict[str, str]
    open_connections: int
    opened_total: int
    failed_total: int
    certificate: CertificateStatus
    config: ConfigStatus
    relay: RelayStatus
    tunnels: tuple[TunnelStatus, ...] = ()
    # What keeps its own connections out of the rules; None where a sidecar does not say, mark 0 where it may not mark.
    mark: int | None = None
    gid: int | None = None
    network: int = 0  # its network namespace: the inode of /proc/self/ns/net; 0 where it does not say
    inbound_mode: str = ""  # how it takes inbound connections, redirect or tproxy; empty where it does not say
    original_source: bool | None = None
    readiness_port: int | None = None  # where readiness is asked for through the rules; 0: nowhere
    truthful: TruthfulStatus | None = None  # None where capture.truthful_connect is off
    capture: CaptureStatus | None = None  # None where capture.proof_interval is off
    workers: tuple[WorkerStatus, ...] = ()  # of the parent of several; then the rest is of all of them together
    api_version: str = "meshnet.dev/v1"
    kind: str = "Status"

    @property
    def waits_for_rules(self) -> bool:
        """Ready, or it would be if the rules were in place: now they may be put in."""
        capture = self.capture.problems if self.capture is not None else ()
        return not self.draining and set(self.not_ready_because) <= set(capture)


ENDPOINT_STATES = ("healthy", "draining", "half-open", "ejected", "open")  # the worst last


def endpoint_state(breaker: str, weight: int, ejected_for_seconds: float) -> str:
    """The one of ENDPOINT_STATES that says the most: ejected is an outlier, open and half-open are of its breaker."""
    if breaker == "open":  # which panic does not overrule either
        return "open"
    if ejected_for_seconds:
        return "ejected"
    if breaker == "closed":
        return "healthy" if weight else "draining"
    return breaker


class EndpointView(Shape, frozen=True):
    """`state` follows from the rest: that of `endpoint_state`, or unresolved, where no address of a name is known."""

    service: str
    endpoint: str  # empty for a name of which no address is known
    tunnel: str
    identity: str
    weight: int
    breaker: str  # closed, open or half-open
    connections: int
    pending: int
    failures: int  # consecutive
    open_for_seconds: float = 0.0
    ejected_for_seconds: float = 0.0  # as an outlier, whatever its breaker does
    connect_ms: float | None = None  # of late
    last_error: str = ""
    workers: int = 0  # how many workers see `state` so, for each judges for itself; 0 without workers
    check: str = ""  # passing, failing, panic (failing, as all do: used all the same); empty: no check said anything
    check_error: str = ""  # of the last check, if it failed or said nothing
    dns_name: str = ""  # whose address it is, where the Service gives a name
    dns_problem: str = ""  # why that could not be asked for the last time: what was known of it stays
    state: str = ""

    def __post_init__(self) -> None:
        state = endpoint_state(self.breaker, self.weight, self.ejected_for_seconds) if self.endpoint else "unresolved"
        msgspec.structs.force_setattr(self, "state", state)


class Candidate(Shape, frozen=True):
    """An endpoint that the next connection may get. The lowest `score` is first with least_conn."""

    endpoint: str
    tunnel: str
    near: str  # zone, region or any; empty where nobody says where it is
    weight: int
    warmth: float  # the part of its weight that counts while it is new, or has just come back
    connections: int
    connect_ms: float | None = None  # of late
    score: float | None = None  # (connections + 1) / (weight * warmth); None: it is passed over
    why_not: str = ""


class RouteView(Shape, frozen=True):
    """`route`: service, endpoint (the client names it itself), passthrough or refused. The best candidate is first."""

    target: str
    route: str
    detail: str = ""
    service: str = ""
    balance: str = ""
    candidates: tuple[Candidate, ...] = ()
    more: int = 0  # endpoints that are not listed
    api_version: str = "meshnet.dev/v1"
    kind: str = "Route"


class Admission(Shape, frozen=True):
    """For one kind of caller. `identity` is empty for plain text; `reason` for those who are let in."""

    identity: str
    allowed: bool
    policy: str = ""
    reason: str = ""
    detail: str = ""


class AdmissionView(Shape, frozen=True):
    """`callers`: as whom something at `source` would call: in plain text, and as each identity that the mesh has there.

    `more`: identities that are not listed.
    """

    source: str
    target: str
    service: str
    mode: str
    callers: tuple[Admission, ...] = ()
    more: int = 0
    api_version: str = "meshnet.dev/v1"
    kind: str = "Admission"


class EndpointList(Shape, frozen=True):
    items: tuple[EndpointView, ...] = ()
    api_version: str = "meshnet.dev/v1"
    kind: str = "EndpointList"


class Sample(Shape, frozen=True):
    name: str
    labels: dict[str, str]
    value: float


class Family(Shape, frozen=True):
    """A metric as Prometheus has it; `type` is counter, gauge or histogram."""

    name: str
    type: str
    help: str
    samples: tuple[Sample, ...]


class FamilyList(Shape, frozen=True):
    items: tuple[Family, ...] = ()
    kind: str = "FamilyList"


class LogLevel(Shape, frozen=True):
    """What is in force. `is_set`: for this subsystem; else it is that of all, or of the settings.

    `seconds_left`: until it goes back; None: it does not.
    """

    subsystem: str  # or all
    level: str
    is_set: bool = False
    seconds_left: float | None = None


class LogLevelList(Shape, frozen=True):
    items: tuple[LogLevel, ...] = ()
    api_version: str = "meshnet.dev/v1"
    kind: str = "LogLevelList"


class Accepted(Shape, frozen=True):
    """The answer to a request that only does something. `connections`: how many it is done to."""

    message: str = ""
    connections: int = 0
    kind: str = "Accepted"


class Refused(Shape, frozen=True):
    """The answer to a request that could not be met."""

    error: str
    fix: str = ""
    kind: str = "Error"


decode_request = msgspec.json.Decoder(Request).decode
