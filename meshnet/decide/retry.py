"""Whether to try once more to connect, and when."""

import math
from dataclasses import dataclass

from meshnet.decide import Dice
from meshnet.decide.breaker import counts_against_endpoint
from meshnet.errors import Reason
from meshnet.model.service import ConnectSettings

_FADE_STEP = 0.01  # seconds: many connections share one fading, and a thousandth is not missed
_BACKOFF = (0.025, 0.250)  # seconds, when every endpoint has been tried: drawn evenly, so that callers fall apart


@dataclass(frozen=True, slots=True)
class Try:
    """Pick an endpoint that has not been tried yet and connect."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Every endpoint was tried: wait, forget which were, and ask again."""

    seconds: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """`denied`: another endpoint would have been tried, had there been a retry left in the budget."""

    reason: Reason
    denied: bool = False


class RetryBudget:
    """One per service. Retries may make up a share of recent connects, so that they never multiply an outage.

    "Recent" fades with a time constant of WINDOW: a count kept so, divided by WINDOW, is the rate per second.
    """

    SHARE = 0.2
    LEAST_PER_SECOND = 3.0
    WINDOW = 10.0

    __slots__ = ("_connects", "_faded_at", "_retries")

    def __init__(self) -> None:
        self._connects = 0.0
        self._retries = 0.0
        self._faded_at = 0.0

    def dialled(self, now: float, count: int = 1) -> None:
        """So many connections begin to look for their endpoints."""
        self._fade(now)
        self._connects += count

    def take(self, now: float) -> bool:
        """Whether one more retry is within the budget; if so, it is taken."""
        self._fade(now)
        if self._retries + 1 > max(self.LEAST_PER_SECOND * self.WINDOW, self.SHARE * self._connects):
            return False
        self._retries += 1
        return True

    def _fade(self, now: float) -> None:
        if now - self._faded_at < _FADE_STEP:
            return
        left = math.exp(min(0.0, self._faded_at - now) / self.WINDOW)
        self._connects *= left
        self._retries *= left
        self._faded_at = now


class Dial:
    """One connection's plan: ask `next` before the first attempt and after each that failed, and do as it says.

    Up to `attempts` in all within `total_timeout` of `started`, each on an endpoint not tried yet, one right after the
    other; when all were tried, after a pause, from the top. A client that named one endpoint is retried there and
    nowhere else: its endpoint is the one candidate.
    """

    __slots__ = ("_attempts", "_tried", "_until", "_waited")

    def __init__(self, settings: ConnectSettings, started: float, tried: int = 0) -> None:
        """`tried`: attempts that were made before this."""
        self._attempts = settings.attempts
        self._until = started + settings.total_timeout
        self._tried = tried
        self._waited = False

    def next(
        self, now: float, candidates_left: bool, last: Reason | None, budget: RetryBudget, dice: Dice
    ) -> Try | Wait | GiveUp:
        """`candidates_left`: there is an endpoint that has not been tried. `last`: how the last attempt ended."""
        if (over := self.over(now, last)) is not None:
            return over
        if not candidates_left:
            return self._pause(now, last, dice)
        if self._tried and not budget.take(now):
            return GiveUp(last or Reason.CONNECT_TIMEOUT, denied=True)
        if not self._tried:
            budget.dialled(now)
        self._tried += 1
        self._waited = False
        return _TRY

    def over(self, now: float, last: Reason | None) -> GiveUp | None:
        """What `next` would say whoever is left: then no endpoint need be looked for, and lose its turn."""
        if last is not None and (not is_retryable(last) or self._tried >= self._attempts):
            return GiveUp(last)
        return GiveUp(last or Reason.CONNECT_TIMEOUT) if now >= self._until else None

    def _pause(self, now: float, last: Reason | None, dice: Dice) -> Wait | GiveUp:
        if last is None:
            return GiveUp(Reason.NO_ENDPOINT)
        shortest, longest = _BACKOFF
        seconds = shortest + (longest - shortest) * dice.random()
        if self._waited or now + seconds >= self._until:
            return GiveUp(last)
        self._waited = True
        return Wait(seconds)


_TRY = Try()


def is_retryable(reason: Reason) -> bool:
    """Whether another endpoint may do better: not where policy said no, nor where the fault is ours or the client's."""
    return counts_against_endpoint(reason) or reason in _ELSEWHERE


# As its sidecar says, or because ports are short for one destination at a time.
_ELSEWHERE = frozenset({Reason.DRAIN, Reason.LIMIT_CONNECTIONS, Reason.LIMIT_QUEUE_TIMEOUT, Reason.LIMIT_HOST})
