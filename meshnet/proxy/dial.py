"""Choose an endpoint, try it, learn from it, choose again: until a leg is up or nothing is left to try."""

import socket
import time

import trio

from meshnet.codec.frames import MAX_DATA
from meshnet.decide.balance import Candidate
from meshnet.decide.breaker import counts_against_endpoint
from meshnet.decide.limits import below_endpoint_limit
from meshnet.decide.retry import Dial, GiveUp, Wait
from meshnet.errors import ConnectionFailed, EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.service import Endpoint, ServicePort, TunnelKind
from meshnet.net.strand import in_task
from meshnet.proxy.attempt import EndpointLeg, Patience, reach_endpoint
from meshnet.proxy.record import Record
from meshnet.proxy.state import EndpointState, ProxyState


async def dial_service(
    service: ServicePort, pinned: Endpoint | None, client: socket.socket, record: Record, state: ProxyState
) -> EndpointLeg:
    """A leg to one of the service's endpoints. Raises ConnectionFailed with the reason of the last attempt."""
    connect = service.traffic.connect
    started = record.opened if record.queued is None else time.monotonic()
    plan = Dial(connect, started)
    patience = Patience(started + connect.total_timeout, connect.attempt_timeout)
    budget = state.service(service).budget
    tried: set[Address] = set()
    last: ConnectionFailed | None = None
    early = b""
    while True:
        now = time.monotonic()
        candidates = _candidates(service, pinned, tried, state, now)
        step = plan.next(now, bool(candidates), last.reason if last else None, budget, state.dice)
        if isinstance(step, GiveUp):
            raise last or _nothing_to_try(service, pinned, state, now)
        if isinstance(step, Wait):
            tried.clear()
            await in_task()
            await trio.sleep(step.seconds)
            continue
        endpoint = state.balancer(service).pick(service.traffic.balance, candidates, state.dice)
        tried.add(endpoint.address)
        if endpoint.tunnel is not TunnelKind.NONE and not early:
            early = _early_data(client)
        known = state.endpoint(endpoint, service)
        if not known.breaker.admit(now):
            continue
        try:
            return await _try(endpoint, known, service, early, patience, record, state)
        except ConnectionFailed as failure:
            last = failure


async def _try(
    endpoint: Endpoint,
    known: EndpointState,
    service: ServicePort,
    early: bytes,
    patience: Patience,
    record: Record,
    state: ProxyState,
) -> EndpointLeg:
    """An attempt, which counts for or against the endpoint's breaker once, or not at all if it was cut short."""
    known.pending += 1
    judged = False
    try:
        leg = await reach_endpoint(endpoint, service, early, patience, record, state)
        known.breaker.succeeded(time.monotonic())
        judged = True
        known.open += 1
        leg.known = known
        return leg
    except ConnectionFailed as failure:
        known.last_error = f"{failure.reason}: {failure.detail}"
        if counts_against_endpoint(failure.reason):
            known.breaker.failed(time.monotonic(), state.dice)
            judged = True
        raise
    finally:
        known.pending -= 1
        if not judged:
            known.breaker.abandoned(time.monotonic())


def _candidates(
    service: ServicePort, pinned: Endpoint | None, tried: set[Address], state: ProxyState, now: float
) -> list[Candidate]:
    """The endpoints that may be tried now: not tried before, breaker willing, below their own limit, not drained."""
    candidates = []
    for endpoint in (pinned,) if pinned else service.endpoints:
        if endpoint.address in tried or endpoint.weight == 0:
            continue
        known = state.endpoints.get(endpoint.address)
        if known is None:
            candidates.append(Candidate(endpoint, 0, 0))
            continue
        candidate = Candidate(endpoint, known.open, known.pending)
        if known.breaker.allows(now) and below_endpoint_limit(service.traffic.limits, candidate):
            candidates.append(candidate)
    return candidates


def _nothing_to_try(service: ServicePort, pinned: Endpoint | None, state: ProxyState, now: float) -> ConnectionFailed:
    endpoints = (pinned,) if pinned else service.endpoints
    known = [state.endpoints[endpoint.address] for endpoint in endpoints if endpoint.address in state.endpoints]
    waits = [held.breaker.open_for(now) for held in known if not held.breaker.allows(now)]
    if not [endpoint for endpoint in endpoints if endpoint.weight]:
        return ConnectionFailed(Reason.NO_ENDPOINT, f"{service.name} has no endpoint")
    if waits:
        return ConnectionFailed(
            Reason.BREAKER_OPEN,
            f"{len(waits)} of {len(endpoints)} endpoints of {service.name} are out; next try in {min(waits):.1f} s",
        )
    return ConnectionFailed(
        Reason.LIMIT_CONNECTIONS, f"every endpoint of {service.name} is at its limit", ended_by=EndedBy.LIMIT
    )


def _early_data(client: socket.socket) -> bytes:
    """What the client has sent already: it goes up with OPEN, and is kept until OPENED to be sent elsewhere."""
    try:
        return client.recv(MAX_DATA)
    except BlockingIOError:
        return b""
    except OSError as error:
        raise ConnectionFailed(Reason.PEER_RST, "the client gave up", ended_by=EndedBy.CLIENT) from error
