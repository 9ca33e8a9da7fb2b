"""Turns at handshakes: how many, and whose."""

import pytest
import trio
import trio.testing

from meshnet.errors import ConnectionFailed, Reason
from meshnet.model.address import Address
from meshnet.tunnel.client import ClientTunnel, Key
from meshnet.tunnel.turns import Turns

ONE: Key = (Address("10.0.0.1", 15108), "spiffe://mesh.example/ns/default/sa/one")
OTHER: Key = (Address("10.0.0.2", 15108), "spiffe://mesh.example/ns/default/sa/other")


def nobody_s(tunnel: ClientTunnel) -> None:
    raise AssertionError("no tunnel was offered")


async def test_what_nobody_waits_for_leaves_half_of_them_to_others() -> None:
    turns = Turns(4, nobody_s)
    assert [turns.take_if_idle() for _ in range(4)] == [True, True, False, False]
    assert turns.taken == 2
    assert await turns.wait(ONE, 0.0) is None
    turns.end()
    turns.end()
    assert turns.take_if_idle()


async def test_the_peers_take_turns_and_within_each_it_is_first_come_first_served() -> None:
    turns = Turns(1, nobody_s)
    served: list[str] = []

    async def wait(key: Key, name: str) -> None:
        await turns.wait(key, 100.0)
        served.append(name)
        turns.end()

    await turns.wait(ONE, 0.0)
    async with trio.open_nursery() as nursery:
        for key, name in ((ONE, "a1"), (ONE, "a2"), (ONE, "a3"), (OTHER, "b1"), (OTHER, "b2")):
            nursery.start_soon(wait, key, name)
            await trio.testing.wait_all_tasks_blocked()
        assert (turns.taken, turns.waiting) == (1, 5)
        turns.end()
    assert served == ["a1", "b1", "a2", "b2", "a3"]
    assert (turns.taken, turns.waiting) == (0, 0)


async def test_who_waits_too_long_gives_up_and_leaves_the_turn_to_the_next(
    autojump_clock: trio.testing.MockClock,
) -> None:
    turns = Turns(1, nobody_s)
    await turns.wait(ONE, 0.0)
    with pytest.raises(ConnectionFailed) as failed:
        await turns.wait(ONE, 5.0)
    assert failed.value.reason is Reason.LIMIT_QUEUE_TIMEOUT
    assert turns.waiting == 0
    turns.end()
    assert turns.taken == 0


async def test_a_turn_that_comes_to_who_has_gone_goes_on_to_the_next() -> None:
    turns = Turns(1, nobody_s)
    await turns.wait(ONE, 0.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.wait, ONE, 100.0)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        turns.end()  # the turn is the waiter's, who does not know yet that it is cancelled
    assert turns.taken == 0
