"""Handshakes on the core's own threads, beside the contract (tests/relay/handshake_contract.py)."""

from pathlib import Path

import pytest
import trio
import trio.testing

from meshnet.errors import Reason
from meshnet.net.python_tls import PythonChannel, PythonTls
from meshnet.net.tls import Tls
from meshnet.relay.native import NativeRelay
from tests.relay.handshake_contract import fails
from tests.relay.rig import tcp_pair, tunnel_pair
from tests.world import SLOWNESS, eventually


@pytest.mark.parametrize("who", ["client", "server"])
async def test_it_shows_its_own_certificate_and_not_the_bundle_s(relay: NativeRelay, who: str) -> None:
    """OpenSSL would look for its issuer there, and verify that chain, for each handshake: SSL_MODE_NO_AUTO_CHAIN."""
    python = PythonTls()
    pair = await (tunnel_pair(relay.tls, python) if who == "client" else tunnel_pair(python, relay.tls))
    peer = (pair.server if who == "client" else pair.client).channel
    assert isinstance(peer, PythonChannel)
    shown = peer.sock._sslobj.get_unverified_chain()  # type: ignore[attr-defined] # the socket's own is of 3.13
    pair.close()
    assert len(shown) == 1


async def test_a_certificate_that_comes_again_is_not_read_again(relay: NativeRelay) -> None:
    first, second = [await tunnel_pair(relay.tls, relay.tls) for _ in range(2)]
    for pair in (first, second):
        pair.close()
    assert first.client.channel.identity is second.client.channel.identity


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


async def test_what_others_begin_keeps_the_thread_of_our_own_handshakes_from_nothing() -> None:
    async def makes(client: Tls, server: Tls) -> list[str]:
        """The threads that were woken for some handshakes."""
        await eventually(lambda: all(asleep for _, asleep in threads().values()), what="all threads sleep")
        before = threads()
        for _ in range(3):
            (await tunnel_pair(client, server)).close()
        return sorted(name for name, (times, _) in threads().items() if times > before[name][0])

    async with NativeRelay() as relay:
        assert "handshakes" not in await makes(PythonTls(), relay.tls)
        assert "handshakes-in" not in await makes(relay.tls, PythonTls())


def threads() -> dict[str, tuple[int, bool]]:
    """How often those that make handshakes have gone to sleep, and whether they sleep: proc(5), status."""
    found: dict[str, tuple[int, bool]] = {}
    for task in Path("/proc/self/task").iterdir():
        name = (task / "comm").read_text().strip()
        if name.startswith("handshakes"):
            status = (task / "status").read_text()
            times = status.partition("\nvoluntary_ctxt_switches:")[2].split()[0]
            found[name] = int(times), "State:\tS" in status
    assert len(found) == 2, found
    return found
