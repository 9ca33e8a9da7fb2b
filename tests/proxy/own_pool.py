"""A pool in the test's own hands, on `web`, and a real sidecar at the other end."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio

from meshnet.codec.frames import Open
from meshnet.errors import ConnectionFailed
from meshnet.model.address import Address
from meshnet.model.settings import ProxySection
from meshnet.net import tls
from meshnet.net.python_tls import PythonTls
from meshnet.tunnel.client import ClientTunnel
from meshnet.tunnel.pool import Pool
from tests.proxy.conftest import Hosts
from tests.proxy.peer import TUNNEL_PORT, credentials

IDLE_TIMEOUT, MAX_IDLE = 300.0, 2

Body = Callable[[Pool, Address, str], Awaitable[None]]


def issue(hosts: Hosts, ttl: timedelta = timedelta(hours=1)) -> tls.Credentials:
    """Those of `web`, new."""
    return credentials(hosts.mesh.authority.issue(hosts.mesh.identity("web"), now=datetime.now(UTC), ttl=ttl))


def with_pool(
    hosts: Hosts,
    body: Body,
    *,
    held: Callable[[], tls.Credentials] | None = None,
    max_idle: int = MAX_IDLE,
    runs: bool = False,
) -> None:
    """Runs `body` on `web` with a pool and who is to be called: the sidecar of `api`.

    `held`: the credentials of the moment. `runs`: the pool is not only looked after by the body.
    """
    usual = issue(hosts)
    address, identity = Address(hosts.api.address, TUNNEL_PORT), hosts.mesh.identity("api")

    async def run() -> None:
        pool = Pool(
            held or (lambda: usual),
            PythonTls(),
            mark=ProxySection().mark,
            idle_timeout=IDLE_TIMEOUT,
            max_idle=max_idle,
        )
        try:
            async with trio.open_nursery() as nursery:
                if runs:
                    nursery.start_soon(pool.run)
                await body(pool, address, identity)
                nursery.cancel_scope.cancel()
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


def idle(pool: Pool) -> int:
    return sum(count for count, _ in pool.counts().values())


def connections(hosts: Hosts) -> int:
    """TCP connections between `web` and the tunnel port of `api`."""
    with hosts.web.entered():
        lines = Path("/proc/thread-self/net/tcp").read_text().splitlines()
    return sum(f":{TUNNEL_PORT:04X} 01 " in line for line in lines)
