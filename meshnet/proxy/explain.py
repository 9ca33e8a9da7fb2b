"""A connection told step by step, from its record; and where one would go that is not there yet."""

import time
from dataclasses import dataclass

from meshnet.decide.access import Call
from meshnet.decide.locality import distance
from meshnet.decide.route import Passthrough, Refuse, ToService, route
from meshnet.decide.truth import refused
from meshnet.errors import ConnectionFailed, Phase, Reason
from meshnet.model.address import Address, parse_address
from meshnet.model.admin import Admission, AdmissionView, Candidate, Refused, RouteView
from meshnet.model.canary import is_canary
from meshnet.model.connection import Connection, Direction, Security, Weighed
from meshnet.model.service import NOWHERE, Endpoint, ServicePort
from meshnet.proxy.admission import admit
from meshnet.proxy.candidates import DOUBTFUL, Candidates, Out
from meshnet.proxy.named import named, what_can_be_named
from meshnet.proxy.state import ProxyState

_LISTED = 100  # candidates
_CALLERS = 10
_NEAR = ("zone", "region", "any")


def trace(it: Connection) -> tuple[str, ...]:
    """One line a step, in the order they were taken."""
    target = it.original_destination
    steps = [f"capture: {it.direction} from {it.source.address} to {target or 'an unknown destination'}"]
    if it.direction is Direction.INBOUND:
        who = it.source.identity or "a client without identity"
        steps.append(f"identity: {who}, {'through a tunnel' if it.tls.mode is Security.MTLS else 'in plain text'}")
    if it.destination.service:
        steps.append(f"service: {it.destination.service}")
    elif target and it.direction is Direction.OUTBOUND and is_canary(parse_address(target)):
        steps.append("service: none; a canary of `meshnet rules verify` or `up`, answered here and carried nowhere")
    elif target:
        steps.append("service: none has this address; passed through" if it.endpoint else "service: none")
    if it.policy:
        steps.append(f"policy: {it.policy}")
    if it.queue_ms is not None:
        steps.append(f"limits: waited {it.queue_ms:.0f} ms for a free connection")
    if it.ordered:
        steps.append("order: decided before, for all connections from there to here; the relay dialled by itself")
    for number, attempt in enumerate(it.attempts, 1):
        if attempt.weighed:
            steps.append(f"weighed: {'; '.join(map(_weighed, sorted(attempt.weighed, key=_best_first)))}")
        detail = f": {attempt.detail}" if attempt.detail else ""
        steps.append(f"attempt {number}: {attempt.endpoint} {attempt.result} after {attempt.ms:g} ms{detail}")
    if it.retry_denied:
        steps.append("retry: denied, for the service's budget of them is used up")
    steps += [f"passed over: {each}" for each in it.passed_over]
    if it.tls.mode is Security.MTLS:
        shake = (
            f"{'resumed' if it.tls.resumed else 'full'} handshake in {it.tls.handshake_ms:.1f} ms"
            if it.tls.handshake_ms is not None
            else "on a tunnel that stood already"
        )
        who = f"{it.source.identity} to {it.destination.identity}"
        steps.append(f"mtls: {who}, {it.tls.version} {it.tls.cipher}, {shake}")
    if it.held:
        steps.append(f"connect: the application's own was held{_told_by_connect(it)}")
    if it.connect_ms is not None:
        steps.append(f"data: {it.bytes_sent} bytes sent, {it.bytes_received} received, moved by {it.relay or '-'}")
    if it.reason is None:
        steps.append(f"now: {it.state}")
    else:
        detail = f": {it.reason.message}" if it.reason.message else ""
        steps.append(f"end: {it.reason.code} by {it.reason.ended_by} in phase {it.reason.phase}{detail}")
    return tuple(steps)


def _best_first(it: Weighed) -> tuple[bool, float]:
    return it.score is None, it.score or 0.0


def _weighed(it: Weighed) -> str:
    if it.score is None:
        return f"{it.endpoint} was passed over: {it.why_not}"
    doubt = f", although {it.why_not}" if it.why_not else ""
    return f"{it.endpoint} had score {it.score:.3g}, {it.connections} connections{doubt}"


def _told_by_connect(it: Connection) -> str:
    if it.connect_ms is not None:
        return " until then"
    if it.reason is None:
        return ", and still is"
    if it.reason.code is Reason.PEER_RST:
        return " until it gave up"
    return f", and failed with {'ECONNREFUSED' if refused(it.reason.code) else 'EHOSTUNREACH'}"


