"""Log levels of a process that runs: set, taken back, and gone back by themselves."""

import logging
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from meshnet.model.admin import SUBSYSTEMS, LogLevel, Refused, SetLogLevel
from meshnet.proxy.levels import LogLevels


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    yield
    for name in ("meshnet", *(f"meshnet.{each}" for each in SUBSYSTEMS)):
        logging.getLogger(name).setLevel(logging.NOTSET)


def level(levels: LogLevels, subsystem: str) -> LogLevel:
    return next(it for it in levels.told().items if it.subsystem == subsystem)


def is_heard(subsystem: str, number: int) -> bool:
    return logging.getLogger(f"meshnet.{subsystem}").isEnabledFor(number)


def test_one_for_all_leaves_alone_what_has_its_own() -> None:
    async def main() -> None:
        levels = LogLevels()
        levels.set(SetLogLevel(level="error"))
        levels.set(SetLogLevel(subsystem="tunnel", level="debug"))
        assert is_heard("tunnel", logging.DEBUG)
        assert not is_heard("proxy", logging.WARNING)
        assert level(levels, "proxy") == LogLevel(subsystem="proxy", level="error")
        assert level(levels, "tunnel") == LogLevel(subsystem="tunnel", level="debug", is_set=True)
        levels.set(SetLogLevel(subsystem="tunnel"))
        assert not is_heard("tunnel", logging.WARNING)
        levels.set(SetLogLevel())
        assert is_heard("proxy", logging.ERROR)
        assert not level(levels, "all").is_set

    trio.run(main)


def test_it_goes_back_by_itself_and_a_later_one_is_not_cut_short() -> None:
    async def main() -> None:
        levels = LogLevels()
        levels.set(SetLogLevel(subsystem="proxy", level="error", seconds=10))
        await trio.sleep(9)
        assert level(levels, "proxy").seconds_left == 1.0
        levels.set(SetLogLevel(subsystem="proxy", level="debug", seconds=10))
        await trio.sleep(9)
        assert is_heard("proxy", logging.DEBUG)
        assert list(levels.requests()) == [SetLogLevel(subsystem="proxy", level="debug", seconds=1.0)]
        await trio.sleep(2)
        assert not level(levels, "proxy").is_set
        assert not is_heard("proxy", logging.DEBUG)
        assert list(levels.requests()) == []

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_an_unknown_subsystem_is_refused_with_those_there_are() -> None:
    async def main() -> None:
        answer = LogLevels().set(SetLogLevel(subsystem="prxy", level="debug"))
        assert isinstance(answer, Refused)
        assert "tunnel" in answer.fix

    trio.run(main)
