"""What the bench runs on: its processors, how quiet it is, and the spinners that keep it awake."""

import functools
import os
import platform
import re
import resource
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from tests.bench.figures import Sample
from tests.bench.tests import OTHERS, STOLEN

QUIET = 0.05  # the part of the processors' time that others may use

_LOOK = 0.4  # seconds
_FILES = 65536


class Noise(msgspec.Struct, frozen=True):
    """Parts, of 0 to 1, of the time of the processors that we may use."""

    others: float
    stolen: float

    @property
    def all(self) -> float:
        return self.others + self.stolen


@contextmanager
def pinned(on: bool) -> Iterator[None]:
    """We, and whatever starts in the block, on one processor."""
    allowed = os.sched_getaffinity(0)
    if on:
        os.sched_setaffinity(0, {max(allowed)})  # the first is where interrupts tend to go
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@contextmanager
def spinners(program: Path, on: bool) -> Iterator[list[int]]:
    """Their PIDs; none when they are off."""
    if not on:
        yield []
        return
    with subprocess.Popen([program, "spin"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as spin:
        assert spin.stdin is not None
        assert spin.stdout is not None
        yield [int(pid) for pid in spin.stdout.readline().split()]
        spin.stdin.close()


def wait_until_quiet(program: Path, spinning: Sequence[int], patience: float) -> tuple[Noise, float]:
    """The last look at the noise, and how many seconds it took; after `patience` it may be a noisy one."""
    began = time.monotonic()
    while True:
        command = [str(program), "noise", str(_LOOK), "--", *map(str, spinning)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        noise = msgspec.json.decode(done.stdout, type=Noise)
        waited = time.monotonic() - began
        if noise.all <= QUIET or waited > patience:
            return noise, waited


def allow_many_files() -> int:
    """As a unit file would: 1,000 connections are 2,000 descriptors in a sidecar. How many there may be."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, max(most, _FILES)))
    except (ValueError, OSError):  # more than the hard limit takes root
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, _FILES), most))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def free_memory() -> int:
    """KiB that can be had without swapping (proc(5), meminfo)."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def description(spinning: Sequence[int], command: str = "scripts/bench") -> dict[str, str]:
    """What there is to know before anything was measured."""
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    allowed = sorted(os.sched_getaffinity(0))
    where = f"everything pinned on processor {allowed[0]}" if len(allowed) == 1 else f"unpinned on {len(allowed)}"
    return {
        "command": " ".join([command, *sys.argv[1:]]),
        "source": _source(),
        "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, load average before {os.getloadavg()[0]:.1f}",
        "processors": f"{model[1] if model else platform.machine()}, {os.cpu_count()} of them; {where}",
        "spinners": f"on, {len(spinning)} of idle priority" if spinning else "off: virtual processors may have slept",
        "kernel": platform.release(),
        "Python": f"{platform.python_version()}, {ssl.OPENSSL_VERSION}",
    }


@functools.cache  # once: what --write writes is no change
def _source() -> str:
    """The commit that was measured, and whether the files are others by now."""
    named = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(named, capture_output=True, text=True, check=False)
    return f"commit {done.stdout.strip()}" if done.returncode == 0 else "no checkout of git"


def quietness(looks: Sequence[tuple[Noise, float]], samples: Sequence[Sample]) -> str:
    """How noisy it was, before and while it was measured."""
    noisy = sum(noise.all > QUIET for noise, _ in looks)
    waited = f"waited {sum(seconds for _, seconds in looks):.0f} s in all for a quiet machine"
    if noisy:
        waited += f", in vain {noisy} of {len(looks)} times"
    seen = [sample.values for sample in samples if OTHERS in sample.values]
    if not seen:
        return waited
    others, stolen = ([values[key] for values in seen] for key in (OTHERS, STOLEN))
    return (
        f"{waited}; while measuring, others used {_percent(others)} of the processors' time, "
        f"and {_percent(stolen)} was stolen"
    )


def _percent(parts: Sequence[float]) -> str:
    return f"{statistics.median(parts):.1%} (most in a cell: {max(parts):.0%})"
