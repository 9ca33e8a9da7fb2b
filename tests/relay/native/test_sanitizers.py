"""The native relay built anew with the compiler's help, and put through the contract again."""

import contextlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.relay.native.builds import FUZZERS, NATIVE, STRICT, build, copy, run, start

SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
# What takes long and shows the sanitizers nothing new; memory is not measured where they need it.
LEFT_OUT = (
    "sanitizers or at_once or two_hundred or five_hundred or takes_about_a_second or costs_no_cpu"
    " or stuck_reader_stops or waits_a_second or never_reads or floods_a_lease or kills_the_tunnel or thousand"
    " or counters_can or slow_application or keeps_no_buffer or every_call_may_fail or far_peers or nothing_is_dropped"
    " or pipes_are_not_kept"
)
# One thread after the other: the thread sanitizer, the slower one, is spared it.
WITHOUT_THREADS = (
    " or left_behind or behind_a_stuck or fin_right_behind or is_left_open or many_sizes or piled_up or full_flow"
)

compilers = pytest.mark.parametrize("compiler", ["gcc", *(["clang"] if shutil.which("clang") else [])])


@compilers
def test_it_builds_without_a_warning(compiler: str, tmp_path: Path) -> None:
    for level in ("-O2", "-O0"):
        build(compiler, tmp_path / "_core.abi3.so", level)


@pytest.mark.timeout(300)  # it takes 50 s, and several times that where others use the machine, too
def test_the_contract_holds_under_the_sanitizers(tmp_path: Path) -> None:
    """Both at once, for most of it is waiting."""
    with contextlib.ExitStack() as stack:
        runs = {name: _start(stack, name, flags, tmp_path / name) for name, flags in SANITIZERS.items()}
        outputs = {name: process.communicate()[0] for name, process in runs.items()}
    for name, output in outputs.items():
        reports = "".join(report.read_text(errors="replace") for report in (tmp_path / name).glob("report.*"))
        ours = "\n\n".join(block for block in reports.split("\n\n") if "/meshnet/relay/native/" in block)
        assert runs[name].returncode == 0, f"{name}: {output[-4000:]}\n{reports[:8000]}"
        assert not ours, f"{name}: {ours[:8000]}"
        assert re.search(r"\d\d+ passed", output), output


def _start(stack: contextlib.ExitStack, name: str, flags: list[str], folder: Path) -> "subprocess.Popen[str]":
    copy(folder, *flags)
    runtime = "libasan.so" if name == "address" else "libtsan.so"
    log = f"log_path={folder}/report"
    process = start(
        folder,
        # The thread sanitizer cannot place its shadow where addresses are too random.
        *(("setarch", "-R") if name == "thread" else ()),
        left_out=LEFT_OUT + (WITHOUT_THREADS if name == "thread" else ""),
        LD_PRELOAD=run("gcc", f"-print-file-name={runtime}").strip(),
        # Python itself leaves much behind: only what our own code has allocated is looked at.
        ASAN_OPTIONS=f"{log}:detect_leaks=1",
        LSAN_OPTIONS="exitcode=0",
        TSAN_OPTIONS=f"{log}:report_signal_unsafe=0:history_size=4",
    )
    stack.enter_context(process)
    stack.callback(process.kill)  # should another fail first
    return process


@pytest.mark.parametrize(("parser", "rounds"), [("frame", 10_000), ("open", 300_000)])
def test_the_parsers_take_anything(parser: str, rounds: int, tmp_path: Path) -> None:
    program = tmp_path / parser
    source = Path(__file__).with_name(FUZZERS[parser])
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-DWITHOUT_LIBFUZZER"]
    run("gcc", "-O1", "-g", *STRICT, *sanitize, "-I", NATIVE, source, NATIVE / f"{parser}.c", "-o", program)
    run(program, "1", str(rounds))
