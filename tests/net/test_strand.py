"""Strands go on where their news comes, become tasks when they need trio, and end where they wait."""

import socket

import pytest
import trio
import trio.testing

from meshnet.net.strand import Strands, Wait, in_task, on_strand


async def test_a_strand_runs_at_once_and_goes_on_within_the_call_that_brings_the_news() -> None:
    said: list[str] = []
    news = Wait()

    async def life() -> None:
        said.append("begins")
        await news
        said.append("ends")

    async with trio.open_nursery() as nursery:
        strands = Strands(nursery)
        strands.start(life())
        assert said == ["begins"]
        news.done()
        assert said == ["begins", "ends"]
        assert not strands.running
        assert not nursery.child_tasks


async def test_news_that_came_before_it_was_waited_for_are_not_missed() -> None:
    news = Wait()
    news.done()
    ended = False

    async def life() -> None:
        nonlocal ended
        await news
        ended = True

    async with trio.open_nursery() as nursery:
        Strands(nursery).start(life())
        assert ended


async def test_a_strand_that_needs_trio_becomes_a_task_and_what_it_awaits_works(
    autojump_clock: trio.testing.MockClock,
) -> None:
    said: list[str] = []

    async def life() -> None:
        assert on_strand()
        await in_task()
        assert not on_strand()
        await in_task()  # nothing, the second time
        with trio.move_on_after(1):
            await trio.sleep_forever()
        one, other = socket.socketpair()
        with one, other:
            other.send(b"x")
            await trio.lowlevel.wait_readable(one)
        said.append("slept")

    async with trio.open_nursery() as nursery:
        strands = Strands(nursery)
        strands.start(life())
        assert len(nursery.child_tasks) == 1
        assert not strands.running
    assert said == ["slept"]
    assert trio.current_time() == 1


async def test_a_task_that_was_a_strand_is_cancelled_with_its_nursery() -> None:
    ends: list[type[BaseException] | None] = []

    async def life() -> None:
        await in_task()
        try:
            await trio.sleep_forever()
        except BaseException as error:
            ends.append(type(error))
            raise

    async with trio.open_nursery() as nursery:
        Strands(nursery).start(life())
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert ends == [trio.Cancelled]


async def test_closing_ends_strands_where_they_wait_and_late_news_do_nothing() -> None:
    news = Wait()
    ends: list[str] = []

    async def life() -> None:
        try:
            await news
            ends.append("went on")
        finally:
            ends.append("closed")

    async with trio.open_nursery() as nursery:
        strands = Strands(nursery)
        strands.start(life())
        strands.close()
        news.done()
    assert ends == ["closed"]
    assert not strands.running


async def test_a_strand_may_start_another_and_each_knows_what_it_is() -> None:
    first, second = Wait(), Wait()
    said: list[str] = []

    async def inner() -> None:
        await second
        said.append(f"inner {on_strand()}")

    async with trio.open_nursery() as nursery:
        strands = Strands(nursery)

        async def outer() -> None:
            strands.start(inner())
            said.append(f"outer {on_strand()}")
            await first
            second.done()
            said.append(f"outer {on_strand()}")

        strands.start(outer())
        assert not on_strand()
        first.done()
        assert not on_strand()
    assert said == ["outer True", "inner True", "outer True"]


async def test_a_strand_that_awaits_trio_without_being_a_task_is_told_so() -> None:
    found: list[BaseException] = []

    async def life() -> None:
        try:
            await trio.lowlevel.checkpoint()
        except RuntimeError as error:
            found.append(error)

    async with trio.open_nursery() as nursery:
        Strands(nursery).start(life())
    assert len(found) == 1
    with pytest.raises(RuntimeError, match="in_task"):
        raise found[0]
