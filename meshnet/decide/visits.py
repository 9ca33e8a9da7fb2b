"""Whether somebody who comes on an interval of his own has stopped coming. Pure: times are monotonic seconds."""

from collections import deque

_REMEMBERED = 8  # pauses between visits
_KNOWN = 3  # pauses from which an interval is believed: a person asks once or twice
_MISSED = 4  # intervals without a visit
_AT_LEAST = 10.0  # seconds that are late for anybody


class Visits:
    """`last` is None before the first."""

    __slots__ = ("_pauses", "last")

    def __init__(self) -> None:
        self.last: float | None = None
        self._pauses: deque[float] = deque(maxlen=_REMEMBERED)

    def came(self, now: float) -> None:
        if self.is_late(now):
            # The interval has grown, so what was known of it is wrong; or nobody could come in, which the next few
            # visits make forgotten.
            self._pauses.clear()
        if self.last is not None:
            self._pauses.append(now - self.last)
        self.last = now

    @property
    def every(self) -> float:
        """The longest of the last pauses; 0 while too few are known."""
        return max(self._pauses) if len(self._pauses) >= _KNOWN else 0.0

    def is_late(self, now: float) -> bool:
        return bool(self.every) and self.last is not None and now - self.last > max(_MISSED * self.every, _AT_LEAST)
