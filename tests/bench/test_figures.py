from collections.abc import Sequence

import pytest

from tests.bench.figures import Cell, Limit, Sample, Spread, Verdict, best, ratio, spread, verdict
from tests.bench.table import MESHNET
from tests.bench.tests import CPU, MTLS

CRR = Cell("crr", MTLS, 1)


def shown(peer: str, figure: str, values: Sequence[float]) -> list[Sample]:
    return [Sample(cell=CRR, peer=peer, round=number, values={figure: value}) for number, value in enumerate(values, 1)]


def test_a_spread_is_the_median_and_both_ends() -> None:
    assert spread(shown(MESHNET, CPU, [5, 1, 9]), CPU) == Spread(5, 1, 9, 3)


def test_a_cell_with_a_failed_round_has_no_median() -> None:
    failed = Sample(cell=CRR, peer=MESHNET, round=3, failure="1 errors, the first: recv")
    ours = [*shown(MESHNET, CPU, [1, 2]), failed]
    assert spread(ours, CPU) is None
    assert ratio(ours, shown("nginx", CPU, [1, 2, 3]), CPU) is None
    assert ratio(shown("nginx", CPU, [1, 2, 3]), ours, CPU) is None


def test_a_ratio_is_taken_round_by_round() -> None:
    # Both became three times dearer in the second round: the machine did, not one of them.
    seen = ratio(shown(MESHNET, CPU, [10, 30, 10]), shown("nginx", CPU, [20, 60, 20]), CPU)
    assert seen == Spread(0.5, 0.5, 0.5, 3)


@pytest.mark.parametrize("theirs", [[], [1.0], [1.0, 0.0]])
def test_there_is_no_ratio_to_what_was_not_measured(theirs: list[float]) -> None:
    assert ratio(shown(MESHNET, CPU, [1, 2]), shown("nginx", CPU, theirs), CPU) is None


def test_the_best_peer_has_the_least_cpu_and_the_highest_rate() -> None:
    peers = {"nginx": Spread(3, 1, 9, 3), "envoy": Spread(2, 2, 2, 3), "haproxy": None}
    assert best(peers, lower_is_better=True) == "envoy"
    assert best(peers, lower_is_better=False) == "nginx"
    assert best({"haproxy": None}, lower_is_better=True) == ""


@pytest.mark.parametrize(
    ("seen", "limit", "lower_is_better", "wanted"),
    [
        (Spread(0.3, 0.2, 0.5, 3), Limit(0.5, True), True, Verdict.PASS),
        (Spread(0.9, 0.6, 1.2, 3), Limit(0.5, True), True, Verdict.MISS),
        (Spread(0.3, 0.2, 0.6, 3), Limit(0.5, True), True, Verdict.NOISY),
        (Spread(1.2, 1.0, 1.6, 3), Limit(1.0, True), False, Verdict.PASS),
        (Spread(0.8, 0.7, 0.9, 3), Limit(1.0, True), False, Verdict.MISS),
        (Spread(1.4, 1.1, 1.5, 3), Limit(1.0, False), True, Verdict.WORSE),
        (Spread(1.4, 1.1, 1.5, 3), Limit(1.0, False), False, Verdict.BETTER),
        (Spread(0.4, 0.1, 0.5, 3), Limit(1.0, False), True, Verdict.BETTER),
        (Spread(0.4, 0.1, 0.5, 3), Limit(1.0, False), False, Verdict.WORSE),
        (Spread(1.4, 0.9, 1.5, 3), Limit(1.0, False), True, Verdict.NOISY),
        (Spread(0.3, 0.3, 0.3, 2), Limit(0.5, True), True, Verdict.FEW),
    ],
)
def test_a_verdict_needs_every_round_on_one_side(
    seen: Spread, limit: Limit, lower_is_better: bool, wanted: Verdict
) -> None:
    assert verdict(seen, limit, lower_is_better=lower_is_better) is wanted
