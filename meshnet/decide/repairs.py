"""How soon rules may be repaired or proved again. Pure; times are monotonic seconds.

Two programs that undo each other's work at once do nothing else, and a proof that makes an interface disturbs others.
"""

import math


class RepairPace:
    """The first few repairs are made at once; then each after a pause twice as long."""

    AT_ONCE, CALM = 5, 60.0  # so many within so many seconds are a fight, until it has been calm for as long
    FIRST, LONGEST = 1.0, 30.0

    def __init__(self) -> None:
        self._times: list[float] = []

    def repaired(self, now: float) -> None:
        if not self.is_fight(now):
            self._times = [time for time in self._times if now - time < self.CALM]
        self._times.append(now)

    def is_fight(self, now: float) -> bool:
        """Whether somebody undoes what is repaired, again and again."""
        return len(self._times) >= self.AT_ONCE and now - self._times[-1] < self.CALM

    def wait(self, now: float) -> float:
        """Seconds until the next repair may be made."""
        if not self.is_fight(now):
            return 0.0
        pause = min(self.FIRST * 2.0 ** (len(self._times) - self.AT_ONCE), self.LONGEST)
        return max(0.0, self._times[-1] + pause - now)


class InboundPace:
    """When what comes in is proved again: by the clock, soon after others have changed rules, and at once on demand."""

    AFTER_OTHERS = 60.0  # since the last proof: some programs change their own rules all the time

    def __init__(self) -> None:
        self._last = self._due = -math.inf

    def is_due(self, now: float) -> bool:
        return now >= self._due

    def at_once(self) -> None:
        self._due = -math.inf

    def proved(self, now: float, interval: float) -> None:
        """`interval`: seconds until the next; infinite for never."""
        self._last, self._due = now, now + interval

    def others_changed_rules(self) -> None:
        self._due = min(self._due, self._last + self.AFTER_OTHERS)