def explain_route(target: str, state: ProxyState) -> RouteView | Refused:
    """Where a connection to `target` would go now, and why every other endpoint is passed over."""
    address, service = named(target, state.snapshot)
    if service is not None:
        return _to_service(str(address or service.name), service, service.endpoints, state)
    if address is None:
        return Refused(error=f"no service {target} here", fix=what_can_be_named(target, state.snapshot))
    return _to_address(address, state)


def _to_address(target: Address, state: ProxyState) -> RouteView:
    match route(state.snapshot, target, state.own_ports, state.is_local(target.host)):
        case Refuse(reason=reason, detail=detail):
            return RouteView(target=str(target), route="refused", detail=f"{reason}: {detail}")
        case Passthrough():
            detail = "no service has this address: it is dialled as it is, in plain text"
            return RouteView(target=str(target), route="passthrough", detail=detail)
        case ToService(service=service, pinned=pinned):
            return _to_service(str(target), service, (pinned,) if pinned else service.endpoints, state)


def _to_service(target: str, service: ServicePort, endpoints: tuple[Endpoint, ...], state: ProxyState) -> RouteView:
    candidates = Candidates(service, state, set(), time.monotonic())
    if endpoints is not service.endpoints:
        candidates.failing = ()  # it was named
    outs = [candidates.out(endpoint) for endpoint in endpoints]
    found = [_candidate(endpoint, out, candidates, state) for endpoint, out in zip(endpoints, outs, strict=True)]
    found.sort(key=lambda each: (each.score is None, _NEAR.index(each.near or "any"), each.score or 0.0))
    willing = sum(each.score is not None for each in found)
    detail = "" if willing else "there is none that may be tried now"
    if not willing and any(out in DOUBTFUL for out in outs):
        detail = "all are out: those that are ejected or fail checks would be used all the same"
    return RouteView(
        target=target,
        route="service" if endpoints is service.endpoints else "endpoint",
        detail=detail,
        service=service.name,
        balance=str(service.traffic.balance),
        candidates=tuple(found[:_LISTED]),
        more=max(0, len(found) - _LISTED),
    )


def explain_admission(source: str, target: Address, state: ProxyState) -> AdmissionView:
    """Whether an application of this host may be called from `source`, as anybody that the mesh knows there."""
    service = state.service_at(target)
    endpoints = (endpoint for found in state.snapshot.services for endpoint in found.endpoints)
    identities = sorted({"", *(endpoint.identity for endpoint in endpoints if endpoint.address.host == source)})
    return AdmissionView(
        source=source,
        target=str(target),
        service=service.name if service else "",
        mode=str(state.mode_of(service)),
        callers=tuple(_admission(identity, source, target, state) for identity in identities[:_CALLERS]),
        more=max(0, len(identities) - _CALLERS),
    )


@dataclass
class _Supposed:
    """A connection that there is not; admission notes on it what it finds."""

    source: Address
    direction: Direction = Direction.INBOUND
    phase: Phase = Phase.AUTHZ
    service: str = ""
    call: Call | None = None
    policy: str = ""


def _admission(identity: str, source: str, target: Address, state: ProxyState) -> Admission:
    asked = _Supposed(Address(source, 0))
    try:
        admit(identity, target, asked, state, tunnelled=bool(identity))
    except ConnectionFailed as failure:
        return Admission(
            identity=identity, allowed=False, policy=failure.policy, reason=failure.reason, detail=failure.detail
        )
    return Admission(identity=identity, allowed=True, policy=asked.policy)


def _candidate(endpoint: Endpoint, out: Out | None, candidates: Candidates, state: ProxyState) -> Candidate:
    known = state.endpoints.get(endpoint.address)
    warmth, connections = candidates.warmth(endpoint), candidates.connections(endpoint)
    placed = state.here != NOWHERE and endpoint.locality != NOWHERE
    return Candidate(
        endpoint=endpoint.name,
        tunnel=str(endpoint.tunnel),
        near=_NEAR[distance(state.here, endpoint.locality)] if placed else "",
        weight=endpoint.weight,
        warmth=round(warmth, 3),
        connections=connections,
        connect_ms=known.connect_time.ms if known else None,
        score=None if out else candidates.score(endpoint, connections),
        why_not=candidates.in_words(endpoint, out) if out else "",
    )
