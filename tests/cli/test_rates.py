"""Rates out of two looks at counters, whatever happened between."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.model.admin import Family, Sample
from meshnet_cli.rates import Times, quantile, stat

INF = float("inf")


def look(*values: tuple[str, float, dict[str, str]], connects: dict[str, float] | None = None) -> list[Family]:
    """A family each. Labels that are left out: service api:8080, reporter source."""
    usual = {"destination_service": "api:8080", "reporter": "source"}
    families = [
        Family(
            name=name, type="counter", help="", samples=(Sample(name=f"{name}_total", labels=usual | labels, value=n),)
        )
        for name, n, labels in values
    ]
    buckets = tuple(
        Sample(name="meshnet_tcp_connect_seconds_bucket", labels=usual | {"le": bound}, value=count)
        for bound, count in (connects or {}).items()
    )
    return [*families, Family(name="meshnet_tcp_connect_seconds", type="histogram", help="", samples=buckets)]


OPENED, FAILED = "meshnet_tcp_connections_opened", "meshnet_tcp_connections_failed"
SENT = "meshnet_tcp_sent_bytes"


def test_callers_are_added_up_and_directions_are_apart() -> None:
    before = look((OPENED, 10, {"source_workload": "web"}))
    after = look(
        (OPENED, 14, {"source_workload": "web"}),
        (OPENED, 3, {"source_workload": "cron"}),
        (OPENED, 8, {"reporter": "destination"}),
        (SENT, 1000, {}),
    )
    inbound, outbound = stat(before, after, 2.0).items
    assert (inbound.direction, inbound.opened, inbound.opened_per_second) == ("inbound", 8, 4.0)
    assert (outbound.direction, outbound.opened, outbound.opened_per_second) == ("outbound", 17, 3.5)
    assert (outbound.bytes_sent, outbound.sent_per_second) == (1000, 500.0)


def test_reasons_are_told_as_they_are_of_late_and_in_all() -> None:
    reasons = ({"response_flags": "connect.refused"}, {"response_flags": "peer.rst"})
    before = look((FAILED, 5, reasons[0]), (FAILED, 7, reasons[1]))
    after = look((FAILED, 9, reasons[0]), (FAILED, 7, reasons[1]))
    (one,) = stat(before, after, 2.0).items
    assert one.failed_by_reason == {"connect.refused": 9, "peer.rst": 7}
    assert one.failed_per_second_by_reason == {"connect.refused": 2.0}
    assert (one.failed, one.failed_per_second) == (16, 2.0)


def test_a_counter_that_began_anew_is_no_negative_rate() -> None:
    (one,) = stat(look((OPENED, 1000, {})), look((OPENED, 6, {})), 3.0).items
    assert one.opened_per_second == 2.0


def test_connect_times_are_of_the_interval_or_else_since_the_start() -> None:
    first = {"0.001": 90.0, "0.01": 100.0, "+Inf": 100.0}
    second = {"0.001": 90.0, "0.01": 110.0, "+Inf": 110.0}
    assert stat(look(), look(), 1.0).connect is None
    assert stat(look(connects=first), look(connects=second), 1.0).connect == Times(
        within="interval", connections=10, p50_ms=5.5, p99_ms=9.91
    )
    (api,) = stat(look(connects=first), look(connects=second), 1.0).items
    assert api.connect == Times(within="interval", connections=10, p50_ms=5.5, p99_ms=9.91)
    assert (api.duration, api.queue) == (None, None)
    told = stat(look(connects=first), look(connects=first), 1.0).connect
    assert told is not None
    assert (told.within, told.connections, told.p50_ms) == ("start", 100, 0.556)


@pytest.mark.parametrize(
    ("buckets", "share", "expected"),
    [
        ([(1.0, 10.0), (2.0, 10.0), (INF, 10.0)], 0.5, 0.5),
        ([(1.0, 0.0), (2.0, 10.0), (INF, 10.0)], 0.5, 1.5),
        ([(1.0, 5.0), (2.0, 5.0), (INF, 10.0)], 0.99, 2.0),
        ([(INF, 3.0)], 0.5, 0.0),
    ],
)
def test_a_quantile_lies_within_its_bucket(buckets: list[tuple[float, float]], share: float, expected: float) -> None:
    assert quantile(buckets, share) == pytest.approx(expected)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50), st.floats(0.01, 1.0), st.integers(0, 1000))
def test_it_is_never_in_another_bucket_than_the_value_itself(values: list[float], share: float, seed: int) -> None:
    random.Random(seed).shuffle(values)
    bounds = [0.1, 1.0, 5.0, 10.0, INF]
    buckets = [(bound, float(sum(value <= bound for value in values))) for bound in bounds]
    exact = sorted(values)[max(0, math.ceil(len(values) * share) - 1)]
    upper = next(bound for bound in bounds if exact <= bound)
    lower = max([0.0, *(bound for bound in bounds if bound < upper)])
    assert lower - 1e-9 <= quantile(buckets, share) <= upper + 1e-9
