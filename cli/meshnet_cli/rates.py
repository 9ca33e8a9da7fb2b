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
_NAMES = frozenset({_OPEN, _OPENED, _FAILED, _SENT, _RECEIVED})
_DIRECTIONS = {"source": Direction.OUTBOUND, "destination": Direction.INBOUND}

Key = tuple[str, str]
"""The labels destination_service and reporter."""


class ServiceRates(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Of one service, as this sidecar called it or was called for it. What has no service is `unknown`.

    `opened`, `failed` and bytes are since the sidecar started.
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


class ConnectTimes(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """From accept until both legs were up, of the connections that ended `within`: the interval, or since the start."""

    within: Literal["interval", "start"]
    connections: int
    p50_ms: float
    p99_ms: float


class Stat(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """`connect`: None before the first connection has ended."""

    interval_seconds: float
    items: tuple[ServiceRates, ...]
    connect: ConnectTimes | None = None
    api_version: str = "meshnet.dev/v1"
    kind: str = "Stat"


def stat(earlier: Iterable[Family], later: Iterable[Family], seconds: float) -> Stat:
    """`seconds` are between the two looks."""
    before, after = list(_samples(earlier)), list(_samples(later))
    return Stat(
        interval_seconds=round(seconds, 3),
        items=tuple(_services(_sums(before), _sums(after), seconds)),
        connect=_connect_times(before, after),
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


def _sums(samples: Iterable[Sample]) -> dict[Key, _Sums]:
    found: dict[Key, _Sums] = defaultdict(_Sums)
    for sample in samples:
        if sample.name in _NAMES:
            sums = found[sample.labels["destination_service"], sample.labels["reporter"]]
            sums.of[sample.name] += sample.value
            if sample.name == _FAILED:
                sums.reasons[sample.labels["response_flags"]] += sample.value
    return found


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
        )


def _grown(before: float, after: float) -> float:
    """Of a counter: one that has fallen began anew, in a sidecar that was started again."""
    return after - before if after >= before else after


def _connect_times(before: Iterable[Sample], after: Iterable[Sample]) -> ConnectTimes | None:
    then, now = _buckets(before), _buckets(after)
    lately = {bound: _grown(then.get(bound, 0.0), count) for bound, count in now.items()}
    if any(lately.values()):
        return _times("interval", sorted(lately.items()))
    return _times("start", sorted(now.items())) if any(now.values()) else None


def _buckets(samples: Iterable[Sample]) -> dict[float, float]:
    return {float(sample.labels["le"]): sample.value for sample in samples if sample.name == _CONNECTS}


def _times(within: Literal["interval", "start"], buckets: Sequence[tuple[float, float]]) -> ConnectTimes:
    return ConnectTimes(
        within=within,
        connections=int(buckets[-1][1]),
        p50_ms=round(quantile(buckets, 0.5) * 1000, 3),
        p99_ms=round(quantile(buckets, 0.99) * 1000, 3),
    )
