"""The profilers: each watches processes while load is put on them, and says what it saw, as lines of Markdown.

One that is not installed, or is not allowed to look, says so instead.
"""

import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from meshnet_cli.demo.sandbox import search_path
from meshnet_cli.demo.world import wait_for

_TOP = 25
_ATTACHING = 1.5  # seconds of load beyond what the tool takes
_PATIENCE = 60.0

Drive = Callable[[float], float]  # seconds of load; how many units were done


class Tool(Protocol):
    def __call__(
        self, pids: Sequence[int], seconds: float, directory: Path, drive: Drive, unit: str
    ) -> Sequence[str]: ...


def py_spy(pids: Sequence[int], seconds: float, directory: Path, drive: Drive, unit: str) -> Sequence[str]:
    """Samples with the GIL held, by Python function: its own, and with what it calls. System calls are for perf."""
    program = find_program("py-spy")
    if not program:
        return [missing("py-spy", "pip install py-spy")]
    files = [directory / f"{pid}.stacks" for pid in pids]
    options = ("--gil", "--rate", "1000", "--duration", str(int(seconds)), "--format", "raw", "--function")
    said = while_loaded(
        [
            [program, "record", "--pid", str(pid), *options, "--output", str(file)]
            for pid, file in zip(pids, files, strict=True)
        ],
        seconds,
        drive,
    )
    stacks = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    return functions(stacks) or [f"py-spy saw nothing: {said}"]


def perf(pids: Sequence[int], seconds: float, directory: Path, drive: Drive, unit: str) -> Sequence[str]:
    """On-CPU samples by symbol."""
    program = find_program("perf")
    if not program:
        return [missing("perf", "apt-get install linux-perf")]
    data = directory / "perf.data"
    # A virtual machine may have no counters; a clock it has. `sleep` says for how long.
    what = ("-e", "cpu-clock", "-F", "999", "-o", str(data), "-p", ",".join(map(str, pids)))
    said = while_loaded([[program, "record", *what, "--", "sleep", str(seconds)]], seconds, drive)
    fields = ("--stdio", "-F", "overhead,dso,sym", "-t", "|", "-i", str(data))
    shown = subprocess.run([program, "report", *fields], capture_output=True, text=True)
    return symbols(shown.stdout) or [f"perf saw nothing: {said or shown.stderr}"]


def strace(pids: Sequence[int], seconds: float, directory: Path, drive: Drive, unit: str) -> Sequence[str]:
    """How often each system call is made for a unit of work; being traced is slow, so a second of it is enough."""
    program = find_program("strace")
    if not program:
        return [missing("strace", "apt-get install strace")]
    output = directory / "calls"
    targets = [option for pid in pids for option in ("-p", str(pid))]
    command = [program, "-c", "-f", "-S", "calls", "-o", str(output), *targets]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        try:
            wait_for(lambda: all(map(_traced, pids)) or tracer.poll() is not None, what="strace attached")
            units = drive(1.0) if tracer.poll() is None else 0.0
        finally:
            tracer.send_signal(signal.SIGINT)
        _, said = tracer.communicate(timeout=_PATIENCE)
    counted = output.read_text() if output.exists() else ""
    return calls(counted, units, unit) or [f"strace saw nothing: {said.strip()}"]


def threads(pids: Sequence[int], seconds: float, directory: Path, drive: Drive, unit: str) -> Sequence[str]:
    """Microseconds of CPU for a unit of work, by thread (proc(5), task/*/stat)."""
    before = _thread_times(pids)
    units = drive(seconds)
    spent = Counter[tuple[str, str]]()
    for (_, name), times in _thread_times(pids).items():
        for part, time in zip(("user", "kernel"), times, strict=True):
            spent[name, part] += time
    for (_, name), times in before.items():
        for part, time in zip(("user", "kernel"), times, strict=True):
            spent[name, part] -= time
    names = sorted({name for name, _ in spent}, key=lambda name: -spent[name, "user"] - spent[name, "kernel"])
    each = 1e6 / os.sysconf("SC_CLK_TCK") / units
    rows = [f"| {name} | {spent[name, 'user'] * each:.1f} | {spent[name, 'kernel'] * each:.1f} |" for name in names]
    return [f"| thread | user, us/{unit} | kernel, us/{unit} |", "|---|---|---|", *rows]


