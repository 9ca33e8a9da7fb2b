"""The native relay, for the tests of its own promises beside the contract."""

from collections.abc import AsyncIterator

import pytest

from meshnet.relay.native import NativeRelay


@pytest.fixture
async def relay() -> AsyncIterator[NativeRelay]:
    async with NativeRelay() as native:
        yield native
