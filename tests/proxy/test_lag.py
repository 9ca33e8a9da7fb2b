"""The event loop's lag, and what is told of a stall, on the real clock."""

import logging
import math
import threading
from collections.abc import Callable

import pytest
import trio
import trio.testing

from meshnet.proxy.lag import LoopLag
from tests.world import eventually

STALL = 0.15


def stall_until(condition: Callable[[], object]) -> None:
    """Holds up the loop, but not the lock of Python."""
    while not condition():
        threading.Event().wait(0.001)


async def test_a_stall_is_told_while_it_goes_on_with_where_the_loop_stands(caplog: pytest.LogCaptureFixture) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(LoopLag(STALL).run)
        await trio.testing.wait_all_tasks_blocked()
        end = trio.current_time() + 10
        stall_until(lambda: caplog.records or trio.current_time() > end)
        (record,) = caplog.records
        nursery.cancel_scope.cancel()
    assert record.message.startswith("the event loop has been standing still for 0.")
    assert "in stall_until" in record.message


async def test_a_stall_is_told_once_when_it_becomes_one_and_once_with_its_length(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(LoopLag(STALL).run)
        await trio.testing.wait_all_tasks_blocked()
        end = trio.current_time() + 6 * STALL
        stall_until(lambda: trio.current_time() > end)
        await eventually(lambda: len(caplog.records) == 2)
        nursery.cancel_scope.cancel()
    became, over = caplog.records
    for record in (became, over):
        assert (record.name, record.levelno) == ("meshnet.proxy", logging.WARNING)
    assert "in stall_until" in became.message
    assert over.message.startswith("the event loop stood still for 0.")
    assert float(over.message.removesuffix(" s").rpartition(" ")[2]) >= 4 * STALL


async def test_each_stall_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(LoopLag(STALL).run)
        await trio.testing.wait_all_tasks_blocked()
        for stalls in (1, 2):
            end = trio.current_time() + 4 * STALL
            stall_until(lambda end=end: trio.current_time() > end)  # type: ignore[misc] # the default is for B023
            await eventually(lambda stalls=stalls: len(caplog.records) == 2 * stalls)  # type: ignore[misc] # as above
        nursery.cancel_scope.cancel()
    assert len(caplog.records) == 4


async def test_each_turn_is_noted_and_a_stall_with_its_length() -> None:
    noted: list[float] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(LoopLag(STALL, note=noted.append).run)
        await eventually(lambda: len(noted) >= 2)
        before = len(noted)
        end = trio.current_time() + 4 * STALL
        stall_until(lambda: trio.current_time() > end)
        await eventually(lambda: len(noted) > before)
        nursery.cancel_scope.cancel()
    assert noted[before] >= 4 * STALL


async def test_a_loop_that_has_nothing_to_do_is_left_alone() -> None:
    noted: list[float] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(LoopLag(STALL, note=noted.append).run)
        await trio.testing.wait_all_tasks_blocked()
        before = len(noted)
        await trio.sleep(10 * STALL)
        assert len(noted) <= before + 3  # of this task, and of who is late for it
        nursery.cancel_scope.cancel()


def test_a_turn_that_begins_late_is_late() -> None:
    noted: list[float] = []
    lag = LoopLag(note=noted.append)
    for due, late in ((1e-9, 1), (0.0, 0), (60.0, 0), (math.inf, 0)):
        noted.clear()
        lag.before_io_wait(due)
        noted.clear()  # how long the turn before took
        lag.after_io_wait(due)
        assert len(noted) == late


async def test_nothing_is_left_of_it() -> None:
    noted: list[float] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(LoopLag(note=noted.append).run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    before = len(noted)
    await trio.testing.wait_all_tasks_blocked()
    assert len(noted) == before


async def test_its_thread_ends_with_it() -> None:
    def watched() -> bool:
        return any(thread.name == "watchdog" for thread in threading.enumerate())

    await eventually(lambda: not watched())  # by an earlier test
    async with trio.open_nursery() as nursery:
        nursery.start_soon(LoopLag(STALL).run)
        await eventually(watched)
        nursery.cancel_scope.cancel()
    await eventually(lambda: not watched())
