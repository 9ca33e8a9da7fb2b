"""Counts of how long something took. To add a value is to add an integer."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

from prometheus_client.core import HistogramMetricFamily

DURATIONS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0, 3600.0)
CONNECTS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
LAGS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Histogram:
    """`bounds`: upper ones, in seconds; what is longer than the last is counted too."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_all(self, microseconds: Iterable[int]) -> None:
        """So many at once cost a fraction of one by one."""
        values = sorted(microseconds)
        self._sum += sum(values) / 1e6
        below = 0
        for which, bound in enumerate(self._bounds):
            if below == len(values):
                return
            not_above = bisect_right(values, bound * 1e6, below)
            self._counts[which] += not_above - below
            below = not_above
        self._counts[-1] += len(values) - below

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """How many are not above each bound, and the sum of all."""
        total, found = 0, []
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            found.append((str(bound), float(total)))
        return found, self._sum


def family(
    name: str, text: str, labels: Sequence[str], histograms: Iterable[tuple[Sequence[str], Histogram]]
) -> HistogramMetricFamily:
    """As Prometheus has it; each histogram with the values of its labels."""
    made = HistogramMetricFamily(name, text, labels=labels)
    for values, histogram in histograms:
        buckets, total = histogram.buckets()
        made.add_metric(values, buckets, total)
    return made
