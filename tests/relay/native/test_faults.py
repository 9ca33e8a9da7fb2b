"""The native relay as it is installed, its calls counted and made to fail: faulty*.py, each in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.relay.native.builds import ROOT, STRICT, run

pytestmark = pytest.mark.netns
HERE = Path(__file__).parent


@pytest.mark.timeout(300)  # each takes 10 to 20 s, and several times that where others use the machine, too
@pytest.mark.parametrize("file", ["faulty.py", "faulty_doors.py", "faulty_tunnels.py"])
def test_every_call_may_fail(tmp_path: Path, file: str) -> None:
    shim = tmp_path / "faults.so"
    run("gcc", "-shared", "-fPIC", "-O1", *STRICT, HERE / "faults.c", "-o", shim)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", HERE / file],
        capture_output=True,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=os.environ | {"LD_PRELOAD": str(shim), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"^\d\d+ passed in", done.stdout, re.MULTILINE), done.stdout  # and none was skipped
