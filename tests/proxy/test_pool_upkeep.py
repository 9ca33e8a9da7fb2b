"""How a pool looks after its idle tunnels: a pool in the test's own hands, and a real sidecar at the other end."""

import os
import signal
import ssl
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import pytest
import trio

from meshnet.codec.frames import Open
from meshnet.errors import ConnectionFailed, Reason
from meshnet.model.address import Address
from meshnet.model.settings import ProxySection
from meshnet.net.python_tls import PythonChannel, PythonTls
from meshnet.tunnel.client import ClientTunnel
from meshnet.tunnel.pool import Pool
from tests.proxy.conftest import Hosts
from tests.proxy.peer import TUNNEL_PORT, credentials

pytestmark = pytest.mark.netns

IDLE_TIMEOUT, MAX_IDLE = 300.0, 2

Body = Callable[[Pool, Address, str], Awaitable[None]]


def with_pool(hosts: Hosts, body: Body, *, ttl: timedelta = timedelta(hours=1)) -> None:
    """Runs `body` on `web` with a pool and who is to be called: the sidecar of `api`."""
    issued = hosts.mesh.authority.issue(hosts.mesh.identity("web"), now=datetime.now(UTC), ttl=ttl)
    held = credentials(issued)
    address, identity = Address(hosts.api.address, TUNNEL_PORT), hosts.mesh.identity("api")

    async def run() -> None:
        pool = Pool(lambda: held, PythonTls(), mark=ProxySection().mark, idle_timeout=IDLE_TIMEOUT, max_idle=MAX_IDLE)
        try:
            await body(pool, address, identity)
        finally:
            pool.close_idle()

    with hosts.web.entered():
        trio.run(run)


async def used(pool: Pool, address: Address, identity: str, port: int = 4) -> ClientTunnel:
    """A tunnel that has had a lease, which the peer refused, and is idle in the pool again."""
    tunnel = await pool.lease(address, identity)
    with pytest.raises(ConnectionFailed):
        await tunnel.open(Open(host=address.host, port=port), b"", 5.0)
    pool.give_back(tunnel, reusable=tunnel.wire.idle)
    return tunnel


def python_socket(tunnel: ClientTunnel) -> ssl.SSLSocket:
    assert isinstance(tunnel.channel, PythonChannel)
    return tunnel.channel.sock


def idle(pool: Pool) -> int:
    return sum(count for count, _ in pool.counts().values())


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
        os.kill(process.pid, signal.SIGSTOP)
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

    with_pool(hosts, body, ttl=timedelta(seconds=50))


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
        os.kill(process.pid, signal.SIGSTOP)
        try:
            with trio.move_on_after(0.05) as patience:
                await pool.lease(address, identity)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        assert patience.cancelled_caught
        assert pool.counts() == {}
        assert len(os.listdir("/proc/self/fd")) == before

    with_pool(hosts, body)
