"""Which endpoint gets the next connection. As long as some will do, the cost does not grow with how many there are."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

from meshnet.decide import Dice
from meshnet.decide.locality import Tiers
from meshnet.decide.maglev import Maglev
from meshnet.decide.shares import Shares
from meshnet.decide.turns import Turns
from meshnet.model.service import NOWHERE, Balance, Endpoint, Locality, Traffic

_FULL_SCAN = 8  # more endpoints than this: the better of two drawn ones is nearly as good, at a fixed cost
_DRAWS = 32  # before all are looked at: likely only where fewer than one in ten will do
_LOOKED_BACK = 32  # of those that were full, to see whether they are still
_ALIKE = 0.001  # seconds; who connects within that is as near as can be


class Load(Protocol):
    """What is asked of endpoints, all of it as of one moment."""

    warming: bool
    """Whether `warmth` has to be asked."""

    def __call__(self, endpoint: Endpoint, /) -> int | None:
        """This proxy's own connections to it, with those still being dialled; None: it is not to be tried now."""

    def warmth(self, endpoint: Endpoint, /) -> float:
        """The part of its weight that counts: 1, and less for one that is new or has come back (slow start)."""

    def connect_time(self, endpoint: Endpoint, /) -> float | None:
        """Seconds that connecting to it takes of late; None: it has never come up."""


class Prepared(NamedTuple):
    tiers: Tiers
    tables: list[Maglev]


def prepare(traffic: Traffic, endpoints: Sequence[Endpoint], here: Locality) -> Prepared:
    """What takes long with Balance.MAGLEV: tens of milliseconds for hundreds of endpoints."""
    tiers = Tiers(endpoints, here, traffic.locality.strict)
    return Prepared(tiers, [Maglev(tier) for tier in tiers.endpoints])


class Balancer:
    """One per service port. Keeps its place in the round across snapshots, whichever endpoints come and go."""

    __slots__ = ("_tiers", "_within")

    def __init__(self) -> None:
        self._tiers: Tiers | None = None
        self._within: dict[int, _Among] = {}  # by tier

    def adopt(self, prepared: Prepared) -> None:
        """Goes by what has been worked out ahead of the first `pick` among new endpoints."""
        self._tiers = prepared.tiers
        for number, (tier, table) in enumerate(zip(prepared.tiers.endpoints, prepared.tables, strict=True)):
            self._among(number, tier).maglev = table

    def pick(
        self,
        traffic: Traffic,
        endpoints: Sequence[Endpoint],
        load: Load,
        dice: Dice,
        *,
        now: float = 0.0,
        here: Locality = NOWHERE,
        source: Callable[[], str] = str,
    ) -> Endpoint | None:
        """One of those that may be tried now and have a weight; None if there is none.

        `endpoints` are the same object for as long as they are the same. `here`: where this proxy is; `source`: what
        Balance.MAGLEV goes by.
        """
        if len(endpoints) == 1:
            (only,) = endpoints
            return only if only.weight and load(only) is not None else None
        tiers = self._tiers_of(traffic, endpoints, here)
        if len(tiers.endpoints) == 1:
            return self._among(0, tiers.endpoints[0]).pick(traffic.balance, load, dice, source)
        for number in tiers.order(traffic.locality.overprovisioning, load, dice, now):
            found = self._among(number, tiers.endpoints[number]).pick(traffic.balance, load, dice, source)
            if found is not None:
                return found
        return None

    def _tiers_of(self, traffic: Traffic, endpoints: Sequence[Endpoint], here: Locality) -> Tiers:
        tiers = self._tiers
        if tiers is None or not tiers.are_of(endpoints, here, traffic.locality.strict):
            tiers = self._tiers = Tiers(endpoints, here, traffic.locality.strict)
        return tiers

    def _among(self, number: int, endpoints: Sequence[Endpoint]) -> "_Among":
        among = self._within.get(number)
        if among is None or among.endpoints is not endpoints:
            among = self._within[number] = _Among(endpoints, among)
        return among


