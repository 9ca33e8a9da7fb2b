"""A gigabyte, byte for byte, on each relay: wrong modes of OpenSSL broke streams after 30 to 230 MB only."""

import os
from collections.abc import AsyncIterator

import pytest
import trio

from meshnet.errors import Reason
from meshnet.relay import Relay
from meshnet.relay.native import NativeRelay
from meshnet.relay.python import PythonRelay
from tests.relay.contract import RigMaker
from tests.relay.rig import mesh_rig, plain_rig

MEGABYTE = 1 << 20
SIZE = 1 << 30
BLOCK = os.urandom(MEGABYTE + 7)  # said again and again: no buffer's size divides it, so nothing fits in another place
_TWICE = BLOCK * 2


@pytest.fixture(params=["native", "python"])
async def relay(request: pytest.FixtureRequest) -> AsyncIterator[Relay]:
    async with NativeRelay() if request.param == "native" else PythonRelay(threads=1) as relay:
        yield relay


@pytest.mark.parametrize("rig", [plain_rig, mesh_rig])
async def test_a_gigabyte_arrives_unharmed(relay: Relay, rig: RigMaker) -> None:
    async with rig(relay) as it, trio.open_nursery() as nursery:

        async def send() -> None:
            for at in range(0, SIZE, len(BLOCK)):
                await it.client.send_all(memoryview(BLOCK)[: SIZE - at])
            await it.client.send_eof()

        nursery.start_soon(send)
        received = 0
        while piece := await it.server.receive_some(MEGABYTE):
            at = received % len(BLOCK)
            assert piece == _TWICE[at : at + len(piece)], f"spoilt between {received} and {received + len(piece)}"
            received += len(piece)
        assert received == SIZE
        await it.server.send_eof()
        for run in it.runs:
            assert (await run.result()).reason is Reason.OK
            assert (run.tally.sent, run.tally.received) == (SIZE, 0)
