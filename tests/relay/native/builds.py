"""The native relay built anew, beside the one that is installed: with other flags, in a copy of the tree."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from meshnet_cli.demo.sandbox import search_path

ROOT = Path(__file__).parents[3]
NATIVE = ROOT / "meshnet" / "relay" / "native"
SOURCES = sorted(NATIVE.glob("*.c"))
FUZZERS = {"frame": "fuzz_frames.c", "open": "fuzz_open.c"}
"""The targets of libFuzzer, by the file of the core that each of them is for."""
FAULTS = Path(__file__).with_name("faults.c")
CONTRACT = ["tests/relay/native", "tests/relay/test_relays.py", "-k", "native"]
CONTRACT += [f"--ignore=tests/relay/native/test_{name}.py" for name in ("sanitizers", "faults")]
"""The tests of the native relay, but for those that build it anew."""
STRICT = ["-std=gnu11", "-Wall", "-Wextra", "-Werror"]


def build(compiler: str, output: Path, *flags: str | Path) -> None:
    include = f"-I{sysconfig.get_path('include')}"
    limited = "-DPy_LIMITED_API=0x030B0000"
    run(compiler, "-shared", "-fPIC", "-O1", "-g", *STRICT, *flags, limited, include, *map(str, SOURCES), "-o", output)


def run(*command: str | Path) -> str:
    """What it prints. It has to end well."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"PATH": search_path()},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def copy(folder: Path, *flags: str | Path) -> None:
    """The tree in `folder`, its native relay built with `flags`."""
    for top in ("meshnet", "cli", "init", "tests"):
        shutil.copytree(ROOT / top, folder / top, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    build("gcc", folder / "meshnet" / "relay" / "native" / "_core.abi3.so", *flags, "-fno-omit-frame-pointer")


def with_faults() -> list[str | Path]:
    """Flags that make a native relay whose calls can be made to fail: the linker turns them to those of faults.c."""
    names = re.search(r"names\[\] = \{(.*?)\};", FAULTS.read_text(), re.DOTALL)
    assert names
    return [FAULTS, *(f"-Wl,--wrap={name}" for name in re.findall(r"\w+", names[1]))]


def start(folder: Path, *wrapper: str, tests: list[str], **environment: str) -> "subprocess.Popen[str]":
    """`tests`, pytest's arguments, in a copy of the tree; their output is a pipe."""
    command = [*wrapper, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return subprocess.Popen(
        [*command, "--timeout", "900", "--tb=short", *tests],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=folder,
        env=os.environ
        | {
            "PATH": search_path(),
            "PYTHONPATH": os.pathsep.join(str(folder / top) for top in ("", "cli", "init")),
            "PYTHONMALLOC": "malloc",  # or links and tunnels would lie in Python's own pools, where nobody looks
        }
        | environment,
    )
