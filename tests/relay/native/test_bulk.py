"""Much, and counted exactly."""

import hashlib
import os
import threading
import time

import trio

from meshnet.errors import Reason
from meshnet.relay.native import NativeRelay
from tests.relay.rig import mesh_rig, plain_rig, read_exactly

MEGABYTE = 1 << 20


async def test_a_quarter_of_a_gigabyte_arrives_unharmed_and_soon(relay: NativeRelay) -> None:
    size, block = 256 * MEGABYTE, os.urandom(MEGABYTE + 1)
    sent, received = hashlib.blake2b(), hashlib.blake2b()
    started = time.monotonic()
    async with mesh_rig(relay) as it, trio.open_nursery() as nursery:

        async def send() -> None:
            left = size
            while left:
                piece = block[:left]
                sent.update(piece)
                await it.client.send_all(piece)
                left -= len(piece)
            await it.client.send_eof()

        nursery.start_soon(send)
        while piece := await it.server.receive_some(MEGABYTE):
            received.update(piece)
        await it.server.send_eof()
        for run in it.runs:
            assert (await run.result()).reason is Reason.OK
            assert (run.tally.sent, run.tally.received) == (size, 0)
    assert sent.digest() == received.digest()
    assert time.monotonic() - started < 30


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
