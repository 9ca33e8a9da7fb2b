"""Descriptors that the core closes on its own threads, or when Python's objects are freed."""

import contextlib
import gc
from collections.abc import AsyncIterator

from tests.relay.rig import descriptors
from tests.world import eventually


@contextlib.asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """No descriptor, once trio's tasks had their turn."""
    gc.collect()  # of the tests before
    before = descriptors()
    yield

    def closed() -> bool:
        gc.collect()  # a Link refers to itself by its `abort`, and keeps its core's last descriptor
        return descriptors() == before

    await eventually(closed, what="every descriptor closed")
