import re
from collections.abc import Sequence

import pytest

from tests.bench.figures import (
    DIRECT,
    HAPROXY,
    MESHNET,
    MTLS,
    PLAIN,
    Sample,
    Spread,
    Verdict,
    chosen,
    ratio,
    spread,
    verdict,
)
from tests.bench.report import markdown, number
from tests.bench.tests import CPU, RATE, TESTS


def cell(peer: str, figure: str, values: Sequence[float], *, test: str = "crr", mode: str = MTLS) -> list[Sample]:
    return [
        Sample(test=test, peer=peer, mode=mode, round=number, values={figure: value})
        for number, value in enumerate(values, 1)
    ]


def test_a_spread_is_the_median_and_both_ends() -> None:
    assert spread(cell(MESHNET, CPU, [5, 1, 9]), CPU) == Spread(5, 1, 9, 3)


def test_a_cell_with_a_failed_round_has_no_median() -> None:
    failed = Sample(test="crr", peer=MESHNET, mode=MTLS, round=3, failure="1 errors, the first: recv")
    ours = [*cell(MESHNET, CPU, [1, 2]), failed]
    assert spread(ours, CPU) is None
    assert ratio(ours, cell(HAPROXY, CPU, [1, 2, 3]), CPU) is None
    assert ratio(cell(HAPROXY, CPU, [1, 2, 3]), ours, CPU) is None


def test_a_ratio_is_taken_round_by_round() -> None:
    # Both became three times dearer in the second round: the machine did, not one of them.
    seen = ratio(cell(MESHNET, CPU, [10, 30, 10]), cell(HAPROXY, CPU, [20, 60, 20]), CPU)
    assert seen == Spread(0.5, 0.5, 0.5, 3)


@pytest.mark.parametrize("theirs", [[], [1.0], [1.0, 0.0]])
def test_there_is_no_ratio_to_what_was_not_measured(theirs: list[float]) -> None:
    assert ratio(cell(MESHNET, CPU, [1, 2]), cell(HAPROXY, CPU, theirs), CPU) is None


@pytest.mark.parametrize(
    ("seen", "target", "lower_is_better", "wanted"),
    [
        (Spread(0.3, 0.2, 0.5, 3), 0.5, True, Verdict.PASS),
        (Spread(0.9, 0.6, 1.2, 3), 0.5, True, Verdict.MISS),
        (Spread(0.3, 0.2, 0.6, 3), 0.5, True, Verdict.NOISY),
        (Spread(1.4, 1.1, 1.5, 3), None, True, Verdict.WORSE),
        (Spread(1.4, 1.1, 1.5, 3), None, False, Verdict.BETTER),
        (Spread(0.4, 0.1, 0.5, 3), None, True, Verdict.BETTER),
        (Spread(0.4, 0.1, 0.5, 3), None, False, Verdict.WORSE),
        (Spread(1.4, 0.9, 1.5, 3), None, True, Verdict.NOISY),
        (Spread(0.3, 0.3, 0.3, 2), 0.5, True, Verdict.FEW),
    ],
)
def test_a_verdict_needs_every_round_on_one_side(
    seen: Spread, target: float | None, lower_is_better: bool, wanted: Verdict
) -> None:
    assert verdict(seen, target, lower_is_better=lower_is_better) is wanted


def test_a_cell_of_the_table_is_one_test_of_one_peer_in_one_mode() -> None:
    mine = cell(MESHNET, CPU, [1])
    others = [
        *cell(HAPROXY, CPU, [1]),
        *cell(MESHNET, CPU, [1], test="rr1"),
        *cell(MESHNET, CPU, [1], mode=PLAIN),
    ]
    assert chosen([*others, *mine], "crr", MESHNET, MTLS) == mine


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (1.236, "1.24"),
        (12.36, "12.4"),
        (99.96, "100"),
        (123.6, "124"),
        (45678, "45,700"),
    ],
)
def test_a_number_has_three_digits_that_count(value: float, text: str) -> None:
    assert number(value) == text


def test_the_table_shows_medians_ratio_target_and_verdict() -> None:
    samples = [
        *cell(DIRECT, RATE, [9000, 9000, 9000], mode=""),
        *cell(HAPROXY, CPU, [3000, 2000, 2000]),
        *cell(MESHNET, CPU, [300, 400, 300]),
    ]
    row = next(line for line in markdown(samples, {}).splitlines() if "CPU us/connection" in line)
    assert [part.strip() for part in row.strip("|").split("|")] == [
        "",
        "CPU us/connection",
        "-",
        "2,000 [2,000..3,000]",
        "300 [300..400]",
        "0.15 [0.1..0.2]",
        "at most 0.5",
        "PASS",
    ]


def test_a_failure_is_told_in_the_table_and_below_it() -> None:
    broken = Sample(test="crr", peer=MESHNET, mode=MTLS, round=2, failure="7 errors, the first: recv")
    text = markdown([*cell(HAPROXY, CPU, [1]), broken], {})
    row = next(line for line in text.splitlines() if "CPU us/connection" in line)
    assert re.search(r"\| failed \| - \|.*\| - \|$", row)
    assert "crr meshnet mtls in round 2: 7 errors, the first: recv" in text


def test_the_targets_are_those_that_were_set() -> None:
    set_ = {
        (name, mode): limit
        for name, test in TESTS.items()
        for mode in (PLAIN, MTLS)
        for figure in test.figures
        if (limit := test.target(mode, figure)) is not None
    }
    assert set_[("crr", MTLS)] == 0.5
    assert set_[("stream1", MTLS)] == 1.5
    assert set_[("rr1", MTLS)] == set_[("rr32", MTLS)] == 3.0
