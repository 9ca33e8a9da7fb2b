"""Mesh resources as users write them: Kubernetes-shaped, apiVersion meshnet.dev/v1.

Durations are text here (`3s`); `meshnet.codec.mesh` turns resources into what a proxy works with.
"""

from meshnet.model import Model
from meshnet.model.service import Action, Balance, Mode, Rule, TunnelKind

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
    address: str
    tunnel: TunnelKind = TunnelKind.NONE
    tunnel_port: int = 15108
    identity: str = ""
    weight: int = 1


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


class TrafficPolicySpec(Model, frozen=True, kw_only=True):
    services: tuple[str, ...]
    balance: Balance | None = None
    limits: LimitsSpec = LimitsSpec()
    breaker: BreakerSpec = BreakerSpec()
    connect: ConnectSpec = ConnectSpec()


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
