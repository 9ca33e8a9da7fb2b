"""The breaker of one endpoint: after failures in a row that are the endpoint's own, leave it alone for a while.

closed lets everyone through; open lets nobody; half-open lets one through, whose fate decides: success closes, failure
opens again for twice as long. How long is forgotten only after it has stayed closed for `reset_after`, so that an
endpoint which comes and goes is asked less and less.
"""

import enum

from meshnet.decide import Dice
from meshnet.errors import Reason
from meshnet.model.service import BreakerSettings


class BreakerState(enum.StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Breaker:
    """Every `admit` that says True is followed by exactly one of `succeeded`, `failed`, `abandoned`.

    `settings` may be replaced at any time. `failures` counts those in a row.
    """

    __slots__ = (
        "_attempts",
        "_closed_at",
        "_failed_at",
        "_open_time",
        "_open_until",
        "_probing",
        "failures",
        "settings",
    )

    def __init__(self, settings: BreakerSettings) -> None:
        self.settings = settings
        self.failures = 0
        self._attempts = 0  # admitted, and not over yet
        self._probing = False
        self._open_until: float | None = None  # None: closed
        self._open_time = 0.0  # of the last opening, without jitter; 0: none to remember
        self._closed_at = self._failed_at = float("-inf")

    def state(self, now: float) -> BreakerState:
        if self._open_until is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self._open_until else BreakerState.HALF_OPEN

    def allows(self, now: float) -> bool:
        """What `admit` would say; changes nothing."""
        if self._open_until is None:
            return True
        # The probe waits until attempts from before the opening are over: so it is always clear whose fate decides.
        return now >= self._open_until and not self._attempts

    def admit(self, now: float) -> bool:
        """Takes part in an attempt; in half-open it is the probe."""
        if not self.allows(now):
            return False
        self._attempts += 1
        self._probing = self._open_until is not None
        return True

    def succeeded(self, now: float) -> None:
        """Connected, and the TLS handshake, if there is one, done."""
        self._attempts -= 1
        if self._probing:
            self._probing = False
            self._open_until = None
            self._closed_at = now
        if self._open_until is None:
            self.failures = 0

    def failed(self, now: float, dice: Dice) -> None:
        """A failure for which `counts_against_endpoint` is True."""
        self._attempts -= 1
        if self._open_until is not None and not self._probing:
            return  # begun before it opened: says nothing new
        self.failures += 1
        self._failed_at = now
        if self._probing or self.failures >= self.settings.failures:
            self._open(now, dice)

    def abandoned(self, now: float) -> None:
        """The client gave up, or the fault was ours: the attempt counts for nothing, and the next may be the probe."""
        self._attempts -= 1
        self._probing = False

    def open_for(self, now: float) -> float:
        """The seconds until a probe may go; 0 unless open."""
        return 0.0 if self._open_until is None else max(0.0, self._open_until - now)

    @property
    def lasts_until(self) -> float:
        """Until when it remembers: `reset_after` from when it closed, or a probe may go, or it failed last."""
        since = self._failed_at if self.failures else float("-inf")
        if self._open_time:
            since = max(since, self._closed_at if self._open_until is None else self._open_until)
        return since + self.settings.reset_after

    def _open(self, now: float, dice: Dice) -> None:
        settings = self.settings
        if not self._probing and now - self._closed_at >= settings.reset_after:
            self._open_time = 0.0
        self._probing = False
        self._open_time = min(max(self._open_time * 2, settings.open_time), settings.max_open_time)
        self._open_until = now + self._open_time * (1 + settings.jitter * dice.random())


def counts_against_endpoint(reason: Reason) -> bool:
    """Whether the breaker leaves the endpoint alone for an attempt that ended so, before it was up."""
    return reason in _ENDPOINTS_FAULT or reason is Reason.TLS_NOT_YET_VALID


def is_endpoints_fault(reason: Reason) -> bool:
    """Whether it is the endpoint's own as well: then it may be ejected for it, and what is open to it closed.

    A certificate begins by its issuer's clock and is looked at by ours. Not even the endpoint's clock has a part in it.
    """
    return reason in _ENDPOINTS_FAULT


_ENDPOINTS_FAULT = frozenset(
    {
        Reason.CONNECT_REFUSED,
        Reason.CONNECT_TIMEOUT,
        Reason.CONNECT_UNREACHABLE,
        Reason.TLS_HANDSHAKE,
        Reason.TLS_PEER_IDENTITY,
        Reason.TLS_EXPIRED,
        Reason.TUNNEL_PROTOCOL,
        Reason.TUNNEL_LOST,
        Reason.NOT_LOCAL,  # its sidecar does not know the address: discovery is behind, and it cannot serve
    }
)
