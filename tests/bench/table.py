"""The rows of the result: what every subject showed, meshnet by the best peer, and the verdict."""

from collections.abc import Mapping, Sequence

import msgspec

from tests.bench import figures
from tests.bench.figures import Cell, Limit, Sample, Spread, Verdict, ratio, spread, verdict
from tests.bench.targets import BEST, ITSELF, Target, target
from tests.bench.tests import MODES, TESTS, WORKERS, Figure

DIRECT, MESHNET = "direct", "meshnet"
PEERS = {
    "haproxy": "HAProxy",
    "haproxy-splice": "HAProxy, splice",
    "nginx": "nginx",
    "envoy": "Envoy",
}
# What capture costs, whoever captures: no peer to be held against, for its clients do not dial it.
REDIRECTED = "nginx-redirected"
SUBJECTS = {DIRECT: DIRECT} | PEERS | {REDIRECTED: "nginx, redirected", MESHNET: MESHNET}  # with their names in reports

DIRECT_CELL = ("", 0)  # the mode and the workers of what has no proxy


class Row(msgspec.Struct, frozen=True):
    """One figure of one cell. `missing` says why a subject shows none; `ratio` is meshnet's by that of `against`."""

    cell: Cell
    figure: str
    label: str
    seen: dict[str, Spread]
    missing: dict[str, str]
    against: str
    ratio: Spread | None
    limit: Limit
    lower_is_better: bool
    target: str
    verdict: Verdict | None


def rows(samples: Sequence[Sample]) -> list[Row]:
    """In the order of modes, workers and tests; only cells that were measured."""
    by_cell: dict[Cell, dict[str, list[Sample]]] = {}
    for sample in samples:
        by_cell.setdefault(sample.cell, {}).setdefault(sample.peer, []).append(sample)
    found = []
    for workers in WORKERS:
        for mode in MODES:
            for test in TESTS.values():
                subjects = by_cell.get(Cell(test.name, mode, workers))
                if subjects:
                    direct = by_cell.get(Cell(test.name, *DIRECT_CELL), {})
                    cell = Cell(test.name, mode, workers)
                    found += [_row(cell, figure, direct | subjects) for figure in test.figures]
    return found


def _row(cell: Cell, figure: Figure, subjects: Mapping[str, Sequence[Sample]]) -> Row:
    spreads = {name: spread(samples, figure.key) for name, samples in subjects.items()}
    goal = target(cell.test, figure.key, cell.mode)
    against = _against(spreads, figure, goal)
    ours = subjects.get(MESHNET, ())
    seen = spread(ours, figure.key) if against == ITSELF else ratio(ours, subjects.get(against, ()), figure.key)
    limit = Limit(goal.limit, set=True) if goal else Limit(1.0, set=False)
    return Row(
        cell=cell,
        figure=figure.key,
        label=figure.label,
        seen={name: each for name, each in spreads.items() if each},
        missing={name: why for name, samples in subjects.items() if (why := _missing(samples))},
        against=against,
        ratio=seen,
        limit=limit,
        lower_is_better=figure.lower_is_better,
        target=_said(goal, figure) if goal else "",
        verdict=verdict(seen, limit, lower_is_better=figure.lower_is_better) if seen else None,
    )


def _against(spreads: dict[str, Spread | None], figure: Figure, goal: Target | None) -> str:
    if goal and goal.of != BEST:
        return goal.of
    peers = {name: seen for name, seen in spreads.items() if name in PEERS}
    # Without any peer there is nothing to divide by: `-`, not the figure itself.
    return figures.best(peers, lower_is_better=figure.lower_is_better) or BEST


def _missing(samples: Sequence[Sample]) -> str:
    if any(sample.failure for sample in samples):
        return "failed"
    return next((sample.absent for sample in samples if sample.absent), "")


def _said(goal: Target, figure: Figure) -> str:
    bound = "at most" if figure.lower_is_better else "at least"
    unit = f" {figure.label.partition('/')[0]}" if goal.of == ITSELF else ""
    of = f" of {SUBJECTS[goal.of]}" if goal.of not in (BEST, ITSELF) else ""
    return f"{bound} {goal.limit:g}{unit}{of}"
