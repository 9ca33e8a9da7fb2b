"""How many tunnels a peer should have standing by: what it lately needed at once, and a part of what that grew by.

What was needed once is thought to be needed half as much half a minute later. What grows is thought to grow on: one
tunnel more for every eight that were added in the last ten seconds, which is a second's growth and more, where a
handshake takes a tenth of one. So a few connections cause no handshake that nobody waits for, and a burst causes few.
"""

import math

_HALF_LIFE = 30.0  # seconds, of what was needed
_GROWTH_FADES = 10.0  # seconds, after which e times less is left of it
_GROWTH_PART = 8


class Demand:
    """Of one peer. `leased` is how many tunnels to it are in use; `now` is in seconds, and may stand still."""

    __slots__ = ("_at", "_grown", "_most")

    def __init__(self, now: float) -> None:
        self._at = now
        self._most = 0.0
        self._grown = 0.0

    def asked(self, leased: int, now: float) -> None:
        """One more is in use, which makes `leased`."""
        self._fade(leased - 1, now)
        self._grown += max(0.0, leased - max(self._most, leased - 1))
        self._most = max(self._most, leased)

    def hold(self, leased: int, now: float) -> None:
        """So many are in use still. To be called every few seconds."""
        self._fade(leased, now)
        self._most = max(self._most, leased)

    def limit(self, standing: int) -> None:
        """More than `standing` tunnels, in use or not, have not been needed for as long as one may be idle."""
        self._most, self._grown = min(self._most, standing), 0.0

    def spares(self, leased: int, now: float) -> int:
        """How many should be there beyond those in use; never negative."""
        most, grown = self._faded(leased, now)
        return max(0, round(most) - leased) + int(grown / _GROWTH_PART)

    def _fade(self, leased: int, now: float) -> None:
        self._most, self._grown = self._faded(leased, now)
        self._at = max(now, self._at)

    def _faded(self, leased: int, now: float) -> tuple[float, float]:
        """What is in use does not fade, or to use as much as before would look like growth."""
        passed = max(0.0, now - self._at)
        used = min(self._most, leased)
        most = used + (self._most - used) * 0.5 ** (passed / _HALF_LIFE)
        return most, self._grown * math.exp(-passed / _GROWTH_FADES)
