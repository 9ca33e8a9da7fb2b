"""What active checks make of endpoints: how many in a row count, when the next one is due, and who is passed over.

A check that says nothing about the endpoint (policy forbids it, we have no certificate) is none: it changes nothing.
"""

from collections.abc import Collection

from meshnet.decide import Dice
from meshnet.model.address import Address
from meshnet.model.service import CheckSettings

_JITTER = 0.1  # of an interval, both ways: ten thousand checks that began together do not stay together


class Health:
    """Of one endpoint, healthy at first. `settings` may be replaced at any time.

    `run` is how many checks in a row have said the opposite.
    """

    __slots__ = ("healthy", "run", "settings")

    def __init__(self, settings: CheckSettings) -> None:
        self.settings = settings
        self.healthy = True
        self.run = 0

    def passed(self) -> bool:
        """Whether it is healthy again by that."""
        return self._said(True, self.settings.rise)

    def failed(self) -> bool:
        """Whether it is healthy no longer."""
        return self._said(False, self.settings.fall)

    def _said(self, healthy: bool, needed: int) -> bool:
        if healthy == self.healthy:
            self.run = 0
            return False
        self.run += 1
        if self.run < needed:
            return False
        self.healthy, self.run = healthy, 0
        return True


def first_check_after(settings: CheckSettings, dice: Dice) -> float:
    """Seconds, anywhere in an interval."""
    return settings.interval * dice.random()


def next_check_after(settings: CheckSettings, dice: Dice) -> float:
    """Seconds since the last one began."""
    return settings.interval * (1 + _JITTER * (2 * dice.random() - 1))


class Healths:
    """Of the endpoints of one service port. Some of them are passed over for others: never all of them."""

    __slots__ = ("_failing", "_usable", "_usable_failing")

    def __init__(self) -> None:
        self._usable: frozenset[Address] = frozenset()
        self._failing: set[Address] = set()
        self._usable_failing = 0

    def now(self, usable: Collection[Address]) -> None:
        """These are the endpoints that may get connections at all: they have a weight."""
        self._usable = frozenset(usable)
        self._usable_failing = len(self._usable & self._failing)

    def changed(self, address: Address, healthy: bool) -> None:
        """Also of one without a weight, and of one that is gone: it is healthy then."""
        if healthy == (address not in self._failing):
            return
        if healthy:
            self._failing.discard(address)
        else:
            self._failing.add(address)
        if address in self._usable:
            self._usable_failing += -1 if healthy else 1

    @property
    def panic(self) -> bool:
        """Every one that could be used fails: they are used all the same."""
        return 0 < self._usable_failing == len(self._usable)

    def passed_over(self) -> Collection[Address]:
        return () if self.panic else self._failing

    def failing(self) -> int:
        return len(self._failing)
