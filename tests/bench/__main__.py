"""Measures meshnet side by side with HAProxy, in network namespaces of its own; see scripts/bench."""

import functools
import itertools
import os
import platform
import re
import resource
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec

from meshnet_cli.demo.sandbox import enter_sandbox
from meshnet_cli.main import expected_errors
from tests.bench import load
from tests.bench.figures import DIRECT, Sample
from tests.bench.load import Subject
from tests.bench.report import markdown
from tests.bench.subjects import SUBJECTS, subject
from tests.bench.tests import CPU, MEMORY, RATE, TESTS, Test

RESULTS = Path(__file__).with_name("RESULTS.md")

_WARM = 0.15  # of a cell's seconds, before them


@click.command(epilog="Everything on one processor: taskset -c 0 scripts/bench --quick")
@click.option("--only", metavar="TEST,...", help=f"Of {','.join(TESTS)}.")
@click.option("--mode", type=click.Choice(["plain", "mtls", "both"]), default="both", show_default=True)
@click.option("--rounds", type=click.IntRange(1), help="How often each cell is measured (5; quick 3).")
@click.option("--seconds", type=click.FloatRange(0.05), help="How long a cell is measured (2; quick 0.7).")
@click.option("--quick", is_flag=True, help="Fewer and shorter rounds: under two minutes.")
@click.option("--write", is_flag=True, help=f"Write the table to {os.path.relpath(RESULTS)} too.")
@click.option("--json", "json_file", metavar="FILE", help="Write every sample there as JSON.")
@click.pass_context
def main(
    context: click.Context,
    only: str | None,
    mode: str,
    rounds: int | None,
    seconds: float | None,
    quick: bool,
    write: bool,
    json_file: str | None,
) -> None:
    """Requests, connections, bytes and memory: meshnet, HAProxy and no proxy at all, as a Markdown table.

    Exit 1 when a cell failed: a table with errors in it says nothing about speed.
    """
    tests = _chosen_tests(only)
    rounds = rounds or (3 if quick else 5)
    seconds = seconds or (0.7 if quick else 2.0)
    with expected_errors(context):
        enter_sandbox()
        _allow_many_files()
        about = _machine() | {"rounds": f"{rounds} of {seconds:g} s, warmed up for {seconds * _WARM:.2g} s"}
        with tempfile.TemporaryDirectory(prefix="meshnet-bench-") as directory:
            samples = _run(load.build(Path(directory)), tests, mode, rounds, seconds)
    text = markdown(samples, about)
    click.echo(text)
    if write:
        RESULTS.write_text(text)
    if json_file:
        Path(json_file).write_bytes(msgspec.json.encode({"machine": about, "samples": samples}))
    if any(sample.failure for sample in samples):
        context.exit(1)


def _run(program: Path, tests: list[Test], mode: str, rounds: int, seconds: float) -> list[Sample]:
    wanted = [(peer, kind) for peer, kind in SUBJECTS if mode == "both" or kind in ("", mode)]
    samples = _run_timed(program, [test for test in tests if test.work != "hold"], wanted, rounds, seconds)
    for test in tests:
        if test.work == "hold":
            samples += _run_held(program, test, wanted, min(rounds, 3))
    return samples


def _run_timed(
    program: Path, tests: list[Test], wanted: list[tuple[str, str]], rounds: int, seconds: float
) -> list[Sample]:
    """All subjects stand at once and take turns, so that a noisy minute meets every one of them."""
    if not tests:
        return []
    samples: list[Sample] = []
    with ExitStack() as stack:
        built = [stack.enter_context(subject(peer, kind, program)) for peer, kind in wanted]
        for round_, test, one in itertools.product(range(1, rounds + 1), tests, built):
            measure = functools.partial(load.measure, program, test, one, warm=seconds * _WARM, seconds=seconds)
            samples.append(_sample(one, test, round_, measure))
    return samples


def _run_held(program: Path, test: Test, wanted: list[tuple[str, str]], rounds: int) -> list[Sample]:
    """Memory once grown is used again, so each sample is of a fresh process."""
    samples: list[Sample] = []
    for round_, (peer, kind) in itertools.product(range(1, rounds + 1), wanted):
        if peer != DIRECT:
            with subject(peer, kind, program) as one:
                measure = functools.partial(load.measure_memory, program, test, one)
                samples.append(_sample(one, test, round_, measure))
    return samples


def _sample(one: Subject, test: Test, round_: int, measure: Callable[[], dict[str, float]]) -> Sample:
    values, failure = {}, ""
    try:
        values = measure()
    except load.LoadFailed as error:
        failure = str(error)
    sample = Sample(test=test.name, peer=one.peer, mode=one.mode, round=round_, values=values, failure=failure)
    _tell(sample)
    return sample


def _tell(sample: Sample) -> None:
    seen = ", ".join(f"{key} {sample.values[key]:,.1f}" for key in (RATE, CPU, MEMORY) if key in sample.values)
    line = f"round {sample.round}  {sample.test:8}{sample.mode:6}{sample.peer:9}{sample.failure or seen}"
    print(line, file=sys.stderr, flush=True)


def _chosen_tests(only: str | None) -> list[Test]:
    names = only.split(",") if only else list(TESTS)
    unknown = [name for name in names if name not in TESTS]
    if unknown:
        raise click.BadParameter(f"no test {unknown[0]!r}; there are {', '.join(TESTS)}", param_hint="--only")
    return [TESTS[name] for name in names]


def _allow_many_files() -> None:
    """As a unit file would: 1,000 connections are 2,000 descriptors in a sidecar."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536) if most > 0 else 65536, most))


def _machine() -> dict[str, str]:
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    allowed = len(os.sched_getaffinity(0))
    haproxy = subprocess.run(["haproxy", "-v"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return {
        "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, load average before {os.getloadavg()[0]:.1f}",
        "processors": f"{model[1] if model else platform.machine()}, {allowed} of {os.cpu_count()} used",
        "kernel": platform.release(),
        "HAProxy": haproxy.partition(" - ")[0],
        "meshnet": f"relay python, Python {platform.python_version()}, {ssl.OPENSSL_VERSION}",
    }


if __name__ == "__main__":
    main(prog_name="scripts/bench")
