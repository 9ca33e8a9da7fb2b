"""Which endpoint gets the next connection."""

from collections.abc import Sequence
from dataclasses import dataclass

from meshnet.decide import Dice
from meshnet.model.address import Address
from meshnet.model.service import Balance, Endpoint

_FULL_SCAN = 8  # more endpoints than this: the better of two drawn ones is nearly as good, at a fixed cost


@dataclass(frozen=True, slots=True)
class Candidate:
    """An endpoint that may be tried now, with this proxy's own connections to it: `open`, and `pending` (dialling)."""

    endpoint: Endpoint
    open: int
    pending: int


class Balancer:
    """One per service port. Keeps its place in the round across snapshots, whichever endpoints come and go."""

    __slots__ = ("_credit",)

    def __init__(self) -> None:
        self._credit: dict[Address, int] = {}

    def pick(self, kind: Balance, candidates: Sequence[Candidate], dice: Dice) -> Endpoint:
        """`candidates` must not be empty, and their weights at least 1."""
        if len(candidates) == 1:
            return candidates[0].endpoint
        match kind:
            case Balance.LEAST_CONN:
                return _least_conn(candidates, dice)
            case Balance.ROUND_ROBIN:
                return self._round_robin(candidates)

    def _round_robin(self, candidates: Sequence[Candidate]) -> Endpoint:
        """Smooth weighted round robin, as nginx does it: everyone earns its weight, the richest pays for all.

        Sequence of weights 5, 1, 1: a a b a c a a.
        """
        credit = self._credit
        total = sum(candidate.endpoint.weight for candidate in candidates)
        # With constant weights nobody leaves these bounds by itself. They make whatever an endpoint earned or owed
        # under other weights, or beside other endpoints, count for about one round, and no longer.
        lowest, highest = -total, total * (len(candidates) - 1)
        chosen, most = candidates[0].endpoint, lowest
        for candidate in candidates:
            endpoint = candidate.endpoint
            held = credit.get(endpoint.address, 0)
            held = (lowest if held < lowest else min(held, highest)) + endpoint.weight
            credit[endpoint.address] = held
            if held > most:
                chosen, most = endpoint, held
        credit[chosen.address] -= total
        if len(credit) > 4 * len(candidates) + 16:  # most of them are gone for good; who returns starts at 0
            self._credit = {candidate.endpoint.address: credit[candidate.endpoint.address] for candidate in candidates}
        return chosen


def _least_conn(candidates: Sequence[Candidate], dice: Dice) -> Endpoint:
    """The lowest (open + pending + 1) / weight; among equals any. The 1 is the connection that is to be placed."""
    if len(candidates) > _FULL_SCAN:
        candidates = _two_of(candidates, dice)
    lowest = float("inf")
    best: list[Endpoint] = []
    for candidate in candidates:
        endpoint = candidate.endpoint
        score = (candidate.open + candidate.pending + 1) / endpoint.weight
        if score < lowest:
            lowest, best = score, [endpoint]
        elif score == lowest:
            best.append(endpoint)
    return best[0] if len(best) == 1 else best[int(dice.random() * len(best))]


def _two_of(candidates: Sequence[Candidate], dice: Dice) -> tuple[Candidate, Candidate]:
    """Two different ones, every pair equally likely."""
    first = int(dice.random() * len(candidates))
    second = int(dice.random() * (len(candidates) - 1))
    return candidates[first], candidates[second + (second >= first)]
