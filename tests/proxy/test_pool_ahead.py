"""Tunnels that a pool makes before a connection has to wait for one."""

import logging
import os
import signal
import time
from datetime import timedelta

import pytest
import trio
import trio.testing

from meshnet.model.address import Address
from meshnet.tunnel.client import ClientTunnel
from meshnet.tunnel.pool import Pool
from tests.proxy.conftest import Hosts
from tests.proxy.own_pool import connections, idle, issue, used, with_pool
from tests.world import eventually, stand_still

pytestmark = pytest.mark.netns

AT_ONCE = 16


class Handshakes:
    """How many a pool has made."""

    def __init__(self, pool: Pool) -> None:
        self.count = 0
        pool.on_handshake = self

    def __call__(self, milliseconds: float, resumed: bool) -> None:
        self.count += 1


async def leased(pool: Pool, address: Address, identity: str, count: int) -> list[ClientTunnel]:
    return [await pool.lease(address, identity) for _ in range(count)]


def give_back(pool: Pool, tunnels: list[ClientTunnel], *, reusable: bool = True) -> None:
    for tunnel in tunnels:
        pool.give_back(tunnel, reusable=reusable)


async def settled(pool: Pool) -> None:
    """Nothing is being made, and nobody is about to."""
    await trio.testing.wait_all_tasks_blocked()
    await eventually(lambda: pool.handshakes() == (0, 0), what="no handshake under way")
    await trio.testing.wait_all_tasks_blocked()
    assert pool.handshakes() == (0, 0)


def test_where_demand_grows_the_next_connection_finds_a_tunnel(hosts: Hosts) -> None:
    async def body(pool: Pool, address: Address, identity: str) -> None:
        tunnels = await leased(pool, address, identity, 20)
        await eventually(lambda: idle(pool) == 2)
        for _ in range(20):
            tunnel = pool.lease_idle(address, identity)
            assert tunnel is not None
            assert not tunnel.is_fresh  # nobody waited for its handshake, and it may be stale
            tunnels.append(tunnel)
            await eventually(lambda: idle(pool) >= 2)  # one takes its place
        give_back(pool, tunnels)

    with_pool(hosts, body, max_idle=8, runs=True)


def test_a_tunnel_made_ahead_carries_connections_as_any_other(hosts: Hosts) -> None:
    async def body(pool: Pool, address: Address, identity: str) -> None:
        tunnels = await leased(pool, address, identity, 12)
        await eventually(lambda: idle(pool) == 1)
        tunnel = await used(pool, address, identity)
        assert not tunnel.is_fresh
        assert tunnel not in tunnels
        assert await used(pool, address, identity) is tunnel
        give_back(pool, tunnels)

    with_pool(hosts, body, max_idle=8, runs=True)


def test_no_more_are_made_than_half_of_what_is_kept(hosts: Hosts) -> None:
    async def body(pool: Pool, address: Address, identity: str) -> None:
        handshakes = Handshakes(pool)
        tunnels = await leased(pool, address, identity, 64)
        await eventually(lambda: idle(pool) == 2)
        await settled(pool)
        assert handshakes.count == 64 + 2
        give_back(pool, tunnels)
        assert idle(pool) == 4

    with_pool(hosts, body, max_idle=4, runs=True)


def test_what_comes_back_has_a_place_and_causes_no_handshake(hosts: Hosts) -> None:
    """Far fewer are needed than a moment ago: then what is leased next is neither replaced nor closed."""

    async def body(pool: Pool, address: Address, identity: str) -> None:
        give_back(pool, await leased(pool, address, identity, 64))
        await settled(pool)
        assert idle(pool) == 8
        handshakes = Handshakes(pool)
        for _ in range(50):
            give_back(pool, await leased(pool, address, identity, 3))
        await settled(pool)
        assert (handshakes.count, idle(pool)) == (0, 8)

    with_pool(hosts, body, max_idle=8, runs=True)


