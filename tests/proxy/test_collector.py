"""Python's garbage collector in a sidecar: what was there when it began to serve is not looked at again."""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.world import Mesh, World

pytestmark = pytest.mark.netns

# Python imports it before anything else: site(1).
TELLS = """
import atexit, gc
atexit.register(lambda: print("at its end:", gc.get_freeze_count(), "frozen,", gc.get_threshold()[0], flush=True))
"""


def test_a_sidecar_freezes_what_it_has_made_before_it_serves(world: World, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(TELLS)
    sidecar = Mesh(world).sidecar(world.host("web"), start=False)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    sidecar.spawn(by=("env", f"PYTHONPATH={path}"))
    sidecar.wait_until_ready()
    assert sidecar.stop() == 0
    assert sidecar.process is not None
    found = re.search(r"at its end: (\d+) frozen, (\d+)", sidecar.process.output)
    assert found is not None, sidecar.process.output
    frozen, threshold = map(int, found.groups())
    assert frozen > 10_000  # modules, functions, the state of the sidecar
    assert threshold > 700  # that of an interpreter without any setting
