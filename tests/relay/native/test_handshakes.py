"""Handshakes on the core's own thread, beside the contract (tests/relay/handshake_contract.py)."""

import trio
import trio.testing

from meshnet.errors import Reason
from meshnet.relay.native import NativeRelay
from tests.relay.handshake_contract import fails
from tests.relay.rig import tcp_pair
from tests.world import SLOWNESS


async def test_a_relay_that_is_closed_cancels_the_handshakes_it_makes() -> None:
    socks = [tcp_pair() for _ in range(10)]
    reasons: list[Reason] = []

    with trio.fail_after(5 * SLOWNESS):  # and not by the timeout that each of them has
        async with trio.open_nursery() as nursery, NativeRelay() as relay:
            for number, (near, _) in enumerate(socks):
                nursery.start_soon(fails, relay, near, bool(number % 2), reasons)
            await trio.testing.wait_all_tasks_blocked()
    assert reasons == [Reason.TLS_HANDSHAKE] * 10
    for _, far in socks:
        far.close()
