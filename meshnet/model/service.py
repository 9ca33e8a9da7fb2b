"""Services, their endpoints, and how traffic to them is treated."""

import enum
import sys

import msgspec

from meshnet.model import Model
from meshnet.model.address import Address


class TunnelKind(enum.StrEnum):
    """How an endpoint's host is spoken to: in plain TCP, or through its sidecar."""

    NONE = "none"
    MESHNET = "meshnet"


class Mode(enum.StrEnum):
    """What an inbound port does with a connection by how it came.

    permissive takes tunnels and plain text, strict refuses plain text, disable refuses tunnels.
    """

    PERMISSIVE = "permissive"
    STRICT = "strict"
    DISABLE = "disable"


class Balance(enum.StrEnum):
    """Which endpoint gets the next connection."""

    LEAST_CONN = "least_conn"
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"
    MAGLEV = "maglev"  # the same source, the same endpoint
    FIRST = "first"  # as many as the first takes, then the next


class HashOn(enum.StrEnum):
    """What Balance.MAGLEV takes for the source."""

    ADDRESS = "address"
    IDENTITY = "identity"


class Locality(Model, frozen=True, kw_only=True, gc=False):
    """Where something is; empty where nobody says."""

    zone: str = ""
    region: str = ""


NOWHERE = Locality()


class Limits(Model, frozen=True, kw_only=True, gc=False):
    """They protect the endpoint side; 0 means no limit. Per service unless the name says endpoint."""

    max_connections: int = 1024
    max_pending: int = 1024
    queue_timeout: float = 3.0
    max_connections_per_endpoint: int = 0


class BreakerSettings(Model, frozen=True, kw_only=True, gc=False):
    """It protects the caller: per endpoint, opened by consecutive failures the endpoint is to blame for.

    Times in seconds; `jitter` is the share by which an open time may be longer.
    """

    failures: int = 5
    open_time: float = 1.0
    max_open_time: float = 60.0
    jitter: float = 0.5
    reset_after: float = 60.0


class ConnectSettings(Model, frozen=True, kw_only=True, gc=False):
    """Connecting to an endpoint: seconds for one attempt and for all, and how many different endpoints to try."""

    attempt_timeout: float = 2.0
    total_timeout: float = 5.0
    attempts: int = 3


class SlowStart(Model, frozen=True, kw_only=True, gc=False):
    """How many seconds an endpoint that is new, or has come back, takes to get its share, and the least part of it."""

    window: float = 30.0
    least: float = 0.1


class LocalitySettings(Model, frozen=True, kw_only=True, gc=False):
    """Near endpoints first; how much more than its share a tier bears; `strict`: never beyond the nearest."""

    overprovisioning: float = 1.4
    strict: bool = False


class Outlier(Model, frozen=True, kw_only=True, gc=False):
    """Ejecting endpoints that fail more often than others, however that is spread; a `failure_share` of 0 does not.

    Times in seconds: what is counted, how often it is looked at, the first and the longest of an ejection; `jitter` is
    the share by which one may be longer.
    """

    failure_share: float = 0.5
    min_connects: int = 10
    min_endpoints: int = 3
    window: float = 30.0
    interval: float = 10.0
    ejection_time: float = 30.0
    max_ejection_time: float = 300.0
    jitter: float = 0.5
    max_ejected_share: float = 0.5


class OnEject(enum.StrEnum):
    """What becomes of the open connections of an endpoint whose breaker opens, or that is ejected."""

    KEEP = "keep"
    CLOSE = "close"


class Timeouts(Model, frozen=True, kw_only=True, gc=False):
    """Seconds; 0 for never. `idle`: nothing moved. `half_closed`: one side has ended, and nothing moved since.

    `max_age`, a fifth more or less: then it is ended at a moment when it is idle, or `max_age_grace` later in any case.
    `removed`: what the connections of an endpoint that is in the mesh no more get to end.
    """

    idle: float = 0.0
    half_closed: float = 300.0
    max_age: float = 0.0
    max_age_grace: float = 600.0
    removed: float = 0.0


class Rebalance(Model, frozen=True, kw_only=True, gc=False):
    """Ending idle connections of endpoints that have `above` times their share, so many in a minute; 0: none."""

    above: float = 0.0
    per_minute: int = 10


