"""Outlier ejection: an endpoint that fails far more often than it should gets no connections for a while.

The breaker sees failures in a row; this sees a share of failures, however they are spread. A part of a service's
endpoints at most is ejected at once, and never the last one.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from meshnet.decide import Dice
from meshnet.model.service import Outlier

PANIC = 10.0
"""Seconds for which a service is said to be in panic after ejected endpoints were used, for want of others."""

_BUCKETS = 3  # of a window: what is counted goes a third of it at a time

K = TypeVar("K", bound=Hashable)


class Outcomes:
    """How the connects to one endpoint went within a window of `window` seconds, and when it was ejected.

    `lasts_until`: there is a failure in it, or an ejection after which the next is longer.

    `now` is monotonic seconds.
    """

    __slots__ = ("_bucket", "_counts", "_ejections", "ejected_until", "lasts_until")

    def __init__(self) -> None:
        self.ejected_until = self.lasts_until = float("-inf")
        self._ejections = 0  # in a row, of which each is longer
        self._bucket = 0
        self._counts = [(0, 0)] * _BUCKETS  # connects and failures, the newest bucket first

    def note(self, ok: bool, window: float, now: float) -> None:
        """A connect that counts for or against the endpoint."""
        self._turn(window, now)
        connects, failures = self._counts[0]
        self._counts[0] = (connects + 1, failures + (not ok))
        if not ok:
            self.lasts_until = max(self.lasts_until, now + window)

    def seen(self, window: float, now: float) -> tuple[int, int]:
        """Connects and failures."""
        self._turn(window, now)
        return sum(connects for connects, _ in self._counts), sum(failures for _, failures in self._counts)

    def is_ejected(self, now: float) -> bool:
        return now < self.ejected_until

    def eject(self, settings: Outlier, now: float, dice: Dice) -> float:
        """For how many seconds. What was counted is forgotten: it is judged anew when it comes back."""
        # Calm for as long as the next would be, and it begins from the shortest again.
        if now - self.ejected_until > self._next_time(settings):
            self._ejections = 0
        seconds = self._next_time(settings) * (1 + settings.jitter * dice.random())
        self._ejections += 1
        self.ejected_until = now + seconds
        self.lasts_until = self.ejected_until + self._next_time(settings)
        self._counts = [(0, 0)] * _BUCKETS
        return seconds

    def _next_time(self, settings: Outlier) -> float:
        """How long the next ejection is, without jitter."""
        return min(settings.ejection_time * 2.0**self._ejections, settings.max_ejection_time)

    def _turn(self, window: float, now: float) -> None:
        bucket = int(now / (window / _BUCKETS))
        passed = min(_BUCKETS, max(0, bucket - self._bucket))
        if passed:
            self._counts = [(0, 0)] * passed + self._counts[: _BUCKETS - passed]
            self._bucket = bucket


@dataclass(frozen=True, slots=True)
class Ejection(Generic[K]):
    endpoint: K
    connects: int
    failures: int


def to_eject(outcomes: Mapping[K, Outcomes], endpoints: int, settings: Outlier, now: float) -> list[Ejection[K]]:
    """Who is to be ejected now, the worst first. `outcomes` are of those that were dialled, of so many `endpoints`."""
    if not settings.failure_share or endpoints < settings.min_endpoints:
        return []
    ejected = sum(each.is_ejected(now) for each in outcomes.values())
    room = min(int(endpoints * settings.max_ejected_share), endpoints - 1) - ejected
    if room <= 0:
        return []
    found = []
    for endpoint, each in outcomes.items():
        if each.is_ejected(now):
            continue
        connects, failures = each.seen(settings.window, now)
        if connects >= settings.min_connects and failures >= settings.failure_share * connects:
            found.append(Ejection(endpoint, connects, failures))
    found.sort(key=lambda ejection: ejection.failures / ejection.connects, reverse=True)
    return found[:room]
