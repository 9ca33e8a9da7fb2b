"""The native relay, for the tests of its own promises beside the contract."""

from collections.abc import AsyncIterator, Iterator

import pytest

from meshnet.relay.native import NativeRelay
from tests.relay.native.faults import Faults, watched
from tests.world import Host, World

RULES = """
table ip gate { chain out { type nat hook output priority -100;
  ip daddr 127.0.0.9 tcp dport != 0 redirect to :15101; }; }
table ip6 gate { chain out { type nat hook output priority -100;
  ip6 daddr fd09::9 tcp dport != 0 redirect to :15101; }; }
"""


@pytest.fixture
async def relay() -> AsyncIterator[NativeRelay]:
    async with NativeRelay() as native:
        yield native


@pytest.fixture
def faults() -> Iterator[Faults]:
    """In a relay that test_faults.py has built."""
    with watched() as it:
        yield it


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """Connections to 127.0.0.9 and fd09::9 are redirected here to port 15101."""
    with World() as world:
        host = world.host("gate")
        # The sanitizers that the tests may run under are not for other programs.
        host.run("ip", "addr", "add", "fd09::1/64", "dev", "lo", "nodad", LD_PRELOAD="")
        host.run("nft", "-f", "-", stdin=RULES, LD_PRELOAD="")
        yield host
