"""How a pool looks after its idle tunnels: a pool in the test's own hands, and a real sidecar at the other end."""

import os
import signal
import ssl
import time
from datetime import timedelta

import pytest
import trio
import trio.testing

from meshnet.errors import ConnectionFailed, Reason
from meshnet.model.address import Address
from meshnet.net.python_tls import PythonChannel
from meshnet.tunnel.client import ClientTunnel
from meshnet.tunnel.pool import Pool
from tests.proxy.conftest import Hosts
from tests.proxy.own_pool import IDLE_TIMEOUT, MAX_IDLE, connections, idle, issue, used, with_pool
from tests.proxy.peer import TUNNEL_PORT
from tests.world import eventually, stand_still

pytestmark = pytest.mark.netns


def python_socket(tunnel: ClientTunnel) -> ssl.SSLSocket:
    assert isinstance(tunnel.channel, PythonChannel)
    return tunnel.channel.sock


def test_a_tunnel_that_was_idle_too_long_is_closed(hosts: Hosts) -> None:
    async def body(pool: Pool, address: Address, identity: str) -> None:
        tunnel = await used(pool, address, identity)
        pool.reap(tunnel.idle_since + 1)
        assert idle(pool) == 1
        pool.reap(tunnel.idle_since + IDLE_TIMEOUT + 1)
        assert idle(pool) == 0

    with_pool(hosts, body)


def test_a_tunnel_that_answers_its_ping_is_kept(hosts: Hosts) -> None:
    async def body(pool: Pool, address: Address, identity: str) -> None:
        tunnel = await used(pool, address, identity)
        for seconds in (31, 36, 41):
            pool.reap(tunnel.idle_since + seconds)
            assert idle(pool) == 1
            with trio.fail_after(5):
                await trio.lowlevel.wait_readable(python_socket(tunnel))  # the PONG

    with_pool(hosts, body)


def test_a_tunnel_that_does_not_answer_its_ping_is_closed(hosts: Hosts) -> None:
    process = hosts.sidecar(hosts.api).process
    assert process is not None

    async def body(pool: Pool, address: Address, identity: str) -> None:
        tunnel = await used(pool, address, identity)
        stand_still(process.pid)
        try:
            pool.reap(tunnel.idle_since + 31)
            assert idle(pool) == 1
            pool.reap(tunnel.idle_since + 36)
            assert idle(pool) == 0
        finally:
            os.kill(process.pid, signal.SIGCONT)

    with_pool(hosts, body)


def test_a_lease_that_overtakes_the_answer_to_a_ping_does_not_cost_the_tunnel(hosts: Hosts) -> None:
    async def body(pool: Pool, address: Address, identity: str) -> None:
        tunnel = await used(pool, address, identity)
        pool.reap(tunnel.idle_since + 31)
        assert await used(pool, address, identity) is tunnel
        pool.reap(tunnel.idle_since + 31)
        assert idle(pool) == 1

    with_pool(hosts, body)


def test_no_more_tunnels_are_kept_than_asked_for(hosts: Hosts) -> None:
    async def body(pool: Pool, address: Address, identity: str) -> None:
        tunnels = [await pool.lease(address, identity) for _ in range(MAX_IDLE + 1)]
        assert pool.counts() == {(address, identity): (0, MAX_IDLE + 1)}
        for tunnel in tunnels:
            pool.give_back(tunnel, reusable=True)
        assert pool.counts() == {(address, identity): (MAX_IDLE, 0)}

    with_pool(hosts, body)


def test_a_tunnel_is_not_used_again_in_the_last_minute_of_its_certificate(hosts: Hosts) -> None:
    async def body(pool: Pool, address: Address, identity: str) -> None:
        first = await used(pool, address, identity)
        assert first.good_until < time.time()
        assert idle(pool) == 0

    held = issue(hosts, timedelta(seconds=50))
    with_pool(hosts, body, held=lambda: held)


def test_a_tunnel_belongs_to_one_identity(hosts: Hosts) -> None:
    async def body(pool: Pool, address: Address, identity: str) -> None:
        await used(pool, address, identity)
        with pytest.raises(ConnectionFailed) as failed:
            await pool.lease(address, hosts.mesh.identity("somebody-else"))
        assert failed.value.reason is Reason.TLS_PEER_IDENTITY
        assert idle(pool) == 1

    with_pool(hosts, body)


