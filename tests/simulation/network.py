"""The network of a simulated mesh: hosts that fail in every way there is, and what callers see of that."""

import random
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import trio

from meshnet.decide.breaker import BreakerState
from meshnet.errors import ConnectionFailed, Reason
from meshnet.model.address import Address
from meshnet.model.service import TunnelKind
from meshnet.proxy.state import ProxyState

ROUND_TRIP = 0.002
_SLOW = 1.4  # seconds to connect: within an attempt's two, and twice of it is not

# What a host may be like, and how an attempt ends there; None: it comes up, after so many seconds.
CONDITIONS: dict[str, Reason | None] = {
    "well": None,
    "slow": None,
    "half": None,  # every second one is refused
    "refuses": Reason.CONNECT_REFUSED,
    "drops": Reason.CONNECT_TIMEOUT,
    "unreachable": Reason.CONNECT_UNREACHABLE,
    "expired": Reason.TLS_EXPIRED,
    "stranger": Reason.TLS_PEER_IDENTITY,
    "denies": Reason.AUTHZ_DENIED,
}
_CONDITIONS_OF_APPS = frozenset({"slow", "half", "refuses"})  # where there is a sidecar, it finds them
_OF_TUNNELS = frozenset(CONDITIONS) - _CONDITIONS_OF_APPS

CALLER: ContextVar[ProxyState] = ContextVar("CALLER")
"""Whose attempt it is: the network sees callers by their tasks."""


class Closable(Protocol):
    def close(self) -> None: ...


class End(Closable, Protocol):
    """Of a tunnel in memory."""

    far: Any


AnyEnd = TypeVar("AnyEnd", bound=End)


class Server(Protocol):
    """A sidecar that serves tunnels."""

    async def is_up(self) -> None:
        """Returns when it is."""

    def serve(self, channel: Any) -> None: ...


class Socket:
    """As much of a socket as is looked at: one that never has anything to say."""

    def __init__(self, host: str = "") -> None:
        self.host = host
        self.closed = False

    def recv(self, _size: int, _flags: int = 0) -> bytes:
        raise BlockingIOError

    def fileno(self) -> int:
        return -1

    def setsockopt(self, *_: object) -> None:
        pass

    def getsockname(self) -> tuple[str, int]:
        return self.host, 0

    def close(self) -> None:
        self.closed = True


@dataclass
class Host:
    condition: str = "well"
    dies: trio.Event = field(default_factory=trio.Event)  # its application, with everything that is open to it
    sidecar: "Server | None" = None
    tunnels: list["Closable"] = field(default_factory=list)  # to it

    def become(self, condition: str) -> None:
        self.condition = condition

    def die(self) -> None:
        self.dies.set()
        self.dies = trio.Event()

    def cut(self) -> None:
        """Its tunnels, of which both ends learn."""
        while self.tunnels:
            self.tunnels.pop().close()


class Network:
    """Shared by all callers. What must never happen is noted in `broken`."""

    def __init__(self, hosts: list[str], dice: random.Random) -> None:
        self.hosts = {host: Host() for host in hosts}
        self.dice = dice
        self.broken: list[str] = []
        self.attempts: Counter[str] = Counter()

    async def connect(
        self, address: Address, *, mark: int, timeout: float, local: bool = False, source: str = ""
    ) -> Socket:
        """In the place of meshnet.net.sockets.connect."""
        snapshot = CALLER.get().snapshot
        found = snapshot.by_endpoint.get(address)
        if found is not None and found[1].tunnel is not TunnelKind.NONE and not local:
            self.broken.append(f"{address} is meshed, and was dialled in plain text")
        if not local:
            self.is_let_through(address)
        elif found is not None and snapshot.policies:  # there is one, which denies the service that it is of
            self.broken.append(f"{address} was called, and policy lets nobody in")
        await self._reach(address, timeout, _OF_TUNNELS if local else frozenset())
        return Socket(address.host)

    async def dial_tunnel(self, host: str, end: type[AnyEnd], timeout: float) -> AnyEnd:
        """One end of two, whose other end is served. Raises ConnectionFailed."""
        address = Address(host, 80)
        self.is_let_through(address)
        await self._reach(address, timeout, _CONDITIONS_OF_APPS)
        server = self.hosts[host].sidecar
        assert server is not None
        with trio.move_on_after(timeout):
            await server.is_up()
            near, far = end(), end()
            near.far, far.far = far, near
            self.hosts[host].tunnels.append(near)
            server.serve(far)
            return near
        raise ConnectionFailed(Reason.CONNECT_TIMEOUT, f"{address} did not answer within {timeout:g} s")

    def is_let_through(self, address: Address) -> None:
        """An attempt of CALLER's begins."""
        known = CALLER.get().endpoints.get(address)
        if known is not None and known.breaker.state(trio.current_time()) is BreakerState.OPEN:
            # One that was admitted just before it opened may still be on its way; a new one may not begin.
            self.broken.append(f"{address} was dialled while its breaker was open")

    async def _reach(self, address: Address, timeout: float, unlike: frozenset[str]) -> None:
        """One attempt, which does not meet conditions that are in `unlike`. Raises ConnectionFailed."""
        host = self.hosts[address.host]
        condition = "well" if host.condition in unlike else host.condition
        self.attempts[condition] += 1
        reason = CONDITIONS[condition]
        if condition == "half" and self.dice.random() < 0.5:
            reason = Reason.CONNECT_REFUSED
        takes = _SLOW if condition == "slow" else ROUND_TRIP
        if reason is Reason.CONNECT_TIMEOUT or takes > timeout:
            await trio.sleep(timeout)
            raise ConnectionFailed(Reason.CONNECT_TIMEOUT, f"{address} did not answer within {timeout:g} s")
        await trio.sleep(takes)
        if reason is not None:
            raise ConnectionFailed(reason, f"{address}: simulated")
