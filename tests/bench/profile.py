"""Where meshnet's time goes in a cell: Python functions, symbols, system calls for each unit of work."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from tests.bench import load
from tests.bench.load import LoadFailed, Result, Subject
from tests.bench.rounds import Plan
from tests.bench.steps import steps
from tests.bench.subjects import absent, subject
from tests.bench.table import MESHNET
from tests.bench.tests import CPU, MODES, TESTS, Test
from tests.bench.tools import Tool, perf, py_spy, strace, threads

_SECONDS = 3.0  # of each tool
_TOOLS: dict[str, Tool] = {
    "CPU time by thread, all sidecars": threads,
    "CPU time by step, all sidecars (perf)": steps,
    "Python functions, while the GIL is held (py-spy)": py_spy,
    "Symbols, user [.] and kernel [k] (perf)": perf,
    "System calls (strace)": strace,
}


def profile(program: Path, plan: Plan, directory: Path) -> None:
    """Prints a part of Markdown for each cell of the plan in which time is spent."""
    for workers, mode in itertools.product(plan.workers, plan.modes):
        tests = [TESTS[name] for name in plan.tests if not TESTS[name].held]
        if why := absent(MESHNET, workers):
            click.echo(f"{workers} workers: {why}")
        elif tests:
            with subject(MESHNET, mode, workers, program) as one:
                for test in tests:
                    click.echo(f"\n## {test.name}, {MODES[mode]}, workers: {workers}")
                    _profile(program, test, one, directory)


def _profile(program: Path, test: Test, one: Subject, directory: Path) -> None:
    values = load.measure(program, test, one, warm=0.3, seconds=1.0)
    figure = next(figure for figure in test.figures if figure.key == CPU)
    click.echo(f"\n{one.says}; {figure.label} without a tool: {values[CPU]:.3g}")
    for title, tool in _TOOLS.items():
        click.echo(f"\n### {title}\n")
        try:
            lines = tool(one.pids(), _SECONDS, directory, _drive(program, test, one), test.unit)
        except LoadFailed as error:
            lines = [f"the load failed with this tool attached: {error}"]
        click.echo("\n".join(lines))


def _drive(program: Path, test: Test, one: Subject) -> Callable[[float], float]:
    """Puts load on it for some seconds, says how many units were done."""
    work = partial(load.run, program, test.work, one, test.connections)

    def drive(seconds: float) -> float:
        done: Result = work(warm=0, seconds=seconds)
        return done.bytes / 1e6 if test.streams else done.units

    return drive
