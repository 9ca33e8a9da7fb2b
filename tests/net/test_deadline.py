"""A deadline wakes whoever waits for the socket; one that was taken back does nothing."""

import socket
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import trio
import trio.testing

from meshnet.net.deadline import Deadlines

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    made = [socket.socketpair() for _ in range(3)]
    for ours, _ in made:
        ours.setblocking(False)
    yield made
    for pair in made:
        for sock in pair:
            sock.close()


def shutter(sock: socket.socket) -> Callable[[], None]:
    return partial(sock.shutdown, socket.SHUT_RDWR)


async def test_a_wait_ends_when_its_deadline_passes(pairs: list[Pair], autojump_clock: trio.testing.MockClock) -> None:
    deadlines, began = Deadlines(), trio.current_time()
    sock = pairs[0][0]
    deadline = deadlines.set(shutter(sock), 5.0)
    await trio.lowlevel.wait_readable(sock)
    assert sock.recv(1) == b""
    assert deadline.passed
    assert trio.current_time() - began == pytest.approx(5.0)


async def test_a_deadline_that_was_taken_back_leaves_the_socket_alone(
    pairs: list[Pair], autojump_clock: trio.testing.MockClock
) -> None:
    deadlines = Deadlines()
    ours, theirs = pairs[0]
    deadline = deadlines.set(shutter(ours), 5.0)
    deadline.done()
    await trio.sleep(10)
    assert not deadline.passed
    theirs.send(b"x")
    assert ours.recv(1) == b"x"


async def test_each_passes_in_its_time_in_whatever_order_they_were_set(
    pairs: list[Pair], autojump_clock: trio.testing.MockClock
) -> None:
    deadlines, began = Deadlines(), trio.current_time()
    passed: list[float] = []

    async def wait(sock: socket.socket) -> None:
        await trio.lowlevel.wait_readable(sock)
        passed.append(round(trio.current_time() - began, 3))

    async with trio.open_nursery() as nursery:
        for (sock, _), seconds in zip(pairs, (5.0, 1.0, 3.0), strict=True):
            deadlines.set(shutter(sock), seconds)
            nursery.start_soon(wait, sock)
            await trio.testing.wait_all_tasks_blocked()
    assert passed == [1.0, 3.0, 5.0]


async def test_deadlines_can_be_set_again_when_none_was_left(
    pairs: list[Pair], autojump_clock: trio.testing.MockClock
) -> None:
    deadlines = Deadlines()
    for sock, _ in pairs:
        deadlines.set(shutter(sock), 1.0)
        await trio.lowlevel.wait_readable(sock)
        await trio.sleep(10)
        assert sock.recv(1) == b""


async def test_a_socket_whose_peer_is_gone_does_not_disturb_the_others(
    pairs: list[Pair], autojump_clock: trio.testing.MockClock
) -> None:
    deadlines = Deadlines()
    gone, sock = pairs[0][0], pairs[1][0]
    deadlines.set(shutter(gone), 1.0)
    deadlines.set(shutter(sock), 2.0)
    gone.close()
    await trio.lowlevel.wait_readable(sock)
    assert sock.recv(1) == b""