def test_a_lease_that_is_cancelled_within_its_handshake_leaves_nothing(hosts: Hosts) -> None:
    process = hosts.sidecar(hosts.api).process
    assert process is not None

    async def body(pool: Pool, address: Address, identity: str) -> None:
        before = len(os.listdir("/proc/self/fd"))
        stand_still(process.pid)
        try:
            with trio.move_on_after(0.05) as patience:
                await pool.lease(address, identity)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        assert patience.cancelled_caught
        assert pool.counts() == {}
        assert len(os.listdir("/proc/self/fd")) == before

    with_pool(hosts, body)


BURST, AT_ONCE = 2000, 16


@pytest.mark.parametrize("all_at_once", [False, True])
def test_a_burst_to_a_cold_peer_makes_few_handshakes_at_once_and_serves_all(hosts: Hosts, all_at_once: bool) -> None:
    process = hosts.sidecar(hosts.api).process
    assert process is not None

    async def body(pool: Pool, address: Address, identity: str) -> None:
        handshakes = 0
        asked: list[int] = []
        served: list[int] = []
        everybody = trio.Event()

        def count(milliseconds: float, resumed: bool) -> None:
            nonlocal handshakes
            handshakes += 1

        async def connection(number: int) -> None:
            asked.append(number)
            tunnel = await pool.lease(address, identity, patience=100.0, timeout=lambda: 100.0)
            served.append(number)
            if len(served) == BURST:
                everybody.set()
            if all_at_once:
                await everybody.wait()
            pool.give_back(tunnel, reusable=True)

        pool.on_handshake = count
        stand_still(process.pid)
        try:
            async with trio.open_nursery() as nursery:
                for number in range(BURST):
                    nursery.start_soon(connection, number)
                await eventually(lambda: connections(hosts) == AT_ONCE)
                await trio.testing.wait_all_tasks_blocked()
                assert connections(hosts) == AT_ONCE
                os.kill(process.pid, signal.SIGCONT)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        assert sorted(served) == sorted(asked) == list(range(BURST))
        if all_at_once:
            assert handshakes == BURST
            turns = {number: turn for turn, number in enumerate(asked)}
            # First come, first served, but for how long a handshake takes and how trio mixes tasks that wake at once.
            assert max(abs(turns[number] - turn) for turn, number in enumerate(served)) <= 4 * AT_ONCE
        else:
            assert AT_ONCE <= handshakes <= BURST / 2  # a tunnel that comes back goes to who waits
        assert pool.counts() == {(address, identity): (MAX_IDLE, 0)}

    with_pool(hosts, body)


def test_who_waits_for_one_peer_is_not_held_up_by_a_burst_to_another(hosts: Hosts) -> None:
    process = hosts.sidecar(hosts.api).process
    assert process is not None
    other, name = Address(hosts.twin.address, TUNNEL_PORT), hosts.mesh.identity("twin")

    async def body(pool: Pool, address: Address, identity: str) -> None:
        served: list[str] = []

        async def connection(peer: Address, identity: str, who: str) -> None:
            tunnel = await pool.lease(peer, identity, patience=100.0, timeout=lambda: 100.0)
            served.append(who)
            pool.give_back(tunnel, reusable=False)

        stand_still(process.pid)
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(10 * AT_ONCE):
                    nursery.start_soon(connection, address, identity, "burst")
                await eventually(lambda: connections(hosts) == AT_ONCE)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(connection, other, name, "single")
                await trio.testing.wait_all_tasks_blocked()
                os.kill(process.pid, signal.SIGCONT)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        assert served.index("single") < 4 * AT_ONCE

    with_pool(hosts, body)


def test_tunnels_of_a_burst_are_kept_while_they_may_be_needed_again_and_then_let_go(hosts: Hosts) -> None:
    async def body(pool: Pool, address: Address, identity: str) -> None:
        tunnels = [await pool.lease(address, identity) for _ in range(8)]
        for tunnel in tunnels:
            pool.give_back(tunnel, reusable=True)
        now = tunnels[-1].idle_since
        kept = [idle(pool)]
        for seconds in range(5, 30, 5):
            pool.reap(now + seconds)
            kept.append(idle(pool))
        assert kept == [8, 7, 6, 6, 5, 4]
        pool.reap(now + 240)
        assert idle(pool) == 1

    with_pool(hosts, body, max_idle=8)
