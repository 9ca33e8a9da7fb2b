import re
from collections.abc import Sequence

import pytest

from tests.bench.figures import Cell, Sample, Spread, Verdict
from tests.bench.machine import Noise, quietness
from tests.bench.report import Run, markdown, number
from tests.bench.table import DIRECT, DIRECT_CELL, MESHNET, Row, rows
from tests.bench.targets import BEST, ITSELF, Target, target
from tests.bench.tests import CPU, MEMORY, MODES, MTLS, OTHERS, P99, PLAIN, RATE, STOLEN, TESTS

CRR = Cell("crr", MTLS, 1)


def shown(peer: str, figure: str, values: Sequence[float], cell: Cell = CRR) -> list[Sample]:
    return [
        Sample(cell=cell, peer=peer, round=number, values={figure: value}) for number, value in enumerate(values, 1)
    ]


def row(samples: Sequence[Sample], figure: str) -> Row:
    return next(row for row in rows(samples) if row.figure == figure)


def test_the_targets_are_those_that_were_set() -> None:
    at_most = {
        (test, figure.key): tuple(target(test, figure.key, mode) for mode in (PLAIN, MTLS))
        for test in TESTS
        for figure in TESTS[test].figures
        if figure.key != RATE and target(test, figure.key, PLAIN)
    }
    assert at_most == {
        ("rr1", CPU): (Target(0.9), Target(0.9)),
        ("rr32", CPU): (Target(0.9), Target(0.9)),
        ("rr64", CPU): (Target(0.9), Target(0.9)),
        ("rr64", P99): (Target(1.0), Target(1.0)),
        ("stream1", CPU): (Target(0.9), Target(1.0)),
        ("stream8", CPU): (Target(0.9), Target(1.0)),
        ("crr", CPU): (Target(1.3), Target(0.3)),
        ("idle", MEMORY): (Target(8.0, ITSELF), Target(1.0, "envoy")),
    }
    assert all(target(test, RATE, mode) == Target(1.0, BEST) for test in TESTS for mode in MODES)


def test_a_row_is_held_against_the_best_peer_of_its_own_cell() -> None:
    other_cells = [
        *shown("envoy", CPU, [1] * 3, Cell("crr", MTLS, 2)),
        *shown("envoy", CPU, [1] * 3, Cell("crr", PLAIN, 1)),
    ]
    samples = [
        *other_cells,
        *shown("haproxy", CPU, [3000, 2900, 3100]),
        *shown("nginx", CPU, [2000, 2000, 2000]),
        *shown(MESHNET, CPU, [300, 400, 500]),
    ]
    seen = next(row for row in rows(samples) if row.cell == CRR and row.figure == CPU)
    assert (seen.against, seen.ratio, seen.verdict) == ("nginx", Spread(0.2, 0.15, 0.25, 3), Verdict.PASS)
    assert seen.target == "at most 0.3"


def test_memory_in_plain_text_is_held_against_kibibytes_and_with_mtls_against_envoy() -> None:
    plain, mtls = Cell("idle", PLAIN, 1), Cell("idle", MTLS, 1)
    samples = [
        *shown("haproxy", MEMORY, [1] * 3, mtls),
        *shown("envoy", MEMORY, [20] * 3, mtls),
        *shown(MESHNET, MEMORY, [10] * 3, mtls),
        *shown("haproxy", MEMORY, [3] * 3, plain),
        *shown(MESHNET, MEMORY, [9] * 3, plain),
    ]
    first, second = (row for row in rows(samples) if row.figure == MEMORY)
    assert (first.against, first.target, first.verdict) == (ITSELF, "at most 8 KiB", Verdict.MISS)
    assert (second.against, second.target, second.verdict) == ("envoy", "at most 1 of Envoy", Verdict.PASS)


def test_without_a_peer_there_is_no_ratio_and_no_verdict() -> None:
    seen = row(shown(MESHNET, CPU, [300, 400, 500]), CPU)
    assert (seen.ratio, seen.verdict) == (None, None)


def test_what_there_is_not_says_so_in_its_cell() -> None:
    cell = Cell("rr64", PLAIN, 2)
    missing = Sample(cell=cell, peer=MESHNET, round=0, absent="not yet")
    text = markdown([[Run("Unpinned", 1, {}, [*shown("nginx", CPU, [5] * 3, cell), missing])]])
    assert "### Plain, two workers" in text
    line = next(line for line in text.splitlines() if line.startswith("|  | CPU us/request"))
    assert [part.strip() for part in line.strip("|").split("|")][2:] == ["5 [5..5]", "not yet", "-", "-"]


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


