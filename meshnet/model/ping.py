"""What became of dialling a service as a connection would."""

from meshnet.model.connection import ReasonView, Shape


class EndpointPing(Shape, frozen=True):
    """What became of it at one endpoint. A time is None for a step that was not reached, or that there is none of.

    `open_ms`: from asking the peer sidecar until its answer, which its access policy and the application gave.
    `identity` was proven. `verdict`: what access policy says, allowed or denied; unknown where nobody was asked.
    """

    endpoint: str
    tunnel: str  # meshnet, none, or local: the endpoint is on this host
    weight: int
    breaker: str
    ejected_for_seconds: float = 0.0
    check: str = ""  # as in EndpointView; empty also where the endpoint was named by its own address
    tcp_ms: float | None = None
    tls_ms: float | None = None
    open_ms: float | None = None
    identity: str = ""
    verdict: str = "unknown"
    policy: str = ""
    reason: ReasonView | None = None  # why it was not reached


class PingResult(Shape, frozen=True):
    """`address`: what was or would be dialled, empty for a service that has none of its own.

    `captured`: whether a connection from this host comes through the sidecar; None where that is not known, and
    `capture` says why it does not, or is not known. `more`: endpoints that were not tried, beyond the first ones.
    """

    target: str
    address: str
    route: str  # service, passthrough, or refused for `reason`
    service: str = ""
    captured: bool | None = None
    capture: str = ""
    items: tuple[EndpointPing, ...] = ()
    more: int = 0
    reason: ReasonView | None = None
    api_version: str = "meshnet.dev/v1"
    kind: str = "PingResult"
