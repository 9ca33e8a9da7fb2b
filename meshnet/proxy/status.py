"""What the sidecar says of itself: the structs of `meshnet status` and `meshnet endpoints`, and readiness."""

import os
import socket
import time
from collections.abc import Mapping

from meshnet import __version__
from meshnet.decide.names import nameless
from meshnet.model.admin import ConfigStatus, EndpointList, EndpointView, RelayStatus, Status, TunnelStatus
from meshnet.model.service import Endpoint, NamedEndpoint, ServicePort, TunnelKind
from meshnet.model.snapshot import Snapshot
from meshnet.proxy.capture import CaptureProof
from meshnet.proxy.state import ProxyState

_STARTED = time.monotonic()


def node_name() -> str:
    return os.environ.get("MESHNET_NODE") or socket.gethostname()


def not_ready_because(state: ProxyState, capture: CaptureProof | None = None) -> tuple[str, ...]:
    """Empty when this sidecar can do its work."""
    problems = []
    if state.draining:
        problems.append("draining")
    elif capture is not None:  # whoever drains may be about to lose its rules
        problems += capture.problems()
    if state.snapshot.version == 0:
        problems.append(state.config_problem or "no mesh configuration yet")
    certificate = state.identity.status()
    if certificate.problem and not certificate.is_valid and _needs_identity(state):
        problems.append(f"no certificate: {certificate.problem} (meshnet ca issue --help)")
    return tuple(problems)


def status(state: ProxyState, listeners: Mapping[str, str], capture: CaptureProof | None = None) -> Status:
    state.registry.catch_up()
    problems = not_ready_because(state, capture)
    return Status(
        node=node_name(),
        version=__version__,
        pid=os.getpid(),
        uptime_seconds=round(time.monotonic() - _STARTED, 1),
        ready=not problems,
        not_ready_because=problems,
        draining=state.draining,
        listeners=dict(listeners),
        open_connections=len(state.registry.open),
        opened_total=state.registry.opened_total,
        failed_total=state.registry.failed_total,
        certificate=state.identity.status(),
        config=ConfigStatus(
            version=state.snapshot.version,
            directory=state.settings.mesh.directory,
            services=count_services(state.snapshot),
            policies=len(state.snapshot.policies),
            age_seconds=round(time.monotonic() - state.applied_at, 1),
            problem=state.config_problem,
        ),
        relay=RelayStatus(
            in_use=tuple(relay.name for relay in state.relays.available), not_in_use=dict(state.relays.missing)
        ),
        tunnels=tuple(
            TunnelStatus(peer=f"{address} {identity}", idle=idle, leased=leased)
            for (address, identity), (idle, leased) in state.pool.counts().items()
        ),
        mark=state.mark,
        gid=os.getegid(),
        network=os.stat("/proc/self/ns/net").st_ino,
        inbound_mode=state.settings.capture.inbound_mode,
        original_source=state.settings.capture.original_source,
        readiness_port=state.settings.capture.readiness_port,
        truthful=state.held.status() if state.held is not None else None,
        capture=capture.status() if capture is not None else None,
    )


def count_services(snapshot: Snapshot) -> int:
    """Services as they were written: one with several ports is several in a snapshot, and one here."""
    return len({(service.namespace, service.service) for service in snapshot.services})


def endpoints(state: ProxyState, service_name: str) -> EndpointList:
    """Every endpoint of every service, or of one, named `service` or `service:port`."""
    now = time.monotonic()
    return EndpointList(
        items=tuple(
            _endpoint(service, endpoint, state, now)
            for service in state.snapshot.services
            if service_name in ("", service.name, service.service)
            for endpoint in _shown(service)
        )
    )


def _shown(service: ServicePort) -> tuple[Endpoint | NamedEndpoint, ...]:
    """Its endpoints, and the names of which no address is known."""
    names = nameless(service)
    return (*service.endpoints, *(each for each in service.named if each.dns_name in names))


def _endpoint(service: ServicePort, endpoint: Endpoint | NamedEndpoint, state: ProxyState, now: float) -> EndpointView:
    known = state.endpoints.get(endpoint.address) if isinstance(endpoint, Endpoint) else None
    view = {
        "service": service.name,
        "endpoint": endpoint.name if isinstance(endpoint, Endpoint) else "",
        "tunnel": str(endpoint.tunnel),
        "identity": endpoint.identity,
        "weight": endpoint.weight,
        "dns_name": endpoint.dns_name,
        "dns_problem": state.names.problem(endpoint.dns_name),
    }
    if isinstance(endpoint, Endpoint):
        view["check"], view["check_error"] = state.checks.view(service, endpoint)
    if known is None:
        return EndpointView(**view, breaker="closed", connections=0, pending=0, failures=0)  # type: ignore[arg-type] # mixed values
    return EndpointView(
        **view,  # type: ignore[arg-type] # mixed values
        breaker=str(known.breaker.state(now)),
        connections=known.connections - known.pending,
        pending=known.pending,
        failures=known.breaker.failures,
        open_for_seconds=round(known.breaker.open_for(now), 1),
        ejected_for_seconds=round(max(0.0, known.outcomes.ejected_until - now), 1),
        connect_ms=known.connect_time.ms,
        last_error=known.last_error,
    )


def _needs_identity(state: ProxyState) -> bool:
    return any(
        endpoint.tunnel is not TunnelKind.NONE for service in state.snapshot.services for endpoint in service.given
    )
