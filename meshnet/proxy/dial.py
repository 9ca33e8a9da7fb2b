"""Choose an endpoint, try it, learn from it, choose again: until a leg is up or nothing is left to try."""

import time
from collections.abc import Sequence

import trio

from meshnet.decide.balance import Balancer
from meshnet.decide.breaker import BreakerState, counts_against_endpoint, is_endpoints_fault
from meshnet.decide.names import nameless
from meshnet.decide.retry import Dial, GiveUp, Wait
from meshnet.errors import ConnectionFailed, EndedBy, Reason
from meshnet.model.service import Endpoint, HashOn, ServicePort, TunnelKind
from meshnet.net.strand import in_task
from meshnet.proxy.attempt import EndpointLeg, reach_endpoint
from meshnet.proxy.candidates import Candidates
from meshnet.proxy.client import Client
from meshnet.proxy.patience import Patience
from meshnet.proxy.record import Record
from meshnet.proxy.standing_order import Before
from meshnet.proxy.state import EndpointState, ProxyState

_TOLD = 10  # endpoints that were passed over, for who asks why a connection failed


async def dial_service(
    service: ServicePort,
    pinned: Endpoint | None,
    client: Client,
    record: Record,
    state: ProxyState,
    before: Before,
) -> EndpointLeg:
    """A leg to one of the service's endpoints. Raises ConnectionFailed with the reason of the last attempt."""
    connect = service.traffic.connect
    started = record.opened if record.queued is None else time.monotonic()
    plan = Dial(connect, started, 1 if before.failed else 0)
    patience = Patience(started, connect.total_timeout, connect.attempt_timeout)
    budget = state.service(service).budget
    endpoints = (pinned,) if pinned else service.endpoints
    balancer = state.balancer(service)
    last, early = before.failed, before.early
    tried = {endpoint.address for endpoint in endpoints if endpoint.name == record.endpoint} if last else set()
    candidates = Candidates(service, state, tried, started)
    if pinned:
        candidates.failing = ()  # the client has named it, whatever its checks say

    while True:
        now = candidates.now = time.monotonic()
        why = last.reason if last else None
        endpoint = None if plan.over(now, why) else _pick(balancer, service, endpoints, candidates, record, state)
        step = plan.next(now, endpoint is not None, why, budget, state.dice)
        if isinstance(step, GiveUp):
            record.retry_denied = step.denied
            record.passed_over = tuple(candidates.passed_over(endpoints, _TOLD))
            raise last or _nothing_to_try(service, endpoints, state, now)
        if isinstance(step, Wait):
            tried.clear()
            await in_task()
            await trio.sleep(step.seconds)
            continue
        assert endpoint is not None  # or there would have been nothing to try
        record.weighed = candidates.weighed(endpoints)
        tried.add(endpoint.address)
        if endpoint.tunnel is not TunnelKind.NONE and not early:
            early = client.early_data()
        known = state.endpoint(endpoint, service)
        if not known.breaker.admit(now):
            continue
        try:
            return await _try(endpoint, known, service, early, patience, record, state)
        except ConnectionFailed as failure:
            last = failure


def _pick(
    balancer: Balancer,
    service: ServicePort,
    endpoints: Sequence[Endpoint],
    candidates: Candidates,
    record: Record,
    state: ProxyState,
) -> Endpoint | None:
    """An endpoint that will do; where there is none, one that is ejected or fails its checks: better than none."""

    def source() -> str:
        by_address = service.traffic.hash_on is HashOn.ADDRESS
        return record.source.host if by_address else record.source_identity or record.source.host

    def pick() -> Endpoint | None:
        return balancer.pick(
            service.traffic, endpoints, candidates, state.dice, now=candidates.now, here=state.here, source=source
        )

    candidates.panics = False
    found = pick()
    if found is None:
        candidates.panics = True
        found = pick()
        if found is not None and not candidates.well_were_tried(endpoints):
            state.panicked(service, candidates.now)
    return found


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
    started, window = time.monotonic(), service.traffic.outlier.window
    try:
        leg = await reach_endpoint(endpoint, service, early, patience, record, state)
        now = time.monotonic()
        if known.breaker.state(now) is not BreakerState.CLOSED:
            state.warming[endpoint.address] = now
        known.breaker.succeeded(now)
        known.outcomes.note(True, window, now)
        handshake = record.handshake_ms or 0.0  # which the next one is spared
        known.connect_time.took(max(0.0, now - started - handshake / 1000), now)
        judged = True
        known.open += 1
        leg.known = known
        return leg
    except ConnectionFailed as failure:
        known.last_error = f"{failure.reason}: {failure.detail}"
        if counts_against_endpoint(failure.reason):
            now = time.monotonic()
            known.breaker.failed(now, state.dice)
            state.orders.revoke(known.orders)
            judged = True
            if is_endpoints_fault(failure.reason):
                known.outcomes.note(False, window, now)
                state.blamed(service, endpoint, known, now)
        raise
    finally:
        known.pending -= 1
        if not judged:
            known.breaker.abandoned(time.monotonic())


def _nothing_to_try(
    service: ServicePort, endpoints: Sequence[Endpoint], state: ProxyState, now: float
) -> ConnectionFailed:
    if not any(endpoint.weight for endpoint in endpoints):
        names = [f"{name} ({state.names.problem(name) or 'no answer yet'})" for name in nameless(service)]
        why = f": no address is known of {', '.join(names)}" if names else ""
        return ConnectionFailed(Reason.NO_ENDPOINT, f"{service.name} has no endpoint{why}")
    learned = [known.breaker for endpoint in endpoints if (known := state.endpoints.get(endpoint.address))]
    waits = [breaker.open_for(now) for breaker in learned if not breaker.allows(now)]
    if waits:
        return ConnectionFailed(
            Reason.BREAKER_OPEN,
            f"{len(waits)} of {len(endpoints)} endpoints of {service.name} are out; next try in {min(waits):.1f} s",
        )
    return ConnectionFailed(
        Reason.LIMIT_CONNECTIONS, f"every endpoint of {service.name} is at its limit", ended_by=EndedBy.LIMIT
    )
