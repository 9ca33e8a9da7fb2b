"""Slow start: an endpoint that is new, or has come back, gets a part of its share, and all of it after a while."""

import math

from meshnet.model.service import SlowStart


def warmth(settings: SlowStart, age: float) -> float:
    """The part of its weight that counts when it has been there for `age` seconds."""
    if age >= settings.window:
        return 1.0
    return max(settings.least, age / settings.window)


class ConnectTime:
    """How long connecting takes of late, in seconds: what is older fades, to a third in ten seconds or eight samples.

    What came up sooner counts for half at once: a host that was busy for a moment is not far away. It hears of
    connections that came up and of nothing else, or an endpoint that refuses at once would seem near.
    """

    FADES, KEPT, KEPT_OF_SLOWER = 10.0, 7 / 8, 1 / 2

    __slots__ = ("_at", "seconds")

    def __init__(self) -> None:
        self.seconds: float | None = None  # it has never come up
        self._at = 0.0

    def took(self, seconds: float, now: float) -> None:
        before = seconds if self.seconds is None else self.seconds
        most = self.KEPT if seconds >= before else self.KEPT_OF_SLOWER
        kept = min(math.exp(min(0.0, self._at - now) / self.FADES), most)
        self.seconds = seconds + (before - seconds) * kept
        self._at = now

    @property
    def ms(self) -> float | None:
        return None if self.seconds is None else round(self.seconds * 1000, 3)
