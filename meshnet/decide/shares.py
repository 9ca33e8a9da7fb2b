"""Drawing by weight."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from meshnet.decide import Dice
from meshnet.model.service import Endpoint


class Shares:
    """Endpoints that are drawn as often as their weights say, in steps of log n."""

    __slots__ = ("_bounds", "_endpoints")

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = endpoints
        self._bounds = list(accumulate(endpoint.weight for endpoint in endpoints))

    def draw(self, dice: Dice) -> Endpoint | None:
        """None if nobody has a weight."""
        if not self._bounds or not self._bounds[-1]:
            return None
        return self._endpoints[bisect_right(self._bounds, int(dice.random() * self._bounds[-1]))]
