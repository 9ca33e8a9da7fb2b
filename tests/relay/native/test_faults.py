"""The native relay's calls counted and made to fail: faulty*.py, each in a process of its own, under sanitizers.

So what the relay does when a call fails touches no memory that is not its own, and leaves none behind.
"""

import re
from pathlib import Path

import pytest

from tests.relay.native import sanitizers
from tests.relay.native.builds import copy, start, with_faults

pytestmark = pytest.mark.netns


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    copy(folder, *sanitizers.FLAGS["address"], *with_faults())
    return folder


@pytest.mark.timeout(300)  # each takes 15 to 30 s, and several times that where others use the machine, too
@pytest.mark.parametrize("file", ["faulty.py", "faulty_doors.py", "faulty_tunnels.py"])
def test_every_call_may_fail(tree: Path, tmp_path: Path, file: str) -> None:
    environment = sanitizers.environment("address", tmp_path)
    with start(tree, tests=[f"tests/relay/native/{file}"], **environment) as process:
        output = process.communicate()[0]
    reports = sanitizers.reports(tmp_path)
    assert process.returncode == 0, f"{output[-8000:]}\n{reports[:8000]}"
    assert not sanitizers.ours(reports), sanitizers.ours(reports)[:8000]
    assert re.search(r"^\d\d+ passed in", output, re.MULTILINE), output  # and none was skipped