def test_connections_that_wait_for_a_handshake_come_first(hosts: Hosts) -> None:
    process = hosts.sidecar(hosts.api).process
    assert process is not None

    async def body(pool: Pool, address: Address, identity: str) -> None:
        tunnels = await leased(pool, address, identity, 64)

        async def connection() -> None:
            tunnels.append(await pool.lease(address, identity, patience=100.0, timeout=lambda: 100.0))

        stand_still(process.pid)
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(2 * AT_ONCE):
                    nursery.start_soon(connection)
                await eventually(lambda: pool.handshakes() == (AT_ONCE, AT_ONCE))
                nursery.start_soon(pool.run)
                await trio.testing.wait_all_tasks_blocked()
                assert pool.handshakes() == (AT_ONCE, AT_ONCE)
                await eventually(lambda: connections(hosts) == 64 + AT_ONCE)
                os.kill(process.pid, signal.SIGCONT)
                await eventually(lambda: len(tunnels) == 64 + 2 * AT_ONCE)
                await eventually(lambda: idle(pool) > 0)
                nursery.cancel_scope.cancel()
            give_back(pool, tunnels)
        finally:
            os.kill(process.pid, signal.SIGCONT)

    with_pool(hosts, body, max_idle=8)


def test_a_renewed_certificate_has_as_many_tunnels_as_the_one_before(hosts: Hosts) -> None:
    held = [issue(hosts)]

    async def body(pool: Pool, address: Address, identity: str) -> None:
        give_back(pool, await leased(pool, address, identity, 3))
        assert idle(pool) == 3
        held.append(issue(hosts))
        pool.renew()
        assert idle(pool) == 0
        await eventually(lambda: idle(pool) == 3)
        handshakes = Handshakes(pool)
        renewed = await leased(pool, address, identity, 3)
        assert {tunnel.channel.context for tunnel in renewed} == {held[-1].client}
        assert handshakes.count == 0
        give_back(pool, renewed)

    with_pool(hosts, body, held=lambda: held[-1], max_idle=8, runs=True)


def test_a_tunnel_that_ends_soon_is_replaced_while_it_stands(hosts: Hosts) -> None:
    async def body(pool: Pool, address: Address, identity: str) -> None:
        ending = await used(pool, address, identity)
        ending.good_until = time.time() + 10
        pool.reap(ending.idle_since + 1)
        await eventually(lambda: idle(pool) == 2)
        pool.reap(ending.idle_since + 2)
        assert idle(pool) == 1
        tunnel = pool.lease_idle(address, identity)
        assert tunnel is not None
        assert tunnel is not ending
        pool.give_back(tunnel, reusable=True)

    with_pool(hosts, body, max_idle=8, runs=True)


def test_where_a_new_tunnel_would_end_as_soon_it_is_tried_only_once(hosts: Hosts) -> None:
    held = issue(hosts, timedelta(seconds=70))  # a tunnel retires a minute before

    async def body(pool: Pool, address: Address, identity: str) -> None:
        handshakes = Handshakes(pool)
        first = await used(pool, address, identity)
        for seconds in (1, 2, 3):
            pool.reap(first.idle_since + seconds)
            await settled(pool)
        assert handshakes.count == 2

    with_pool(hosts, body, held=lambda: held, max_idle=8, runs=True)


def test_nothing_is_made_for_a_peer_that_nobody_asks_for_any_more(hosts: Hosts) -> None:
    async def body(pool: Pool, address: Address, identity: str) -> None:
        tunnels = await leased(pool, address, identity, 20)
        give_back(pool, tunnels)
        await settled(pool)
        handshakes = Handshakes(pool)
        now = tunnels[-1].idle_since
        for minutes in range(1, 11):
            pool.reap(now + 60 * minutes)
        pool.renew()
        await settled(pool)
        assert handshakes.count == 0
        assert pool.counts() == {}

    with_pool(hosts, body, max_idle=8, runs=True)


def test_a_peer_that_is_away_is_not_asked_again_and_again(hosts: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "meshnet.tunnel")

    async def body(pool: Pool, address: Address, identity: str) -> None:
        tunnels = await leased(pool, address, identity, 20)
        await eventually(lambda: idle(pool) == 2)
        hosts.sidecar(hosts.api).stop()
        give_back(pool, tunnels, reusable=False)
        for seconds in (1, 2, 3):
            pool.reap(tunnels[-1].idle_since + seconds)
            await settled(pool)
        assert idle(pool) == 0
        assert [each.message for each in caplog.records if "handshake in" not in each.message] == [
            f"no tunnel to {address} ahead: {address}: Connection refused"
        ]

    with_pool(hosts, body, max_idle=8, runs=True)
    hosts.sidecar(hosts.api).start()
