"""Near endpoints first: those of this proxy's zone, then of its region, then any; and when to go further."""

from collections.abc import Callable, Iterator, Sequence

from meshnet.decide import Dice
from meshnet.model.service import Endpoint, Locality

_COUNTED_EACH_TIME = 8  # endpoints; of more, how many will do is counted every so often
_COUNTED_EVERY = 0.2  # seconds


class Tiers:
    """The endpoints of a service port by how near they are; a tier that nobody is in is none."""

    __slots__ = ("_counted_at", "_endpoints", "_health", "_here", "_strict", "endpoints")

    def __init__(self, endpoints: Sequence[Endpoint], here: Locality, strict: bool) -> None:
        """`strict`: none that is farther than the nearest tier with an endpoint of any weight."""
        self._endpoints, self._here, self._strict = endpoints, here, strict
        self._counted_at = -_COUNTED_EVERY
        self._health: list[float] = []
        self.endpoints: list[Sequence[Endpoint]] = [endpoints]
        if here.region or here.zone:
            sorted_out: tuple[list[Endpoint], ...] = ([], [], [])
            for endpoint in endpoints:
                sorted_out[distance(here, endpoint.locality)].append(endpoint)
            tiers = [tuple(tier) for tier in sorted_out if any(endpoint.weight for endpoint in tier)]
            if strict:
                del tiers[1:]
            if tiers and len(tiers[0]) != len(endpoints):
                self.endpoints = list(tiers)

    def are_of(self, endpoints: Sequence[Endpoint], here: Locality, strict: bool) -> bool:
        return self._endpoints is endpoints and self._here == here and self._strict == strict

    def order(
        self, overprovisioning: float, load: Callable[[Endpoint], object], dice: Dice, now: float
    ) -> Iterator[int]:
        """The tier that this connection is for, then all others, nearest first."""
        if now - self._counted_at >= _COUNTED_EVERY or len(self._endpoints) <= _COUNTED_EACH_TIME:
            self._counted_at = now
            self._health = [_willing_part(tier, load) for tier in self.endpoints]
        chosen = drawn(parts(self._health, overprovisioning), dice)
        yield chosen
        yield from (number for number in range(len(self.endpoints)) if number != chosen)


def distance(here: Locality, there: Locality) -> int:
    """0 in the same zone, 1 in the same region, 2 elsewhere or where nobody says. A zone is of one region."""
    if here.region and there.region and here.region != there.region:
        return 2
    if here.zone and here.zone == there.zone:
        return 0
    return 1 if here.region and here.region == there.region else 2


def parts(health: Sequence[float], overprovisioning: float) -> list[float]:
    """The part of connections that each tier gets, nearest first; `health` is the part of its weight that will do.

    A tier is thought to bear `overprovisioning` times its load: with 1.4 nothing goes further until less than 71% of it
    is well, and beyond that what is missing does. Where all together cannot bear it, each gets as it can.
    """
    left, found = 1.0, []
    for well in health:
        part = min(left, well * overprovisioning)
        found.append(part)
        left -= part
    total = sum(found)
    return [part / total for part in found] if total else [1.0, *[0.0] * (len(health) - 1)]


def drawn(parts: Sequence[float], dice: Dice) -> int:
    drawn = dice.random()
    for number, part in enumerate(parts):
        drawn -= part
        if drawn < 0:
            return number
    return 0


def _willing_part(endpoints: Sequence[Endpoint], load: Callable[[Endpoint], object]) -> float:
    total = sum(endpoint.weight for endpoint in endpoints)
    return sum(endpoint.weight for endpoint in endpoints if endpoint.weight and load(endpoint) is not None) / total
