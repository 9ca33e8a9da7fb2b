"""Much, counted exactly while it goes by."""

import threading

import trio

from meshnet.errors import Reason
from meshnet.relay.native import NativeRelay
from tests.relay.rig import plain_rig, read_exactly

MEGABYTE = 1 << 20


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
