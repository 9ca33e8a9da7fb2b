"""Builds the generator, runs its clients, and turns what they say into figures."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from meshnet.errors import CommandError
from meshnet_cli.demo.world import Host, Process, wait_for
from tests.bench.tests import CPU, MEMORY, OTHERS, P50, P90, P99, P999, RATE, STOLEN, Test

_SOURCES = Path(__file__).with_name("generator")
_FLAGS = ("-O2", "-std=c11", "-Wall", "-Wextra", "-Werror")
_PATIENCE = 60.0  # seconds beyond the work itself; the generator gives up sooner


class LoadFailed(Exception):
    """A client met an error, or ended without a word: how many and the first of them."""


class Result(msgspec.Struct, frozen=True):
    """What a client prints; see generator/main.c."""

    units: int
    opened: int
    bytes: int
    seconds: float
    cpu_seconds: float
    others: float
    stolen: float
    p50_us: float
    p90_us: float
    p99_us: float
    p999_us: float
    errors: int
    first_error: str


def build(directory: Path) -> Path:
    """The program, made in `directory`. Raises CommandError without a compiler."""
    if shutil.which("cc") is None:
        raise CommandError(
            "no C compiler",
            why="the load generator is a small C program, built when the bench runs",
            fix="sudo apt-get install -y --no-install-recommends gcc libc6-dev",
        )
    program = directory / "load"
    subprocess.run(["cc", *_FLAGS, "-o", program, *sorted(_SOURCES.glob("*.c"))], check=True)
    return program


@dataclass(slots=True)
class Subject:
    """What load is put on, from `client`, which dials `target`. Without a proxy there are no sidecars.

    `says` is what it tells about itself.
    """

    peer: str
    client: Host
    target: tuple[str, int]
    server: Process
    sidecars: Sequence[Process] = ()
    says: str = ""

    def pids(self) -> list[int]:
        """The sidecars' processes, workers included."""
        sessions = {process.pid for process in self.sidecars}
        return [pid for pid in map(int, filter(str.isdigit, _names_in_proc())) if _session(pid) in sessions]


def measure(
    program: Path, test: Test, one: Subject, *, warm: float, seconds: float, spinners: Sequence[int] = ()
) -> dict[str, float]:
    """The test's figures but for memory; CPU is that of the sidecars, if there are any. Raises LoadFailed."""
    result = run(program, test.work, one, test.connections, warm=warm, seconds=seconds, spinners=spinners)
    values = {OTHERS: result.others, STOLEN: result.stolen}
    if test.streams:
        values[RATE] = result.bytes / result.seconds / 1e6
        cpu = result.cpu_seconds / (result.bytes / 1e9)
    else:
        values |= {RATE: result.units / result.seconds, P50: result.p50_us, P90: result.p90_us}
        values |= tail(result)
        cpu = result.cpu_seconds / result.units * 1e6
    return values | {CPU: cpu} if one.sidecars else values


def run(
    program: Path,
    work: str,
    one: Subject,
    connections: int,
    *,
    warm: float,
    seconds: float,
    spinners: Sequence[int] = (),
) -> Result:
    """Raises LoadFailed, also when nothing at all was done."""
    ours = [*one.pids(), "--", one.server.pid, *spinners]
    done = one.client.run(
        *(program, work, one.target[0], str(one.target[1]), str(connections), str(warm), str(seconds)),
        *map(str, ours),
        check=False,
        timeout=warm + seconds + _PATIENCE,
    )
    return _result(done.stdout + done.stderr)


def tail(result: Result) -> dict[str, float]:
    """Without those that fewer than ten units were beyond: they would be told of a few accidents."""
    tail = {P99: (result.p99_us, 1_000), P999: (result.p999_us, 10_000)}
    return {key: value for key, (value, units) in tail.items() if result.units >= units}


def measure_memory(program: Path, test: Test, one: Subject) -> dict[str, float]:
    """By how much the sidecars grow for each connection that stays open (PSS, KiB). Raises LoadFailed."""
    before = pss(one.pids())
    host, port = one.target
    holder = one.client.spawn(program, "hold", host, str(port), str(test.connections), "0", "0", name="hold")
    wait_for(lambda: "held" in holder.output or not holder.alive, timeout=_PATIENCE, what="all connections open")
    growth = pss(one.pids()) - before
    if holder.alive:
        holder.terminate(_PATIENCE)
    _result(holder.output)
    return {MEMORY: growth / test.connections}


def _result(output: str) -> Result:
    last = (output.strip().splitlines() or [""])[-1]
    try:
        result = msgspec.json.decode(last, type=Result)
    except msgspec.DecodeError:
        raise LoadFailed(f"no result: {last}") from None
    if result.errors:
        raise LoadFailed(f"{result.errors} errors, the first: {result.first_error}")
    if not result.units and not result.bytes:
        raise LoadFailed("nothing came through")
    return result


def pss(pids: Sequence[int]) -> int:
    """Kibibytes of memory that are theirs, shared pages by share (proc(5), smaps_rollup)."""
    text = "".join(Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids)
    return sum(int(size) for size in re.findall(r"^Pss:\s+(\d+) kB$", text, re.MULTILINE))


def _names_in_proc() -> list[str]:
    return [path.name for path in Path("/proc").iterdir()]


def _session(pid: int) -> int:
    """0 when it has ended meanwhile."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[3])  # a program's name may hold anything
