"""Which endpoint gets the next connection. As long as some will do, the cost does not grow with how many there are."""

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush

from meshnet.decide import Dice
from meshnet.model.address import Address
from meshnet.model.service import Balance, Endpoint

_FULL_SCAN = 8  # more endpoints than this: the better of two drawn ones is nearly as good, at a fixed cost
_DRAWS = 32  # before all are looked at: likely only where fewer than one in ten will do
_ROUNDING = 1e-4  # of a turn
_BEGIN_AT_ONCE = 64  # periods, or among ten thousand equals one connection would pay for all of them

Load = Callable[[Endpoint], int | None]
"""This proxy's own connections to an endpoint, with those still being dialled; None: it is not to be tried now."""


class Balancer:
    """One per service port. Keeps its place in the round across snapshots, whichever endpoints come and go."""

    __slots__ = ("_turns",)

    def __init__(self) -> None:
        self._turns: _Turns | None = None

    def pick(self, kind: Balance, endpoints: Sequence[Endpoint], load: Load, dice: Dice) -> Endpoint | None:
        """One of those that may be tried now and have a weight; None if there is none.

        `endpoints` are the same object for as long as they are the same.
        """
        if len(endpoints) == 1:
            (only,) = endpoints
            return only if only.weight and load(only) is not None else None
        match kind:
            case Balance.LEAST_CONN:
                return _least_conn(endpoints, load, dice)
            case Balance.ROUND_ROBIN:
                return self._round_robin(endpoints, load)

    def _round_robin(self, endpoints: Sequence[Endpoint], load: Load) -> Endpoint | None:
        turns = self._turns
        if turns is None or turns.endpoints is not endpoints:
            turns = self._turns = _Turns(endpoints, turns)
        return turns.next(load)


def _least_conn(endpoints: Sequence[Endpoint], load: Load, dice: Dice) -> Endpoint | None:
    """The lowest (connections + 1) / weight; among equals any. The 1 is the connection that is to be placed.

    Of more than a few endpoints the better one of two different ones, every pair equally likely.
    """
    count = len(endpoints)
    if count <= _FULL_SCAN:
        return _lowest(endpoints, load, dice)
    first, lowest = -1, 0.0
    for _ in range(_DRAWS):
        place = int(dice.random() * count)
        endpoint = endpoints[place]
        if place == first or not endpoint.weight or (held := load(endpoint)) is None:
            continue
        score = (held + 1) / endpoint.weight
        if first >= 0:
            return endpoint if score < lowest else endpoints[first]
        first, lowest = place, score
    willing = [endpoint for endpoint in endpoints if endpoint.weight and load(endpoint) is not None]
    return _lowest(_two_of(willing, dice) if len(willing) > _FULL_SCAN else willing, load, dice)


def _lowest(endpoints: Sequence[Endpoint], load: Load, dice: Dice) -> Endpoint | None:
    lowest = float("inf")
    best: list[Endpoint] = []
    for endpoint in endpoints:
        if not endpoint.weight or (held := load(endpoint)) is None:
            continue
        score = (held + 1) / endpoint.weight
        if score < lowest:
            lowest, best = score, [endpoint]
        elif score == lowest:
            best.append(endpoint)
    if len(best) > 1:
        return best[int(dice.random() * len(best))]
    return best[0] if best else None


def _two_of(endpoints: Sequence[Endpoint], dice: Dice) -> tuple[Endpoint, Endpoint]:
    """Two different ones, every pair equally likely."""
    first = int(dice.random() * len(endpoints))
    second = int(dice.random() * (len(endpoints) - 1))
    return endpoints[first], endpoints[second + (second >= first)]


class _Turns:
    """Weighted round robin, as smooth as can be: nobody is ever a whole turn ahead of its share or behind it.

    Time is counted in turns. An endpoint of weight w among a total of W is due once every W / w, its period; of those
    whose period has begun the one is next whose period ends first (R. Tijdeman, "The chairman assignment problem",
    1980). Weights 5, 1, 1: a b a a c a a. Who cannot take its turn loses it.
    """

    __slots__ = ("_begun", "_clock", "_waiting", "endpoints")

    def __init__(self, endpoints: Sequence[Endpoint], before: "_Turns | None") -> None:
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

    def next(self, load: Load) -> Endpoint | None:
        for _ in range(min(_DRAWS, len(self.endpoints))):
            endpoint = self._turn()
            if endpoint is None or load(endpoint) is not None:
                return endpoint
        return self._first(load)

    def _turn(self) -> Endpoint | None:
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

    def _first(self, load: Load) -> Endpoint | None:
        """Of all that may be tried the one whose period ends first."""
        willing = {
            place for place, endpoint in enumerate(self.endpoints) if endpoint.weight and load(endpoint) is not None
        }
        if not willing:
            return None
        ends = [*self._begun, *((begins + period, period, place) for begins, period, place in self._waiting)]
        end, period, place = min(each for each in ends if each[2] in willing)
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
