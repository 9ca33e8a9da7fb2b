"""Medians, ratios to HAProxy, and what may be concluded from them."""

import enum
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import msgspec

DIRECT, HAPROXY, MESHNET = "direct", "haproxy", "meshnet"
PLAIN, MTLS = "plain", "mtls"

_ENOUGH = 3  # rounds; fewer say nothing about how far they scatter


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One test of one subject in one round: its figures by name, or why there are none. `direct` has no mode."""

    test: str
    peer: str
    mode: str
    round: int
    values: dict[str, float] = {}
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Spread:
    """The rounds of one figure: the median, the least, the most, and how many there were."""

    median: float
    least: float
    most: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Raises ValueError when there are none."""
        return cls(statistics.median(values), min(values), max(values), len(values))


class Verdict(enum.StrEnum):
    PASS = "PASS"
    MISS = "miss"
    NOISY = "too noisy"
    FEW = "too few rounds"
    BETTER = "better"
    WORSE = "worse"


def chosen(samples: Sequence[Sample], test: str, peer: str, mode: str) -> list[Sample]:
    """One cell of the table: all its rounds."""
    return [sample for sample in samples if (sample.test, sample.peer, sample.mode) == (test, peer, mode)]


def spread(cell: Sequence[Sample], figure: str) -> Spread | None:
    """None when a round failed: a median of what is left would hide it. None also without such a figure."""
    if not cell or any(figure not in sample.values for sample in cell):
        return None
    return Spread.of([sample.values[figure] for sample in cell])


def ratio(ours: Sequence[Sample], theirs: Sequence[Sample], figure: str) -> Spread | None:
    """Ours by theirs, round by round: what slows the machine for a while slows neighbours alike.

    None when a round failed or is missing, or theirs is nothing to divide by.
    """
    if spread(ours, figure) is None or spread(theirs, figure) is None:
        return None
    by_round = {sample.round: sample.values[figure] for sample in theirs}
    if by_round.keys() != {sample.round for sample in ours} or min(by_round.values()) <= 0:
        return None
    return Spread.of([sample.values[figure] / by_round[sample.round] for sample in ours])


def verdict(seen: Spread, target: float | None, *, lower_is_better: bool) -> Verdict:
    """Against the target (at most), or without one against 1. Rounds on both sides of it conclude nothing."""
    if seen.rounds < _ENOUGH:
        return Verdict.FEW
    limit = 1.0 if target is None else target
    if seen.most <= limit:
        below = True
    elif seen.least > limit:
        below = False
    else:
        return Verdict.NOISY
    if target is not None:
        return Verdict.PASS if below else Verdict.MISS
    return Verdict.BETTER if below == lower_is_better else Verdict.WORSE
