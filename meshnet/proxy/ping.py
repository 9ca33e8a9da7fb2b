"""`meshnet ping`: dials an endpoint as a connection would, but apart from all connections, and ends it at once.

Nothing that a connection gets depends on it: no tunnel of the pool is taken, no breaker is told, no limit counts it.
The peer sidecar is asked for the application, so its access policy and the application answer; there it is a connection
with a record, ended by a FIN.
"""

import socket
import time
from dataclasses import dataclass

import trio
from msgspec import structs

from meshnet.codec.frames import Open
from meshnet.decide.bypass import CaptureScope
from meshnet.decide.names import nameless
from meshnet.decide.route import Passthrough, Refuse, ToService, route
from meshnet.errors import ConnectionFailed, EndedBy, Phase, Reason, TunnelError
from meshnet.model.address import Address
from meshnet.model.admin import Refused
from meshnet.model.connection import Direction, ReasonView
from meshnet.model.ping import EndpointPing, PingResult
from meshnet.model.service import Endpoint, ServicePort, TunnelKind
from meshnet.net import sockets
from meshnet.proxy.admission import admit
from meshnet.proxy.capture import CaptureProof
from meshnet.proxy.named import named, what_can_be_named
from meshnet.proxy.patience import Patience
from meshnet.proxy.record import new_id
from meshnet.proxy.state import ProxyState
from meshnet.tunnel.client import ClientTunnel

_MOST = 16  # endpoints, all at once
_END = 1.0  # seconds for the application to end its half, before the lease is reset
_LONGEST = 60.0  # seconds for an endpoint, whatever was asked

_REFUSED_BY_POLICY = (Reason.AUTHZ_DENIED, Reason.AUTHN_DISABLED, Reason.AUTHN_PLAINTEXT)
_BEHIND_POLICY = (Reason.CONNECT_REFUSED, Reason.CONNECT_TIMEOUT, Reason.CONNECT_UNREACHABLE)


async def ping(target: str, timeout: float, state: ProxyState) -> PingResult | Refused:
    """All that this process knows of it; whether rules capture is for who proves that: see `with_capture`."""
    result = PingResult(target=target, address="", route="refused")
    try:
        state.need_mesh()
        address, service = named(target, state.snapshot)
        if address is None and service is None:
            return Refused(error=f"no service {target} here", fix=what_can_be_named(target, state.snapshot))
        result = structs.replace(result, address=str(address or ""), capture=_leaves(address, state))
        way = _way(address, service, state)
    except ConnectionFailed as failure:
        return structs.replace(result, reason=_reason(failure))
    if isinstance(way, Address):
        return structs.replace(result, route="passthrough", items=(await _plain(way, timeout, state),))
    return await _every(way, timeout, state, structs.replace(result, route="service", service=way.service.name))


async def _every(way: ToService, timeout: float, state: ProxyState, result: PingResult) -> PingResult:
    """`result`, with what became of the endpoints."""
    endpoints = (way.pinned,) if way.pinned else way.service.endpoints
    if not endpoints:
        names = [f"{name} ({state.names.problem(name) or 'no answer yet'})" for name in nameless(way.service)]
        unknown = f": no address is known of {', '.join(names)}" if names else ""
        failure = ConnectionFailed(Reason.NO_ENDPOINT, f"{way.service.name} has no endpoint{unknown}")
        return structs.replace(result, reason=_reason(failure))
    items: dict[Endpoint, EndpointPing] = {}

    async def one(endpoint: Endpoint) -> None:
        found = await _endpoint(endpoint, way.service, timeout, state)
        check = "" if way.pinned else state.checks.view(way.service, endpoint)[0]
        items[endpoint] = structs.replace(found, check=check)

    tried = endpoints[:_MOST]
    async with trio.open_nursery() as nursery:
        for endpoint in tried:
            nursery.start_soon(one, endpoint)
    return structs.replace(result, items=tuple(items[endpoint] for endpoint in tried), more=len(endpoints) - len(tried))


def with_capture(result: PingResult, capture: CaptureProof) -> PingResult:
    """Says whether connections to there are captured, as far as settings and the last proof tell."""
    if result.capture:
        return structs.replace(result, captured=False, capture=f"{result.capture} leaves it alone")
    if not result.address:
        return structs.replace(result, capture="it has no address of its own")
    captured = capture.captures("ipv6" if result.address.startswith("[") else "ipv4")
    why = {True: "", False: "the rules are not in force: sudo meshnet rules verify", None: "it is not proved"}[captured]
    return structs.replace(result, captured=captured, capture=why)


def _way(address: Address | None, service: ServicePort | None, state: ProxyState) -> ToService | Address:
    """Into the mesh, or past it to an address. Raises ConnectionFailed(loop)."""
    if service is not None:
        return ToService(service)
    assert address is not None  # one of both was found
    match route(state.snapshot, address, state.own_ports, state.is_local(address.host)):
        case ToService() as way:
            return way
        case Passthrough():
            return address
        case Refuse(reason=reason, detail=detail):
            raise ConnectionFailed(reason, detail)


def _leaves(address: Address | None, state: ProxyState) -> str:
    """The setting of [capture] that leaves connections from here to there alone, whoever opens them."""
    if address is None:
        return ""
    scope = CaptureScope(state.settings)
    if state.is_local(address.host):
        return scope.leaves_local(address.port)
    packed = socket.inet_pton(socket.AF_INET6 if address.is_v6 else socket.AF_INET, address.host)
    return scope.leaves_outbound(packed, address.port, None)


