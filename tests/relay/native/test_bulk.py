"""Much, counted exactly while it goes by."""

import contextlib
import socket
import threading

import pytest
import trio

from meshnet.errors import Reason
from meshnet.relay import PlainLeg
from meshnet.relay.native import NativeRelay
from tests.relay.rig import Rig, pipes, plain_rig, read_exactly
from tests.world import eventually

MEGABYTE = 1 << 20
MUCH = 32 * MEGABYTE
SIP = MEGABYTE // 4


async def test_counters_can_be_read_at_any_time_by_anybody(relay: NativeRelay) -> None:
    over = threading.Event()
    seen = [0]

    async with plain_rig(relay) as it, trio.open_nursery() as nursery:
        await it.client.send_all(b"x")
        assert await read_exactly(it.server, 1) == b"x"
        live = it.first._tally.live
        assert live is not None

        def watch() -> None:
            while not over.wait(0.0005):
                if (sent := live()[0]) != seen[-1]:
                    seen.append(sent)

        async def send() -> None:
            await it.client.send_all(bytes(32 * MEGABYTE))
            await it.client.send_eof()

        nursery.start_soon(trio.to_thread.run_sync, watch)
        try:
            nursery.start_soon(send)
            await read_exactly(it.server, 32 * MEGABYTE)
            await it.server.send_eof()
            assert (await it.first.result()).reason is Reason.OK
        finally:
            over.set()
        assert live()[:4] == (32 * MEGABYTE + 1, 0, True, True)  # and long after
    assert seen == sorted(seen)
    assert len(seen) > 3


@pytest.mark.unsanitized
async def test_pipes_are_not_kept_for_those_who_needed_one(relay: NativeRelay) -> None:
    """Who has the same user has a share in them, pipe(7): another worker, another pod."""
    before = pipes()
    async with contextlib.AsyncExitStack() as stack:
        rigs = [await stack.enter_async_context(plain_rig(relay, prepare=takes_little)) for _ in range(16)]
        async with trio.open_nursery() as nursery:
            for it in rigs:
                nursery.start_soon(pour, it)
            read = 0
            while pipes() - before <= 8:
                assert read < MUCH, "their sockets take less than there is, so the rest waits in pipes"
                for it in rigs:
                    await read_exactly(it.server, SIP)
                read += SIP
            for it in rigs:
                nursery.start_soon(drain, it, MUCH - read)
    await eventually(lambda: pipes() - before <= 4, what="the fewest of them")


def takes_little(it: Rig) -> None:
    leg = it.runs[0].link.endpoint
    assert isinstance(leg, PlainLeg)
    leg.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)


async def pour(it: Rig) -> None:
    await it.client.send_all(bytes(MUCH))
    await it.client.send_eof()


async def drain(it: Rig, size: int) -> None:
    await read_exactly(it.server, size)
    await it.server.send_eof()
