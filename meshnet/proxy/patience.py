"""How long a connection tries to reach an endpoint, and what a wait for our own queue takes of that."""

import time
from dataclasses import dataclass


@dataclass(slots=True)
class Patience:
    """How many seconds there may be tries at all, from a monotonic beginning on, and how many one try may take.

    A try that waits for its turn to shake hands takes none of its own meanwhile, and waits no longer than that it has
    them all then: what our own queue has taken is no endpoint's fault. Where they are more than half of the total, half
    of it is kept for them.
    """

    began: float
    total: float
    attempt: float

    def left(self) -> float:
        return max(0.0, self.began + self.total - time.monotonic())

    def for_turn(self) -> float:
        """To wait for one."""
        return max(0.0, self.left() - min(self.attempt, self.total / 2))

    def for_attempt(self, spent: float = 0.0) -> float:
        """`spent`: of its seconds."""
        return max(0.0, min(self.attempt - spent, self.left()))