def _thread_times(pids: Sequence[int]) -> dict[tuple[int, str], tuple[int, int]]:
    """User and kernel time in ticks, by thread's id and name."""
    found = {}
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
            fields = rest.split()
            found[int(task.name), name] = int(fields[11]), int(fields[12])
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """What they have used so far."""
    ticks = sum(sum(times) for times in _thread_times(pids).values())
    return ticks / os.sysconf("SC_CLK_TCK")


def functions(stacks: Sequence[str]) -> list[str]:
    """From py-spy's raw form: frames from the outermost on, `;` between them, then how many samples."""
    own, within = Counter[str](), Counter[str]()
    for line in stacks:
        frames, _, count = line.rpartition(" ")
        names = frames.split(";")
        own[names[-1]] += int(count)
        for name in set(names):
            within[name] += int(count)
    total = own.total()
    rows = [
        f"| {count / total:.1%} | {within[name] / total:.1%} | {_in_a_cell(name)} |"
        for name, count in own.most_common(_TOP)
    ]
    return [f"{total} samples.\n", "| own | in all | function |", "|---|---|---|", *rows] if total else []


def symbols(report: str) -> list[str]:
    """From `perf report` with `|` between overhead, object and symbol."""
    seen = re.findall(r"^\s*([\d.]+)%\s*\|\s*(.*?)\s*\|\s*\[(.)\]\s*(.*?)\s*$", report, re.MULTILINE)
    kernel = sum(float(part) for part, _, level, _ in seen if level == "k")
    objects = Counter[str]()
    for part, name, _, _ in seen:
        objects[name] += round(float(part) * 100)
    shares = ", ".join(f"{name} {part / 100:.0f}%" for name, part in objects.most_common(6))
    rows = [f"| {part}% | [{level}] {_in_a_cell(name)} | {file} |" for part, file, level, name in seen[:_TOP]]
    head = [
        f"Kernel {kernel:.0f}%, user {100 - kernel:.0f}%; {shares}.\n",
        "| own | symbol | object |",
        "|---|---|---|",
    ]
    return [*head, *rows] if seen else []


def calls(table: str, units: float, unit: str) -> list[str]:
    """From the table of `strace -c`: time, seconds, time a call, calls, errors (may be empty), name."""
    seen = re.findall(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(\d*)\s*([a-z_]\w*)$", table, re.MULTILINE)
    counts = [(name, int(count), int(errors or 0)) for count, errors, name in seen if name != "total"]
    if not counts or not units:
        return []
    rows = [f"| {name} | {count / units:.3g} | {errors / units:.3g} |" for name, count, errors in counts[:_TOP]]
    total = sum(count for _, count, _ in counts)
    head = [f"{total / units:.3g} calls for each {unit} ({units:,.0f} of them, all sidecars).\n"]
    return [*head, f"| call | for each {unit} | of them errors |", "|---|---|---|", *rows]


def while_loaded(commands: Sequence[Sequence[str]], seconds: float, drive: Drive) -> str:
    """Runs them side by side, with load all the time; what they complained about, if anything failed."""
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for command in commands]
    try:
        drive(seconds + _ATTACHING)
    finally:
        outputs = [process.communicate(timeout=_PATIENCE)[0].decode(errors="replace") for process in running]
    return "; ".join(output.strip() for output, process in zip(outputs, running, strict=True) if process.returncode)


def _traced(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()


def find_program(name: str) -> str | None:
    return shutil.which(name, path=search_path())


def missing(name: str, line: str) -> str:
    return f"{name} is not installed, so this part is empty: {line}"


def _in_a_cell(text: str) -> str:
    return text.replace("|", "\\|")
