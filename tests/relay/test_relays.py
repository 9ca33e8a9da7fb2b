"""Each relay under the contract."""

from collections.abc import AsyncIterator

import pytest

from meshnet.relay import Relay
from meshnet.relay.native import NativeRelay
from meshnet.relay.python import PythonRelay
from meshnet.relay.python.young import YOUNG_EVENTS
from tests.relay.contract import QUIET, RelayContract
from tests.relay.handshake_contract import HandshakeContract
from tests.relay.lease_contract import LeaseContract, TunnelContract
from tests.relay.reset_contract import ResetContract

# The Python relay: in trio's thread for as long as usual, moved in the middle of things, in a thread from the start.
_PYTHON = {"young": YOUNG_EVENTS, "growing-up": 2, "grown-up": 0}


@pytest.fixture(params=["native", *_PYTHON])
async def relay(request: pytest.FixtureRequest) -> AsyncIterator[Relay]:
    if request.param == "native":
        async with NativeRelay(silence=QUIET) as native:
            yield native
    else:
        async with PythonRelay(threads=1, young_events=_PYTHON[request.param], silence=QUIET) as python:
            yield python


class TestARelay(RelayContract):
    pass


class TestARelayOnALease(LeaseContract):
    pass


class TestARelayWithResets(ResetContract):
    pass


class TestARelayOnATunnel(TunnelContract):
    pass


class TestARelaysHandshakes(HandshakeContract):
    pass