@dataclass(slots=True)
class _Steps:
    """How far it came. Times are milliseconds."""

    tcp: float | None = None
    tls: float | None = None
    opened: float | None = None
    identity: str = ""
    verdict: str = "unknown"
    policy: str = ""
    phase: Phase = Phase.CONNECT


async def _endpoint(endpoint: Endpoint, service: ServicePort, timeout: float, state: ProxyState) -> EndpointPing:
    known = state.endpoints.get(endpoint.address)
    is_local = state.is_local(endpoint.address.host)
    timeout = min(timeout, _LONGEST)
    patience = Patience(time.monotonic(), timeout, min(timeout, service.traffic.connect.attempt_timeout))
    steps, failed = _Steps(), None
    try:
        if is_local:
            await _here(endpoint, patience, steps, state)
        elif endpoint.tunnel is TunnelKind.NONE:
            await _connect(endpoint.address, patience.for_attempt(), steps, state)
        else:
            await _through_tunnel(endpoint, service, patience, steps, state)
    except ConnectionFailed as failure:
        failed = failure
    now = time.monotonic()
    return EndpointPing(
        endpoint=endpoint.name,
        tunnel="local" if is_local else str(endpoint.tunnel),
        weight=endpoint.weight,
        breaker=str(known.breaker.state(now)) if known else "closed",
        ejected_for_seconds=round(max(0.0, known.outcomes.ejected_until - now), 1) if known else 0.0,
        tcp_ms=steps.tcp,
        tls_ms=steps.tls,
        open_ms=steps.opened,
        identity=steps.identity,
        verdict=steps.verdict,
        policy=steps.policy,
        reason=_reason(failed, steps.phase) if failed else None,
    )


async def _plain(address: Address, timeout: float, state: ProxyState) -> EndpointPing:
    """What is in no mesh."""
    steps, failed = _Steps(), None
    try:
        await _connect(address, min(timeout, _LONGEST), steps, state)
    except ConnectionFailed as failure:
        failed = failure
    return EndpointPing(
        endpoint=str(address),
        tunnel=str(TunnelKind.NONE),
        weight=1,
        breaker="closed",
        tcp_ms=steps.tcp,
        reason=_reason(failed) if failed else None,
    )


async def _connect(address: Address, timeout: float, steps: _Steps, state: ProxyState, *, local: bool = False) -> None:
    started = time.monotonic()
    (await sockets.connect(address, mark=state.mark, timeout=timeout, local=local)).close()
    steps.tcp = _since(started)


async def _here(endpoint: Endpoint, patience: Patience, steps: _Steps, state: ProxyState) -> None:
    """As a hairpin: the policy of this very sidecar."""
    source = Address(endpoint.address.host, 0)
    record = state.registry.life(Direction.OUTBOUND, source, None)  # never begun: nobody's connection
    steps.phase, steps.identity = Phase.AUTHZ, state.identity.name
    try:
        admit(state.identity.name, endpoint.address, record, state, tunnelled=True)
    except ConnectionFailed as failure:
        steps.verdict, steps.policy = "denied", failure.policy
        raise
    steps.phase, steps.verdict, steps.policy = Phase.CONNECT, "allowed", record.policy
    await _connect(endpoint.address, patience.for_attempt(), steps, state, local=True)


async def _through_tunnel(
    endpoint: Endpoint, service: ServicePort, patience: Patience, steps: _Steps, state: ProxyState
) -> None:
    started = time.monotonic()
    steps.phase = Phase.TLS
    try:
        tunnel = await state.pool.apart(endpoint.tunnel_address, endpoint.identity, patience.for_attempt())
    except ConnectionFailed as failure:
        if failure.reason in _BEHIND_POLICY:  # of the peer's own port
            steps.phase = Phase.CONNECT
        raise
    try:
        steps.tcp, steps.tls = round(_since(started) - tunnel.handshake_ms, 3), round(tunnel.handshake_ms, 3)
        steps.identity, steps.phase = tunnel.channel.identity, Phase.AUTHZ
        started, left = time.monotonic(), patience.for_attempt(tunnel.took)
        request = Open(
            host=endpoint.address.host,
            port=endpoint.address.port,
            service=service.name,
            id=new_id(time.time()) + state.registry.id_suffix,
            deadline=max(1, int(left * 1000)),
        )
        try:
            await tunnel.open(request, b"", left)
        except ConnectionFailed as failure:
            steps.opened, steps.policy = _since(started), failure.policy
            if failure.reason in _REFUSED_BY_POLICY:
                steps.verdict = "denied"
            elif failure.reason in _BEHIND_POLICY and failure.ended_by is EndedBy.PEER_PROXY:
                steps.verdict, steps.phase = "allowed", Phase.CONNECT  # the application was dialled
            raise
        steps.opened, steps.verdict = _since(started), "allowed"
        await _end(tunnel)
    finally:
        tunnel.channel.close()


async def _end(tunnel: ClientTunnel) -> None:
    """By a FIN, as a client that has nothing to say; an application that then goes on for long is reset."""
    wire, channel = tunnel.wire, tunnel.channel
    try:
        await channel.send_all(wire.fin())
        with trio.move_on_after(_END):
            while not wire.lease_over and (data := await channel.receive()):
                wire.receive(memoryview(data))
        if not wire.lease_over:
            channel.send_now(wire.reset(Reason.PEER_RST))
    except (OSError, ConnectionFailed, TunnelError):
        pass  # it was reached, and is closed now


def _reason(failure: ConnectionFailed, phase: Phase = Phase.ACCEPT) -> ReasonView:
    return ReasonView(code=failure.reason, message=failure.detail, ended_by=failure.ended_by, phase=phase)


def _since(started: float) -> float:
    return round((time.monotonic() - started) * 1000, 3)