class _Among:
    """The choice among endpoints that are equally near, and what has been worked out for it."""

    __slots__ = ("_packed", "_shares", "_swept", "_turns", "endpoints", "maglev")

    def __init__(self, endpoints: Sequence[Endpoint], before: "_Among | None") -> None:
        self.endpoints: Sequence[Endpoint] = endpoints
        self._turns: Turns | None = before._turns if before else None
        self._shares: Shares | None = None
        self.maglev: Maglev | None = None
        self._packed: int = 0
        self._swept: int = 0

    def pick(self, kind: Balance, load: Load, dice: Dice, source: Callable[[], str]) -> Endpoint | None:
        match kind:
            case Balance.LEAST_CONN:
                return _least_conn(self.endpoints, load, dice)
            case Balance.ROUND_ROBIN:
                return self._round_robin(load, dice)
            case Balance.RANDOM:
                return self._random(load, dice)
            case Balance.MAGLEV:
                self.maglev = self.maglev or Maglev(self.endpoints)
                return self.maglev.pick(source(), lambda endpoint: load(endpoint) is not None)
            case Balance.FIRST:
                return self._first(load)

    def _round_robin(self, load: Load, dice: Dice) -> Endpoint | None:
        turns = self._turns
        if turns is None or turns.endpoints is not self.endpoints:
            turns = self._turns = Turns(self.endpoints, turns)
        for _ in range(min(_DRAWS, len(self.endpoints))):
            endpoint = turns.turn()
            if endpoint is None or (load(endpoint) is not None and _is_warm(endpoint, load, dice)):
                return endpoint
        return turns.first(lambda endpoint: load(endpoint) is not None)

    def _random(self, load: Load, dice: Dice) -> Endpoint | None:
        shares = self._shares = self._shares or Shares(self.endpoints)
        for _ in range(_DRAWS):
            endpoint = shares.draw(dice)
            if endpoint is None or (load(endpoint) is not None and _is_warm(endpoint, load, dice)):
                return endpoint
        return Shares([endpoint for endpoint in self.endpoints if load(endpoint) is not None]).draw(dice)

    def _first(self, load: Load) -> Endpoint | None:
        """The first that takes any. Those ahead of it are full; some of them are asked again each time."""
        endpoints, packed = self.endpoints, self._packed
        for _ in range(min(_LOOKED_BACK, packed)):
            self._swept = self._swept + 1 if self._swept + 1 < packed else 0
            if _willing(endpoints[self._swept], load):
                self._packed = self._swept
                return endpoints[self._packed]
        for place in chain(range(packed, len(endpoints)), range(packed)):
            if _willing(endpoints[place], load):
                self._packed = place
                return endpoints[place]
        return None


def _willing(endpoint: Endpoint, load: Load) -> bool:
    return bool(endpoint.weight) and load(endpoint) is not None


def _is_warm(endpoint: Endpoint, load: Load, dice: Dice) -> bool:
    """Whether it takes its turn: while it is warming it lets some of them pass."""
    return not load.warming or (warmth := load.warmth(endpoint)) >= 1 or dice.random() < warmth


def _least_conn(endpoints: Sequence[Endpoint], load: Load, dice: Dice) -> Endpoint | None:
    """The lowest (connections + 1) / weight; among equals any, the nearer the likelier.

    The 1 is the connection that is to be placed. Of more than a few endpoints the better one of two different ones,
    every pair equally likely.
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
        score = _score(endpoint, held, load)
        if first < 0:
            first, lowest = place, score
        elif score == lowest:
            return _likely_near((endpoints[first], endpoint), load, dice)
        else:
            return endpoint if score < lowest else endpoints[first]
    willing = [endpoint for endpoint in endpoints if _willing(endpoint, load)]
    return _lowest(_two_of(willing, dice) if len(willing) > _FULL_SCAN else willing, load, dice)


def _lowest(endpoints: Sequence[Endpoint], load: Load, dice: Dice) -> Endpoint | None:
    lowest = float("inf")
    best: list[Endpoint] = []
    for endpoint in endpoints:
        if not endpoint.weight or (held := load(endpoint)) is None:
            continue
        score = _score(endpoint, held, load)
        if score < lowest:
            lowest, best = score, [endpoint]
        elif score == lowest:
            best.append(endpoint)
    if len(best) > 1:
        return _likely_near(best, load, dice)
    return best[0] if best else None


def _score(endpoint: Endpoint, connections: int, load: Load) -> float:
    weight = endpoint.weight * load.warmth(endpoint) if load.warming else endpoint.weight
    return (connections + 1) / weight


def _likely_near(endpoints: Sequence[Endpoint], load: Load, dice: Dice) -> Endpoint:
    """One that takes half as long is twice as likely. If it got all, nobody would learn that another has got faster.

    Who has never come up is as near as the others on average: an even share for it, new or refusing all.
    """
    times = [load.connect_time(endpoint) for endpoint in endpoints]
    known = [1 / max(seconds, _ALIKE) for seconds in times if seconds is not None]
    average = sum(known) / len(known) if known else 1.0
    drawn = dice.random() * average * len(endpoints)
    for endpoint, seconds in zip(endpoints, times, strict=True):
        drawn -= average if seconds is None else 1 / max(seconds, _ALIKE)
        if drawn < 0:
            return endpoint
    return endpoints[-1]


def _two_of(endpoints: Sequence[Endpoint], dice: Dice) -> tuple[Endpoint, Endpoint]:
    """Two different ones, every pair equally likely."""
    first = int(dice.random() * len(endpoints))
    second = int(dice.random() * (len(endpoints) - 1))
    return endpoints[first], endpoints[second + (second >= first)]
