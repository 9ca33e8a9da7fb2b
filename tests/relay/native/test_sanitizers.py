"""The native relay built anew with the compiler's help, and put through the contract again."""

import contextlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.relay.native import sanitizers
from tests.relay.native.builds import CONTRACT, FUZZERS, NATIVE, STRICT, build, copy, run, start

compilers = pytest.mark.parametrize("compiler", ["gcc", *(["clang"] if shutil.which("clang") else [])])


@compilers
def test_it_builds_without_a_warning(compiler: str, tmp_path: Path) -> None:
    for level in ("-O2", "-O0"):
        build(compiler, tmp_path / "_core.abi3.so", level)


@pytest.mark.timeout(300)  # it takes 80 s, and several times that where others use the machine, too
def test_the_contract_holds_under_the_sanitizers(tmp_path: Path) -> None:
    """Both at once, for most of it is waiting."""
    with contextlib.ExitStack() as stack:
        runs = {name: _start(stack, name, tmp_path / name) for name in sanitizers.FLAGS}
        outputs = {name: process.communicate()[0] for name, process in runs.items()}
    for name, output in outputs.items():
        reports = sanitizers.reports(tmp_path / name)
        ours = sanitizers.ours(reports)
        assert runs[name].returncode == 0, f"{name}: {output[-4000:]}\n{reports[:8000]}"
        assert not ours, f"{name}: {ours[:8000]}"
        assert re.search(r"\d\d+ passed", output), output


def _start(stack: contextlib.ExitStack, name: str, folder: Path) -> "subprocess.Popen[str]":
    copy(folder, *sanitizers.FLAGS[name])
    process = start(
        folder,
        # The thread sanitizer cannot place its shadow where addresses are too random.
        *(("setarch", "-R") if name == "thread" else ()),
        tests=[*CONTRACT, "-m", "not deep and not unsanitized"],
        **sanitizers.environment(name, folder),
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
