"""Tunnels of a simulated mesh. In memory are TCP and TLS alone: the protocol and both sidecars' part in it are real."""

import math
from types import SimpleNamespace
from typing import Any, cast

import trio

from meshnet.errors import TunnelError
from meshnet.model.address import Address
from meshnet.net.deadline import Deadlines
from meshnet.tunnel.client import ClientTunnel, Key
from meshnet.tunnel.protocol import Role, Tunnel
from tests.simulation.network import ROUND_TRIP, Network

IDENTITY = "spiffe://local/ns/default/sa/x"
CREDENTIALS: Any = SimpleNamespace(identity=IDENTITY, server=None, client=None, authorities=b"ours", not_after=math.inf)


class Channel:
    """One end of two. What is sent has arrived; what had arrived before an end is read before it."""

    context = ticket = None
    identity, good_until = IDENTITY, math.inf
    version, cipher, resumed = "TLSv1.3", "simulated", False

    def __init__(self) -> None:
        self.far: Channel
        self._arrived = bytearray()
        self._is_over = False
        self._news = trio.Event()

    async def send_all(self, data: bytes) -> None:
        self.send_now(data)
        await trio.lowlevel.checkpoint()

    def send_now(self, data: bytes) -> None:
        if self._is_over or self.far._is_over:
            raise BrokenPipeError("simulated")
        self.far._arrived += data
        self.far._news.set()

    async def receive(self) -> bytes:
        while (data := self.receive_now()) is None:
            self._news = trio.Event()
            await self._news.wait()
        return data

    def receive_now(self) -> bytes | None:
        if not self._arrived:
            return b"" if self._is_over else None
        data = bytes(self._arrived)
        self._arrived.clear()
        return data

    def serve(self, _host: str) -> None:
        """Nothing here goes by orders."""

    def stop_serving(self, _host: str) -> None:
        pass

    def last_ends(self) -> tuple[str, str]:
        return "", ""

    def shut(self) -> None:
        self._is_over = True
        self._news.set()

    def close(self) -> None:
        self.shut()
        self.far.shut()


class Tls:
    """Where a served tunnel's handshake would be. Who it is was judged by who dialled."""

    async def accept(self, plain: Channel, _context: object, _timeout: float) -> Channel:
        return plain


class Pool:
    """Keeps every tunnel that can be used again. `lease` is where a peer's certificate is judged."""

    def __init__(self, network: Network) -> None:
        self.leased = 0
        self._network = network
        self._idle: dict[Key, list[ClientTunnel]] = {}
        self._deadlines = Deadlines()

    def lease_idle(self, address: Address, identity: str) -> ClientTunnel | None:
        kept = self._idle.get((address, identity), [])
        while kept:
            tunnel = kept.pop()
            if _is_well(tunnel):
                self._network.is_let_through(Address(address.host, 80))
                self.leased += 1
                return tunnel
            tunnel.channel.close()
        return None

    async def lease(self, address: Address, identity: str, *, patience: float, timeout: Any) -> ClientTunnel:
        far = await self._network.dial_tunnel(address.host, Channel, timeout())
        self.leased += 1
        return ClientTunnel(
            key=(address, identity),
            port=0,
            channel=cast(Any, far),
            wire=Tunnel(Role.CLIENT),
            good_until=math.inf,
            handshake_ms=1.0,
            took=ROUND_TRIP,
            deadlines=self._deadlines,
        )

    def give_back(self, tunnel: ClientTunnel, *, reusable: bool) -> None:
        self.leased -= 1
        if reusable and tunnel.wire.idle:
            tunnel.idle_since = trio.current_time()
            self._idle.setdefault(tunnel.key, []).append(tunnel)
        else:
            tunnel.channel.close()

    def weed(self, address: Address, identity: str) -> None:
        kept = self._idle.pop((address, identity), [])
        for tunnel in kept:
            tunnel.channel.close()

    def close_idle(self) -> None:
        for key in list(self._idle):
            self.weed(*key)

    def lend(self, _key: object) -> None:
        return None


def _is_well(tunnel: ClientTunnel) -> bool:
    """The peer has not hung up meanwhile, nor said that it will take no more."""
    data = tunnel.channel.receive_now()
    try:
        if data:
            tunnel.wire.receive(data)
    except TunnelError:
        return False
    return data != b"" and tunnel.wire.idle
