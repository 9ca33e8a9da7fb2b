"""Measures meshnet side by side with HAProxy, nginx and Envoy, in network namespaces of its own; see scripts/bench."""

import os
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import click
import msgspec

from meshnet_cli.demo.sandbox import enter_sandbox
from meshnet_cli.main import expected_errors
from tests.bench import load, machine
from tests.bench.profile import profile
from tests.bench.report import Run, markdown
from tests.bench.rounds import Plan, measure
from tests.bench.subjects import versions
from tests.bench.table import MESHNET, SUBJECTS, rows
from tests.bench.tests import MODES, TESTS, WORKERS

RESULTS = Path(__file__).with_name("RESULTS.md")


def _names(known: Collection[str]) -> Callable[[click.Context, click.Parameter, str | None], list[str]]:
    """A comma-separated choice of `known`, in their order; all of them when nothing is said."""

    def parse(_context: click.Context, _option: click.Parameter, text: str | None) -> list[str]:
        names = text.split(",") if text else list(known)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(known)}")
        return [name for name in known if name in names]

    return parse


@click.command()
@click.option("--only", "tests", metavar="TEST,...", callback=_names(TESTS), help=f"Of {','.join(TESTS)}.")
@click.option("--mode", "modes", metavar="MODE,...", callback=_names(MODES), help=f"Of {','.join(MODES)}.")
@click.option("--workers", metavar="1,2", callback=_names([str(number) for number in WORKERS]), help="Of 1,2.")
@click.option(
    "--peers", metavar="PEER,...", callback=_names(SUBJECTS), help=f"Of {','.join(SUBJECTS)}; meshnet is always there."
)
@click.option("--rounds", type=click.IntRange(1), help="How often each cell is measured (5; quick 3).")
@click.option("--seconds", type=click.FloatRange(0.05), help="How long a cell is measured (1; quick 0.5).")
@click.option("--quick", is_flag=True, help="Fewer cells, fewer and shorter rounds: under five minutes.")
@click.option("--pin", is_flag=True, help="Everything on one processor.")
@click.option("--twice", is_flag=True, help="Unpinned, then pinned: two parts of one report.")
@click.option("--times", type=click.IntRange(1), default=1, help="The whole of it that often; --write each time (1).")
@click.option("--spin/--no-spin", default=True, help="Keep virtual processors awake (on).")
@click.option("--patience", type=click.FloatRange(0), help="Seconds to wait for a quiet machine, six times (20; 3).")
@click.option("--write", is_flag=True, help=f"Write the report to {os.path.relpath(RESULTS)} too.")
@click.option("--json", "json_file", metavar="FILE", help="Write the rows of the report and all samples there.")
@click.option("--profile", "profiled", is_flag=True, help="Instead: where meshnet's time goes in these cells.")
@click.pass_context
def main(
    context: click.Context,
    tests: list[str],
    modes: list[str],
    workers: list[str],
    peers: list[str],
    rounds: int | None,
    seconds: float | None,
    quick: bool,
    pin: bool,
    twice: bool,
    times: int,
    spin: bool,
    patience: float | None,
    write: bool,
    json_file: str | None,
    profiled: bool,
) -> None:
    """Requests, connections, bytes and memory: meshnet, its peers and no proxy at all, as a Markdown report.

    Exit 1 when a cell failed: a table with errors in it says nothing about speed.
    """
    plan = Plan(
        tests=tests,
        modes=modes,
        workers=[int(number) for number in workers],
        peers=[name for name in SUBJECTS if name in (*peers, MESHNET)],
        rounds=rounds or (3 if quick else 5),
        seconds=seconds or (0.5 if quick else 1.0),
        patience=patience if patience is not None else (3.0 if quick else 20.0),
        quick=quick,
    )
    with expected_errors(context):
        enter_sandbox()
        machine.allow_many_files()
        with tempfile.TemporaryDirectory(prefix="meshnet-bench-") as directory:
            program = load.build(Path(directory))
            if profiled:
                with machine.pinned(pin):
                    profile(program, plan, Path(directory))
                return
            done: list[list[Run]] = []
            for time in range(times):
                pinned = [pin] if not twice else [False, True]
                done.append([_run(program, plan, pin=each, spin=spin, time=time) for each in pinned])
                # Each time, so that the hour before is not lost with the one that is interrupted.
                _save(done, RESULTS if write else None, Path(json_file) if json_file else None)
    click.echo(markdown(done))
    if any(sample.failure for runs in done for run in runs for sample in run.samples):
        context.exit(1)


def _save(done: Sequence[Sequence[Run]], results: Path | None, json_file: Path | None) -> None:
    if results:
        results.write_text(markdown(done))
    if json_file:
        json_file.write_bytes(msgspec.json.encode([_as_json(run) for runs in done for run in runs]))


def _run(program: Path, plan: Plan, *, pin: bool, spin: bool, time: int) -> Run:
    with machine.pinned(pin), machine.spinners(program, spin) as spinning:
        about = machine.description(spinning) | versions()
        measured = measure(program, plan, spinning)
    about["meshnet"] = "; ".join(measured.said)
    about["rounds"] = str(plan)
    about["quiet"] = machine.quietness(measured.looks, measured.samples)
    return Run("Pinned on one processor" if pin else "Unpinned", time + 1, about, measured.samples)


def _as_json(run: Run) -> dict[str, object]:
    return {
        "title": run.title,
        "time": run.time,
        "machine": run.machine,
        "rows": rows(run.samples),
        "samples": run.samples,
    }


if __name__ == "__main__":
    main(prog_name="scripts/bench")
