"""WHAT TO DO: every decision about a connection, as plain values in and out. The clock and the dice are parameters.

route (where it goes), access (who may call), limits (how many at once), balance (which endpoint), breaker (which
endpoint not), retry (whether once more). Times are seconds on one monotonic clock.
"""

from typing import Protocol


class Dice(Protocol):
    """Where chance comes from; `random.Random` is one."""

    def random(self) -> float:
        """A number in [0, 1)."""
