"""Each relay under the contract."""

from collections.abc import AsyncIterator

import pytest

from meshnet.relay import Relay
from meshnet.relay.python import PythonRelay
from meshnet.relay.python.young import YOUNG_EVENTS
from tests.relay.contract import RelayContract
from tests.relay.lease_contract import LeaseContract, TunnelContract
from tests.relay.reset_contract import ResetContract


@pytest.fixture(params=[YOUNG_EVENTS, 2, 0], ids=["young", "growing-up", "grown-up"])
async def relay(request: pytest.FixtureRequest) -> AsyncIterator[Relay]:
    """In trio's thread for as long as usual, moved in the middle of things, and in a relay thread from the start."""
    async with PythonRelay(threads=1, young_events=request.param) as relay:
        yield relay


class TestPythonRelay(RelayContract):
    pass


class TestPythonRelayOnALease(LeaseContract):
    pass


class TestPythonRelayWithResets(ResetContract):
    pass


class TestPythonRelayOnATunnel(TunnelContract):
    pass
