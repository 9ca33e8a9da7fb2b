"""Which relay is taken, and that whoever asks is told why another is not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from meshnet.relay.ladder import best_relay
from tests.relay.native.builds import ROOT

_ASK = """
import sys, trio
from meshnet.errors import CommandError
from meshnet.relay.ladder import best_relay

async def main():
    async with best_relay(sys.argv[1], 1) as relays:
        print([relay.name for relay in relays.available], relays.missing)

try:
    trio.run(main)
except* CommandError as group:
    print(group.exceptions[0].what, group.exceptions[0].why, group.exceptions[0].fix, sep="; ")
"""


@pytest.mark.parametrize(
    ("wanted", "taken", "missing"),
    [
        ("auto", "native", {"python": "native is faster"}),
        ("native", "native", {"python": "native is faster"}),
        ("python", "python", {"native": "the settings ask for python"}),
    ],
)
async def test_the_fastest_or_the_one_that_was_asked_for(wanted: str, taken: str, missing: dict[str, str]) -> None:
    async with best_relay(wanted, 1) as relays:
        assert [relay.name for relay in relays.available] == [taken]
        assert relays.missing == missing


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("auto", "['python'] {'native': 'not built'}"),
        ("native", "the native relay was asked for and is not here; not built; install gcc"),
    ],
)
def test_where_the_core_is_not_built_it_says_so(tmp_path: Path, wanted: str, said: str) -> None:
    shutil.copytree(ROOT / "meshnet", tmp_path / "meshnet", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", _ASK, wanted],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        timeout=60,
    )
    assert done.stdout.startswith(said), (done.stdout, done.stderr)
