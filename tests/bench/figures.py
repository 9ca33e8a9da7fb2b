"""Medians, ratios, and what may be concluded from them."""

import enum
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import msgspec

_ENOUGH = 3  # rounds; fewer say nothing about how far they scatter


class Cell(msgspec.Struct, frozen=True):
    """What subjects are compared in."""

    test: str
    mode: str
    workers: int


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One subject in one cell in one round: its figures by name, or why there are none.

    `failure` is an error; `absent` says that there is nothing to measure.
    """

    cell: Cell
    peer: str
    round: int
    values: dict[str, float] = {}
    failure: str = ""
    absent: str = ""


class Spread(msgspec.Struct, frozen=True):
    """The rounds of one figure: the median, the least, the most, and how many there were."""

    median: float
    least: float
    most: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Raises ValueError when there are none."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    @classmethod
    def together(cls, spreads: Sequence["Spread"]) -> Self:
        """All their rounds; the median is that of the medians. Raises ValueError when there are none."""
        return cls(
            statistics.median(each.median for each in spreads),
            min(each.least for each in spreads),
            max(each.most for each in spreads),
            sum(each.rounds for each in spreads),
        )


class Verdict(enum.StrEnum):
    PASS = "PASS"
    MISS = "miss"
    NOISY = "too noisy"
    FEW = "too few rounds"
    BETTER = "better"
    WORSE = "worse"


@dataclass(frozen=True, slots=True)
class Limit:
    """What a ratio is held against. One that was `set` is passed or missed; else it is a comparison."""

    value: float
    set: bool


def spread(samples: Sequence[Sample], figure: str) -> Spread | None:
    """None when a round failed: a median of what is left would hide it. None also without such a figure."""
    if not samples or any(figure not in sample.values for sample in samples):
        return None
    return Spread.of([sample.values[figure] for sample in samples])


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


def best(peers: dict[str, Spread | None], *, lower_is_better: bool) -> str:
    """The peer with the best median, of those that have one; empty when none has."""
    medians = {peer: seen.median for peer, seen in peers.items() if seen}
    if not medians:
        return ""
    return (min if lower_is_better else max)(medians, key=medians.__getitem__)


def verdict(seen: Spread, limit: Limit, *, lower_is_better: bool) -> Verdict:
    """Rounds on both sides of the limit conclude nothing."""
    if seen.rounds < _ENOUGH:
        return Verdict.FEW
    if lower_is_better:
        all_good, all_bad = seen.most <= limit.value, seen.least > limit.value
    else:
        all_good, all_bad = seen.least >= limit.value, seen.most < limit.value
    if not all_good and not all_bad:
        return Verdict.NOISY
    if limit.set:
        return Verdict.PASS if all_good else Verdict.MISS
    return Verdict.BETTER if all_good else Verdict.WORSE
