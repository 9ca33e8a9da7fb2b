"""What is measured when. Subjects that are compared stand at once and take turns: A B C, A B C, ..."""

import itertools
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from meshnet.errors import CommandError
from tests.bench import load
from tests.bench.figures import Cell, Sample
from tests.bench.load import LoadFailed
from tests.bench.machine import Noise, wait_until_quiet
from tests.bench.subjects import absent, subject
from tests.bench.table import DIRECT, DIRECT_CELL, REDIRECTED
from tests.bench.tests import CPU, MEMORY, MTLS, PLAIN, RATE, TESTS, Test, in_quick

_WARM = 0.15  # of a cell's seconds, before them
_FRESH_ROUNDS = 3  # at most, where each sample takes new processes
_SPLICE = "haproxy-splice"


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for."""

    tests: Sequence[str]
    modes: Sequence[str]
    workers: Sequence[int]
    peers: Sequence[str]
    rounds: int
    seconds: float
    patience: float  # for a quiet machine, before each group
    quick: bool

    def chosen(self, mode: str, workers: int) -> list[Test]:
        tests = [TESTS[name] for name in self.tests]
        return [test for test in tests if not self.quick or in_quick(test, mode, workers)]

    def __str__(self) -> str:
        return f"{self.rounds} of {self.seconds:g} s, warmed up for {self.seconds * _WARM:.2g} s"


@dataclass(slots=True)
class Measured:
    samples: list[Sample] = field(default_factory=list)
    looks: list[tuple[Noise, float]] = field(default_factory=list)  # for quiet, and the seconds they took
    said: dict[str, None] = field(default_factory=dict)  # by subjects about themselves, each once

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)
        seen = ", ".join(f"{key} {sample.values[key]:,.1f}" for key in (RATE, CPU, MEMORY) if key in sample.values)
        cell = f"{sample.cell.test:8}{sample.cell.mode:7}{sample.cell.workers} {sample.peer:15}"
        print(f"round {sample.round}  {cell}{sample.failure or seen or sample.absent}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class _Group:
    """Cells that share subjects."""

    mode: str
    workers: int
    tests: Sequence[Test]
    peers: Sequence[str]

    def cell(self, test: Test) -> Cell:
        return Cell(test.name, self.mode, self.workers)


def measure(program: Path, plan: Plan, spinning: Sequence[int]) -> Measured:
    """Everything in the plan. What fails, a subject's check or a cell, is a sample that says so."""
    measured = Measured()
    for number, (workers, mode) in enumerate(itertools.product(plan.workers, plan.modes)):
        # Once is enough of what has neither mode nor workers.
        peers = [peer for peer in plan.peers if peer != DIRECT or number == 0]
        missing = {peer: why for peer in peers if (why := absent(peer, workers))}
        group = _Group(mode, workers, plan.chosen(mode, workers), [peer for peer in peers if peer not in missing])
        for (peer, why), test in itertools.product(missing.items(), group.tests):
            if _fits(peer, test, mode):
                measured.add(Sample(cell=group.cell(test), peer=peer, round=0, absent=why))
        _measure_timed(program, plan, group, spinning, measured)
        _measure_held(program, plan, group, measured)
    return measured


def _measure_timed(program: Path, plan: Plan, group: _Group, spinning: Sequence[int], measured: Measured) -> None:
    tests = [test for test in group.tests if not test.held]
    wanted = [peer for peer in group.peers if any(_fits(peer, test, group.mode) for test in tests)]
    if not wanted:
        return
    with ExitStack() as stack:
        built = {}
        for peer in wanted:
            try:
                built[peer] = stack.enter_context(subject(peer, group.mode, group.workers, program))
            except CommandError as error:
                for test in tests:
                    measured.add(_failed(group.cell(test), peer, 0, error))
        measured.said |= {one.says: None for one in built.values() if one.says}
        measured.looks.append(wait_until_quiet(program, spinning, plan.patience))
        for round_, test, (peer, one) in itertools.product(range(1, plan.rounds + 1), tests, built.items()):
            if _fits(peer, test, group.mode):
                cell = Cell(test.name, *DIRECT_CELL) if peer == DIRECT else group.cell(test)
                try:
                    values = load.measure(
                        *(program, test, one),
                        warm=plan.seconds * _WARM,
                        seconds=plan.seconds,
                        spinners=spinning,
                    )
                    measured.add(Sample(cell=cell, peer=peer, round=round_, values=values))
                except LoadFailed as error:
                    measured.add(_failed(cell, peer, round_, error))


def _measure_held(program: Path, plan: Plan, group: _Group, measured: Measured) -> None:
    """Memory once grown is used again, so each sample is of fresh processes."""
    tests = [test for test in group.tests if test.held]
    rounds = range(1, 1 + min(plan.rounds, _FRESH_ROUNDS))
    for test, round_, peer in itertools.product(tests, rounds, group.peers):
        if peer != DIRECT and _fits(peer, test, group.mode):
            try:
                with subject(peer, group.mode, group.workers, program) as one:
                    values = load.measure_memory(program, test, one)
                measured.add(Sample(cell=group.cell(test), peer=peer, round=round_, values=values))
            except (LoadFailed, CommandError) as error:
                measured.add(_failed(group.cell(test), peer, round_, error))


def _failed(cell: Cell, peer: str, round_: int, error: LoadFailed | CommandError) -> Sample:
    if isinstance(error, CommandError):
        print(error.why, file=sys.stderr)
    return Sample(cell=cell, peer=peer, round=round_, failure=str(error).partition("\n")[0])


def _fits(peer: str, test: Test, mode: str) -> bool:
    """Splicing is for streams, and cannot encrypt. What capture costs is seen in plain text."""
    if peer == REDIRECTED:
        return mode == PLAIN and not test.held
    return peer != _SPLICE or (test.streams and mode != MTLS)
