"""What two looks at a sidecar's metrics say of the time between them. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from meshnet.model.admin import Family, Sample
from meshnet.model.connection import Direction

_OPEN = "meshnet_tcp_connections_open"
_OPENED = "meshnet_tcp_connections_opened_total"
_FAILED = "meshnet_tcp_connections_failed_total"
_SENT = "meshnet_tcp_sent_bytes_total"
_RECEIVED = "meshnet_tcp_received_bytes_total"
_CONNECTS = "meshnet_tcp_connect_seconds_bucket"
_DURATIONS = "meshnet_tcp_connection_duration_seconds_bucket"
_QUEUES = "meshnet_tcp_queue_seconds_bucket"
_HANDSHAKES = "meshnet_tls_handshake_seconds_bucket"
_RETRIES = "meshnet_retries_total"
_NAMES = frozenset({_OPEN, _OPENED, _FAILED, _SENT, _RECEIVED})
_DIRECTIONS = {"source": Direction.OUTBOUND, "destination": Direction.INBOUND}

Key = tuple[str, str]
"""The labels destination_service and reporter."""


class ServiceRates(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Of one service, as this sidecar called it or was called for it. What has no service is `unknown`.

    `opened`, `failed`, bytes and retries are since the sidecar started. `connect`: from accept until both legs were up;
    `duration`: until the end; `queue`: waiting for the limits, of those that had to. None: of no connection yet.
    """

    service: str
    direction: str
    open: int
    opened: int
    failed: int
    failed_by_reason: dict[str, int]
    bytes_sent: int
    bytes_received: int
    opened_per_second: float
    failed_per_second: float
    failed_per_second_by_reason: dict[str, float]
    sent_per_second: float
    received_per_second: float
    retries: int = 0
    retries_denied: int = 0
    connect: "Times | None" = None
    duration: "Times | None" = None
    queue: "Times | None" = None


class Times(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Of how many connections (`handshake`: tunnels) that ended `within` the interval, or else since the start.

    Half of them took at most `p50_ms`, all but one in a hundred `p99_ms`, as near as a histogram tells.
    """

    within: Literal["interval", "start"]
    connections: int
    p50_ms: float
    p99_ms: float


class Stat(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """`connect`: of all connections; `handshake`: TLS handshakes of tunnels this side opened; None: there was none."""

    interval_seconds: float
    items: tuple[ServiceRates, ...]
    connect: Times | None = None
    handshake: Times | None = None
    api_version: str = "meshnet.dev/v1"
    kind: str = "Stat"


def stat(earlier: Iterable[Family], later: Iterable[Family], seconds: float) -> Stat:
    """`seconds` are between the two looks."""
    before, after = list(_samples(earlier)), list(_samples(later))
    return Stat(
        interval_seconds=round(seconds, 3),
        items=tuple(_services(_sums(before), _sums(after), seconds)),
        connect=_times(_buckets(before, _CONNECTS), _buckets(after, _CONNECTS)),
        handshake=_times(_buckets(before, _HANDSHAKES), _buckets(after, _HANDSHAKES)),
    )


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float:
    """Of a histogram, as Prometheus reckons it. `buckets`: upper bounds, the last is infinite, and counts up to them.

    What lies beyond the last finite bound is told as that bound.
    """
    wanted = share * buckets[-1][1]
    lower, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted and count > below:
            return lower if bound == float("inf") else lower + (bound - lower) * (wanted - below) / (count - below)
        lower, below = bound, count
    return lower


def _samples(families: Iterable[Family]) -> Iterator[Sample]:
    for family in families:
        yield from family.samples


class _Sums:
    """What the samples of one service add up to, whoever called it."""

    def __init__(self) -> None:
        self.of: dict[str, float] = defaultdict(float)
        self.reasons: dict[str, float] = defaultdict(float)
        self.retries: dict[str, float] = defaultdict(float)
        self.buckets: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))


def _sums(samples: Iterable[Sample]) -> dict[Key, _Sums]:
    found: dict[Key, _Sums] = defaultdict(_Sums)
    for sample in samples:
        if sample.name in _NAMES:
            sums = _of(sample, found)
            sums.of[sample.name] += sample.value
            if sample.name == _FAILED:
                sums.reasons[sample.labels["response_flags"]] += sample.value
        elif sample.name in (_CONNECTS, _DURATIONS, _QUEUES):
            _of(sample, found).buckets[sample.name][float(sample.labels["le"])] += sample.value
        elif sample.name == _RETRIES:
            _of(sample, found).retries[sample.labels["result"]] += sample.value
    return found


def _of(sample: Sample, found: dict[Key, _Sums]) -> _Sums:
    return found[sample.labels["destination_service"], sample.labels["reporter"]]


def _services(before: Mapping[Key, _Sums], after: Mapping[Key, _Sums], seconds: float) -> Iterator[ServiceRates]:
    for (service, reporter), now in sorted(after.items()):
        then = before.get((service, reporter)) or _Sums()
        rates = {name: _grown(then.of[name], now.of[name]) / seconds for name in _NAMES}
        reasons = {
            reason: _grown(then.reasons[reason], count) / seconds for reason, count in sorted(now.reasons.items())
        }
        yield ServiceRates(
            service=service,
            direction=str(_DIRECTIONS.get(reporter, reporter)),
            open=int(now.of[_OPEN]),
            opened=int(now.of[_OPENED]),
            failed=int(now.of[_FAILED]),
            failed_by_reason={reason: int(count) for reason, count in sorted(now.reasons.items())},
            bytes_sent=int(now.of[_SENT]),
            bytes_received=int(now.of[_RECEIVED]),
            opened_per_second=round(rates[_OPENED], 3),
            failed_per_second=round(rates[_FAILED], 3),
            failed_per_second_by_reason={reason: round(rate, 3) for reason, rate in reasons.items() if rate},
            sent_per_second=round(rates[_SENT], 1),
            received_per_second=round(rates[_RECEIVED], 1),
            retries=int(now.retries["made"]),
            retries_denied=int(now.retries["denied"]),
            connect=_times(then.buckets[_CONNECTS], now.buckets[_CONNECTS]),
            duration=_times(then.buckets[_DURATIONS], now.buckets[_DURATIONS]),
            queue=_times(then.buckets[_QUEUES], now.buckets[_QUEUES]),
        )


def _grown(before: float, after: float) -> float:
    """Of a counter: one that has fallen began anew, in a sidecar that was started again."""
    return after - before if after >= before else after


def _buckets(samples: Iterable[Sample], name: str) -> dict[float, float]:
    """Of all that have that name."""
    found: dict[float, float] = defaultdict(float)
    for sample in samples:
        if sample.name == name:
            found[float(sample.labels["le"])] += sample.value
    return found


def _times(then: Mapping[float, float], now: Mapping[float, float]) -> Times | None:
    lately = {bound: _grown(then.get(bound, 0.0), count) for bound, count in now.items()}
    if any(lately.values()):
        return _told("interval", sorted(lately.items()))
    return _told("start", sorted(now.items())) if any(now.values()) else None


def _told(within: Literal["interval", "start"], buckets: Sequence[tuple[float, float]]) -> Times:
    return Times(
        within=within,
        connections=int(buckets[-1][1]),
        p50_ms=round(quantile(buckets, 0.5) * 1000, 3),
        p99_ms=round(quantile(buckets, 0.99) * 1000, 3),
    )
