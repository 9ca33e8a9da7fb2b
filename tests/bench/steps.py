"""What a unit of work costs by step: the system call that a sample of the clock fell into, or the thread's own code."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.bench.tools import Drive, cpu_seconds, find_program, missing, while_loaded

STEPS = {
    "accept": "accept4 accept",
    "ask and set (original destination, options)": "getsockopt setsockopt getsockname getpeername",
    "dial": "socket connect bind",
    "receive": "recvfrom recvmsg read readv splice",
    "send": "sendto sendmsg",
    "write (the log's lines, waking a thread)": "write writev",
    "wait and watch": "epoll_wait epoll_pwait epoll_pwait2 epoll_ctl futex poll ppoll",
    "close": "close shutdown",
}
_STEP_OF = {call: step for step, calls in STEPS.items() for call in calls.split()}
_OTHER_CALL = "other system calls"
_KERNEL = "the kernel outside of a call (entry, interrupts, switches)"
_OWN = "its own code"
_ENTRY = re.compile(r"__(?:x64|arm64|ia32|se|do)_sys_(\w+)")
_FROM_KERNEL = re.compile(r"\[k\w*|vmlinux|\[guest\.kernel")


def steps(pids: Sequence[int], seconds: float, directory: Path, drive: Drive, unit: str) -> Sequence[str]:
    """Samples of perf with their kernel stacks, as microseconds of the CPU time that /proc tells for the same load."""
    program = find_program("perf")
    if not program:
        return [missing("perf", "apt-get install linux-perf")]
    data = directory / "steps.data"
    what = ("-e", "cpu-clock", "-F", "1999", "-g", "-o", str(data), "-p", ",".join(map(str, pids)))
    spent, units = cpu_seconds(pids), 0.0

    def counted(for_seconds: float) -> float:
        nonlocal units
        units = drive(for_seconds)
        return units

    said = while_loaded([[program, "record", *what, "--", "sleep", str(seconds)]], seconds, counted)
    each = (cpu_seconds(pids) - spent) / units * 1e6
    shown = subprocess.run(
        [program, "script", "-F", "comm,ip,sym,dso", "-i", str(data)], capture_output=True, text=True
    )
    seen = by_step(shown.stdout.split("\n\n"))
    if not seen:
        return [f"perf saw nothing: {said or shown.stderr}"]
    return table(seen, each, unit)


def by_step(samples: Iterable[str]) -> Counter[tuple[str, str]]:
    """How many samples fell into each thread's steps. One is the thread's name, then its stack from the inside out."""
    found = Counter[tuple[str, str]]()
    for sample in samples:
        thread, *stack = [line.strip() for line in sample.strip().splitlines()] or [""]
        if stack:
            found[thread, _step(stack)] += 1
    return found


def _step(stack: Sequence[str]) -> str:
    entered = next((entry[1] for frame in stack if (entry := _ENTRY.search(frame))), "")
    if entered:
        return _STEP_OF.get(entered, _OTHER_CALL)
    return _KERNEL if _FROM_KERNEL.search(stack[0]) else _OWN


def table(seen: Counter[tuple[str, str]], each: float, unit: str) -> list[str]:
    """`each`: microseconds of a unit, all in all."""
    threads = Counter[str]()
    for (thread, _), count in seen.items():
        threads[thread] += count
    total = threads.total()
    rows = []
    for thread, count in threads.most_common():
        rows.append(f"| **{thread}** | | **{count / total * each:.1f}** |")
        mine = Counter({step: number for (name, step), number in seen.items() if name == thread})
        rows += [f"| | {step} | {number / total * each:.1f} |" for step, number in mine.most_common()]
    head = [f"{total} samples, {each:.1f} us/{unit} while perf looked.\n", f"| thread | step | us/{unit} |"]
    return [*head, "|---|---|---|", *rows]