def test_the_report_shows_medians_ratio_target_and_verdict() -> None:
    samples = [
        *shown(DIRECT, RATE, [9000, 9000, 9000], Cell("crr", *DIRECT_CELL)),
        *shown("haproxy", CPU, [3000, 2000, 2000]),
        *shown(MESHNET, CPU, [300, 400, 300]),
    ]
    text = markdown([[Run("Unpinned", 1, {"kernel": "6.1"}, samples)]])
    assert "- kernel: 6.1" in text
    summary, details = (
        [part.strip() for part in line.strip("|").split("|")]
        for line in text.splitlines()
        if "CPU us/connection" in line
    )
    assert summary == [
        *("crr mtls, one worker", "CPU us/connection", "300 [300..400]", "HAProxy 2,000"),
        *("0.15 [0.1..0.2]", "at most 0.3", "PASS"),
    ]
    assert details == [
        *("", "CPU us/connection", "-", "2,000 [2,000..3,000]", "300 [300..400]"),
        *("0.15 [0.1..0.2] (HAProxy)", "PASS"),
    ]


def test_a_failure_is_told_in_the_table_and_below_it() -> None:
    broken = Sample(cell=CRR, peer=MESHNET, round=2, failure="7 errors, the first: recv")
    text = markdown([[Run("Unpinned", 1, {}, [*shown("haproxy", CPU, [1]), broken])]])
    line = next(line for line in text.splitlines() if line.startswith("|  | CPU us/connection"))
    assert re.search(r"\| failed \| - \| - \|$", line)
    assert "crr meshnet mtls one worker in round 2: 7 errors, the first: recv" in text


def test_how_noisy_it_was_is_told_before_and_while_measuring() -> None:
    looks = [(Noise(0.01, 0.0), 0.4), (Noise(0.2, 0.1), 20.0)]
    samples = [
        Sample(cell=CRR, peer=MESHNET, round=number, values={OTHERS: others, STOLEN: 0.0})
        for number, others in enumerate((0.01, 0.02, 0.5), 1)
    ]
    assert quietness(looks, samples) == (
        "waited 20 s in all for a quiet machine, in vain 1 of 2 times; while measuring, others used "
        "2.0% (most in a cell: 50%) of the processors' time, and 0.0% (most in a cell: 0%) was stolen"
    )
    assert quietness(looks[:1], []) == "waited 0 s in all for a quiet machine"


def together(*times: Sequence[Run]) -> tuple[list[str], str]:
    """The cells of the one row with a target of all times together, and what comes behind that table."""
    text, rest = markdown(times).split("## Unpinned, the last time")
    line = next(line for line in text.splitlines() if "CPU us/connection" in line)
    return [part.strip() for part in line.strip("|").split("|")], text + rest


def run(time: int, title: str, ours: Sequence[float]) -> Run:
    samples = [*shown("haproxy", CPU, [1000] * len(ours)), *shown(MESHNET, CPU, ours)]
    return Run(title, time, {"quiet": f"time {time}"}, samples)


def test_times_are_told_together_and_the_last_in_full() -> None:
    unpinned, pinned = (290, 310, 280), (200, 250, 299)
    row, text = together(
        *(
            [run(time, "Unpinned", [one] * 3), run(time, "Pinned", [other] * 3)]
            for time, one, other in zip((1, 2, 3), unpinned, pinned, strict=True)
        )
    )
    assert row == [
        *("crr mtls, one worker", "CPU us/connection", "at most 0.3"),
        *("0.29, 0.31, 0.28 [0.28..0.31]: too noisy", "0.2, 0.25, 0.299 [0.2..0.299]: PASS"),
    ]
    assert "280 [280..280]" in text
    assert "310 [310..310]" not in text
    assert "- Unpinned: time 2" in text


@pytest.mark.parametrize(
    ("times", "said"),
    [
        # Every median is on one side, and that of all times too; a single round is not.
        (([200, 250, 290], [200, 250, 301]), "0.25, 0.25 [0.2..0.301]: too noisy"),
        (([310, 350, 390], [299, 350, 390]), "0.35, 0.35 [0.299..0.39]: too noisy"),
        # One time by itself is too noisy for a verdict, and no other can lend it one.
        (([100, 100, 100], [100, 250, 400]), "0.1, 0.25 [0.1..0.4]: too noisy"),
        (([200, 250, 290], [210, 240, 299]), "0.25, 0.24 [0.2..0.299]: PASS"),
        (([310, 350, 390], [301, 350, 390]), "0.35, 0.35 [0.301..0.39]: miss"),
        (([100], [100]), "0.1, 0.1 [0.1..0.1]: too few rounds"),
        (([100], [100], [100]), "0.1, 0.1, 0.1 [0.1..0.1]: PASS"),
    ],
)
def test_a_verdict_on_all_times_needs_all_their_rounds(times: Sequence[Sequence[float]], said: str) -> None:
    row, _ = together(*([run(time, "Unpinned", ours)] for time, ours in enumerate(times, 1)))
    assert row[-1] == said


def test_a_time_that_failed_leaves_no_verdict_on_all() -> None:
    broken = Sample(cell=CRR, peer=MESHNET, round=1, failure="a reset")
    failed = Run("Unpinned", 2, {}, [*shown("haproxy", CPU, [1000]), broken])
    row, _ = together([run(1, "Unpinned", [100] * 3)], [failed])
    assert row[-1] == "-"
