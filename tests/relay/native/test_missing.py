"""What is said of a core that is there and cannot be loaded. That it is not there: tests/cli/test_without_core.py."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.relay.native.builds import ROOT


def test_a_core_that_is_built_for_another_machine_is_named(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "meshnet", tmp_path / "meshnet", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    core = tmp_path / "meshnet" / "relay" / "native" / "_core.abi3.so"
    core.write_bytes(bytes(100))
    look = "from meshnet.relay.native import MISSING; print(*MISSING, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", look], cwd=tmp_path, capture_output=True, text=True, check=True)
    why, fix = done.stdout.splitlines()
    assert why.startswith(f"built, but not for this machine: {core}: ")
    assert fix == "install meshnet again, on this machine"
