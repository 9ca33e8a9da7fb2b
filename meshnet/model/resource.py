"""Mesh resources as users write them: Kubernetes-shaped, apiVersion meshnet.dev/v1.

Durations are text here (`3s`); `meshnet.codec.mesh` turns resources into what a proxy works with.
"""

from meshnet.model import Model
from meshnet.model.service import Action, Balance, HashOn, Mode, OnEject, Rule, TunnelKind

API_VERSION = "meshnet.dev/v1"


class Metadata(Model, frozen=True, kw_only=True):
    name: str
    namespace: str = "default"
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class PortSpec(Model, frozen=True, kw_only=True):
    port: int
    target_port: int = 0  # 0: the same as port
    name: str = ""
    mode: Mode | None = None


class EndpointSpec(Model, frozen=True, kw_only=True):
    address: str  # an IP address, or a DNS name
    tunnel: TunnelKind = TunnelKind.NONE
    tunnel_port: int = 15108
    identity: str = ""
    weight: int = 1
    zone: str = ""
    region: str = ""


class ServiceSpec(Model, frozen=True, kw_only=True):
    addresses: tuple[str, ...] = ()
    ports: tuple[PortSpec, ...]
    endpoints: tuple[EndpointSpec, ...] = ()


class LimitsSpec(Model, frozen=True, kw_only=True):
    max_connections: int | None = None
    max_pending: int | None = None
    queue_timeout: str | None = None
    max_connections_per_endpoint: int | None = None


class BreakerSpec(Model, frozen=True, kw_only=True):
    failures: int | None = None
    open_time: str | None = None
    max_open_time: str | None = None
    jitter: float | None = None
    reset_after: str | None = None


class ConnectSpec(Model, frozen=True, kw_only=True):
    attempt_timeout: str | None = None
    total_timeout: str | None = None
    attempts: int | None = None


class SlowStartSpec(Model, frozen=True, kw_only=True):
    window: str | None = None
    least: float | None = None


class LocalitySpec(Model, frozen=True, kw_only=True):
    overprovisioning: float | None = None
    strict: bool | None = None


class OutlierSpec(Model, frozen=True, kw_only=True):
    failure_share: float | None = None
    min_connects: int | None = None
    min_endpoints: int | None = None
    window: str | None = None
    interval: str | None = None
    ejection_time: str | None = None
    max_ejection_time: str | None = None
    jitter: float | None = None
    max_ejected_share: float | None = None


class TimeoutsSpec(Model, frozen=True, kw_only=True):
    idle: str | None = None
    half_closed: str | None = None
    max_age: str | None = None
    max_age_grace: str | None = None
    removed: str | None = None


class RebalanceSpec(Model, frozen=True, kw_only=True):
    above: float | None = None
    per_minute: int | None = None


class CheckSpec(Model, frozen=True, kw_only=True):
    interval: str | None = None
    timeout: str | None = None
    rise: int | None = None
    fall: int | None = None
    send: str | None = None
    expect: str | None = None


class TrafficPolicySpec(Model, frozen=True, kw_only=True):
    services: tuple[str, ...]
    balance: Balance | None = None
    hash_on: HashOn | None = None
    slow_start: SlowStartSpec = SlowStartSpec()
    locality: LocalitySpec = LocalitySpec()
    limits: LimitsSpec = LimitsSpec()
    breaker: BreakerSpec = BreakerSpec()
    outlier: OutlierSpec = OutlierSpec()
    on_eject: OnEject | None = None
    connect: ConnectSpec = ConnectSpec()
    timeouts: TimeoutsSpec = TimeoutsSpec()
    rebalance: RebalanceSpec = RebalanceSpec()
    check: CheckSpec | None = None  # none at all unless it is given, be it without anything in it


class AccessPolicySpec(Model, frozen=True, kw_only=True):
    action: Action
    services: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()


class MeshConfigSpec(Model, frozen=True, kw_only=True):
    trust_domain: str = ""
    mode: Mode = Mode.PERMISSIVE
    default_action: Action = Action.ALLOW


class Resource(Model, frozen=True, kw_only=True, tag_field="kind"):
    api_version: str
    metadata: Metadata


class Service(Resource, frozen=True, kw_only=True, tag="Service"):
    spec: ServiceSpec


class TrafficPolicy(Resource, frozen=True, kw_only=True, tag="TrafficPolicy"):
    spec: TrafficPolicySpec


class AccessPolicy(Resource, frozen=True, kw_only=True, tag="AccessPolicy"):
    spec: AccessPolicySpec


class MeshConfig(Resource, frozen=True, kw_only=True, tag="MeshConfig"):
    spec: MeshConfigSpec


AnyResource = Service | TrafficPolicy | AccessPolicy | MeshConfig

Located = tuple[AnyResource, str, int]
"""A resource with the file and the line it begins at."""
