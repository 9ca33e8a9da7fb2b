"""What is told of each endpoint that was dialled, and of all that a service has. Read in a thread, at the scrape."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client.core import GaugeMetricFamily, Metric

from meshnet.decide.breaker import BreakerState
from meshnet.decide.outlier import PANIC
from meshnet.model.admin import ENDPOINT_STATES, endpoint_state

if TYPE_CHECKING:
    from meshnet.proxy.state import EndpointState, ProxyState

MOST = 2000  # endpoints that are told apart, of all services: those that get no connections first
_WELL = ("healthy", "draining")
_ALWAYS_TOLD = ("healthy", "ejected", "open")  # the others where there are some, for services are many
_BREAKER_STATES = {BreakerState.CLOSED: 0, BreakerState.HALF_OPEN: 1, BreakerState.OPEN: 2}


class _Told(NamedTuple):
    labels: tuple[str, str]
    weight: int
    known: "EndpointState"
    breaker: BreakerState
    open_for: float
    ejected_for: float


_FIGURES: tuple[tuple[str, str, Callable[[_Told], float | None]], ...] = (
    ("meshnet_breaker_state", "0 closed, 1 half-open, 2 open.", lambda it: _BREAKER_STATES[it.breaker]),
    ("meshnet_endpoint_weight", "Its weight among those of its service.", lambda it: it.weight),
    ("meshnet_endpoint_connections", "Connections open to it.", lambda it: it.known.open),
    ("meshnet_endpoint_pending", "Connections being dialled to it.", lambda it: it.known.pending),
    ("meshnet_endpoint_failures", "Its failures in a row.", lambda it: it.known.breaker.failures),
    ("meshnet_endpoint_open_for_seconds", "Until its breaker lets a probe through.", lambda it: it.open_for),
    ("meshnet_endpoint_ejected_for_seconds", "Until its ejection is over.", lambda it: it.ejected_for),
    ("meshnet_endpoint_connect_seconds", "What connecting takes of late.", lambda it: it.known.connect_time.seconds),
)


def endpoint_metrics(state: "ProxyState", now: float) -> Iterator[Metric]:
    counts = GaugeMetricFamily("meshnet_endpoints", "Endpoints by state.", labels=["service", "state"])
    text = "1 where doubtful endpoints are used, for want of others."
    panic = GaugeMetricFamily("meshnet_service_panic", text, labels=["service"])
    text = "1 while every endpoint of a service fails its checks, and they are used all the same."
    check_panic = GaugeMetricFamily("meshnet_check_panic", text, labels=["service"])
    troubled: list[_Told] = []
    well: list[_Told] = []
    for service in state.snapshot.services:
        name, states = service.name, dict.fromkeys(ENDPOINT_STATES, 0)
        for endpoint in service.endpoints:
            known, weight = state.endpoints.get(endpoint.address), endpoint.weight
            if known is None:
                states[endpoint_state(BreakerState.CLOSED, weight, 0.0)] += 1
                continue
            ejected_for = max(0.0, known.outcomes.ejected_until - now)
            breaker, open_for = known.breaker.state(now), known.breaker.open_for(now)
            found = endpoint_state(breaker, weight, ejected_for)
            states[found] += 1
            told = well if found in _WELL else troubled
            if len(told) < MOST:
                told.append(_Told((name, endpoint.name), weight, known, breaker, open_for, ejected_for))
        checked = state.checks.failing(service)
        if checked is not None:
            failing, is_panic = checked
            states["healthy"] = max(0, states["healthy"] - failing)
            counts.add_metric([name, "failing"], failing)
            check_panic.add_metric([name], float(is_panic))
        for what, count in states.items():
            if count or what in _ALWAYS_TOLD:
                counts.add_metric([name, what], count)
        held = state.services.get((service.namespace, service.service))
        if held is not None:
            panic.add_metric([name], float(now - held.panicked_at < PANIC))
    yield from _figures([*troubled, *well][:MOST])
    yield from (counts, panic, check_panic)


def _figures(endpoints: Iterable[_Told]) -> Iterator[Metric]:
    for name, text, figure in _FIGURES:
        gauge = GaugeMetricFamily(name, text, labels=["service", "endpoint"])
        for each in endpoints:
            value = figure(each)
            if value is not None:
                gauge.add_metric(each.labels, value)
        yield gauge
