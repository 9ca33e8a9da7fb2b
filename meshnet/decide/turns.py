"""Weighted round robin, as smooth as can be."""

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush

from meshnet.model.address import Address
from meshnet.model.service import Endpoint

_ROUNDING = 1e-4  # of a turn
_BEGIN_AT_ONCE = 64  # periods, or among ten thousand equals one connection would pay for all of them


class Turns:
    """Nobody is ever a whole turn ahead of its share or behind it.

    Time is counted in turns. An endpoint of weight w among a total of W is due once every W / w, its period; of those
    whose period has begun the one is next whose period ends first (R. Tijdeman, "The chairman assignment problem",
    1980). Weights 5, 1, 1: a b a a c a a. Who cannot take its turn loses it.
    """

    __slots__ = ("_begun", "_clock", "_waiting", "endpoints")

    def __init__(self, endpoints: Sequence[Endpoint], before: "Turns | None") -> None:
        """`before` tells who of them has had its turn already, for one period at most."""
        self.endpoints = endpoints
        total = sum([endpoint.weight for endpoint in endpoints])
        waits = before._waits() if before else {}
        self._clock = 0
        self._begun: list[tuple[float, float, int]] = []  # when the period ends, its length, its endpoint's place
        self._waiting = [  # when it begins, its length, its endpoint's place
            (
                min(waits.get(endpoint.address, 0.0), total / endpoint.weight) if waits else 0.0,
                total / endpoint.weight,
                place,
            )
            for place, endpoint in enumerate(endpoints)
            if endpoint.weight
        ]
        heapify(self._waiting)

    def turn(self) -> Endpoint | None:
        """The endpoint whose turn it is; None if nobody has a weight."""
        begun, waiting, clock = self._begun, self._waiting, self._clock
        soon = clock + _ROUNDING
        for _ in range(_BEGIN_AT_ONCE):
            if not waiting or (waiting[0][0] > soon and begun):
                break
            begins, period, place = heappop(waiting)
            heappush(begun, (begins + period, period, place))
        if not begun:
            return None
        ends, period, place = heappop(begun)
        heappush(waiting, (max(ends, clock), period, place))  # what it did not get in time is not made up for
        self._clock = clock + 1
        return self.endpoints[place]

    def first(self, willing: Callable[[Endpoint], bool]) -> Endpoint | None:
        """Of all that may be tried the one whose period ends first."""
        places = {place for place, endpoint in enumerate(self.endpoints) if endpoint.weight and willing(endpoint)}
        if not places:
            return None
        ends = [*self._begun, *((begins + period, period, place) for begins, period, place in self._waiting)]
        end, period, place = min(each for each in ends if each[2] in places)
        self._clock = max(self._clock, int(end - period))
        self._begun = [each for each in self._begun if each[2] != place]
        self._waiting = [each for each in self._waiting if each[2] != place]
        self._waiting.append((max(end, self._clock), period, place))
        heapify(self._begun)
        heapify(self._waiting)
        self._clock += 1
        return self.endpoints[place]

    def _waits(self) -> dict[Address, float]:
        """How many turns it is until the next period of each who has had its turn in this one."""
        clock, endpoints = self._clock, self.endpoints
        return {endpoints[place].address: begins - clock for begins, _, place in self._waiting if begins > clock}