# Bytes that a check says, or expects. In an OPEN, as JSON, they may be six times as long, twice, beside all else there.
MOST_CHECKED = 256


class CheckSettings(Model, frozen=True, kw_only=True, gc=False):
    """Active checks of endpoints: a connect, and if they are given, what is sent and has to be in the answer.

    `rise` passed in a row make an endpoint healthy again, `fall` failed ones unhealthy.
    """

    interval: float = 5.0
    timeout: float = 1.0
    rise: int = 2
    fall: int = 3
    send: str = ""
    expect: str = ""


class Traffic(Model, frozen=True, kw_only=True, gc=False):
    """Everything a TrafficPolicy says, with the defaults that hold without one."""

    balance: Balance = Balance.LEAST_CONN
    hash_on: HashOn = HashOn.ADDRESS
    slow_start: SlowStart = SlowStart()
    locality: LocalitySettings = LocalitySettings()
    limits: Limits = Limits()
    breaker: BreakerSettings = BreakerSettings()
    outlier: Outlier = Outlier()
    on_eject: OnEject = OnEject.KEEP
    connect: ConnectSettings = ConnectSettings()
    timeouts: Timeouts = Timeouts()
    rebalance: Rebalance = Rebalance()
    check: CheckSettings | None = None


class Endpoint(Model, frozen=True, kw_only=True, gc=False):
    """One address behind a service port, ready to be dialled. `dns_name`: the name whose address it is, if it is."""

    address: Address
    tunnel: TunnelKind = TunnelKind.NONE
    tunnel_port: int = 15108
    identity: str = ""
    weight: int = 1
    locality: Locality = NOWHERE
    dns_name: str = ""

    @property
    def name(self) -> str:
        return sys.intern(str(self.address))  # one for all of its connections

    @property
    def tunnel_address(self) -> Address:
        return Address(self.address.host, self.tunnel_port)


class NamedEndpoint(Model, frozen=True, kw_only=True, gc=False):
    """As many endpoints as its DNS name has addresses, which whoever dials has to ask for."""

    dns_name: str
    port: int
    tunnel: TunnelKind = TunnelKind.NONE
    tunnel_port: int = 15108
    identity: str = ""
    weight: int = 1
    locality: Locality = NOWHERE


class ServicePort(Model, frozen=True, kw_only=True, gc=False):
    """One port of one service: what a connection is routed to. `endpoints` has those of `named` that are known."""

    service: str
    namespace: str
    port: int
    mode: Mode
    endpoints: tuple[Endpoint, ...]
    traffic: Traffic = Traffic()
    named: tuple[NamedEndpoint, ...] = ()

    @property
    def given(self) -> tuple[Endpoint | NamedEndpoint, ...]:
        """Every endpoint that is known, and the names by which some are given."""
        return (*self.endpoints, *self.named)

    @property
    def name(self) -> str:
        """`service:port`; with `namespace/` before it unless that is `default`."""
        prefix = "" if self.namespace == "default" else f"{self.namespace}/"
        return sys.intern(f"{prefix}{self.service}:{self.port}")  # as an endpoint's


class Action(enum.StrEnum):
    ALLOW = "ALLOW"
    DENY = "DENY"


class Source(Model, frozen=True, kw_only=True):
    """Who calls. Lists are OR, fields are AND. `principals` are SPIFFE ids, exact or with one `*` at an end."""

    principals: tuple[str, ...] = ()
    not_principals: tuple[str, ...] = ()
    ip_blocks: tuple[str, ...] = ()
    not_ip_blocks: tuple[str, ...] = ()


class Target(Model, frozen=True, kw_only=True):
    """What is called: the application's ports."""

    ports: tuple[int, ...] = ()
    not_ports: tuple[int, ...] = ()


class Rule(Model, frozen=True, kw_only=True):
    """One way to match: every part that is given must match; a rule with nothing in it matches nobody."""

    source: Source | msgspec.UnsetType = msgspec.field(default=msgspec.UNSET, name="from")
    target: Target | msgspec.UnsetType = msgspec.field(default=msgspec.UNSET, name="to")


class AccessPolicy(Model, frozen=True, kw_only=True):
    """Who may call. Any DENY that matches wins; with an ALLOW in force, one must match.

    `services` narrows the policy to the ports of these services (as `name` or `namespace/name`); empty: every port.
    """

    name: str
    action: Action
    services: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
