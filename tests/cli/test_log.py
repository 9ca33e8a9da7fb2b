import json
import re
from pathlib import Path

import pytest

from meshnet.model.admin import SUBSYSTEMS, ListLogLevels, LogLevel, LogLevelList, SetLogLevel
from tests.cli.conftest import Meshnet
from tests.cli.sidecar import ROOT, Sidecar

LEVELS = LogLevelList(
    items=(
        LogLevel(subsystem="all", level="info"),
        LogLevel(subsystem="tunnel", level="debug", is_set=True, seconds_left=590.0),
    )
)


@pytest.fixture(autouse=True)
def levels(sidecar: Sidecar) -> None:
    sidecar.will_answer(LEVELS)


def test_without_a_level_they_are_shown(meshnet: Meshnet, sidecar: Sidecar) -> None:
    result = meshnet("log", "level")
    assert sidecar.asked() == ListLogLevels()
    assert result.output == "SUBSYSTEM  LEVEL  BACK_IN\nall        info   -\ntunnel     debug  9m50s\n"
    told = json.loads(meshnet("log", "level", "-o", "json").output)
    assert (told["kind"], told["items"][1]["secondsLeft"]) == ("LogLevelList", 590.0)


@pytest.mark.parametrize(
    ("words", "requests"),
    [
        ("debug", [SetLogLevel(level="debug")]),
        ("tunnel=debug --for 10m", [SetLogLevel(subsystem="tunnel", level="debug", seconds=600.0)]),
        ("default proxy=error", [SetLogLevel(), SetLogLevel(subsystem="proxy", level="error")]),
        ("proxy=default info --for 1s", [SetLogLevel(subsystem="proxy"), SetLogLevel(level="info", seconds=1.0)]),
    ],
)
def test_what_is_asked_for(meshnet: Meshnet, sidecar: Sidecar, words: str, requests: list[SetLogLevel]) -> None:
    assert meshnet("log", "level", *words.split()).exit_code == 0
    assert [sidecar.asked() for _ in requests] == requests
    assert sidecar.requests.empty()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("loud", "'loud' is not one of debug, info, warning, error, default"),
        ("prxy=debug", "'prxy' is not one of access, admin"),
        ("=debug", "'' is not one of access, admin"),
        ("--for 10m", "--for goes with a level"),
        ("debug --for 0s", "--for 0s is no time"),
        ("proxy=default --for 10m", "--for goes with a level"),
    ],
)
def test_wrong_words_are_a_usage_error(meshnet: Meshnet, sidecar: Sidecar, words: str, said: str) -> None:
    result = meshnet("log", "level", *words.split())
    assert result.exit_code == 2
    assert said in result.stderr
    assert sidecar.requests.empty()


def test_the_subsystems_are_those_that_log() -> None:
    sources = [file.read_text() for file in sorted(Path(ROOT / "meshnet").rglob("*.py"))]
    named = {name for source in sources for name in re.findall(r'getLogger\("meshnet\.(\w+)"\)', source)}
    assert named == set(SUBSYSTEMS)
