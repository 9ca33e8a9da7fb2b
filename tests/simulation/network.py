"""The network of a simulated mesh: hosts that fail in every way there is, and what callers see of that."""

import random
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import trio

from meshnet.codec.frames import Frame, Open
from meshnet.decide.breaker import BreakerState
from meshnet.errors import ConnectionFailed, EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.service import TunnelKind
from meshnet.proxy.state import ProxyState
from meshnet.relay import Link, Outcome, PlainLeg, Tally

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


CALLER: ContextVar[ProxyState] = ContextVar("CALLER")
"""Whose attempt it is: the network sees callers by their tasks."""


class Socket:
    """As much of a socket as is looked at: one that never has anything to say."""

    def __init__(self, host: str = "") -> None:
        self.host = host
        self.closed = False

    def recv(self, _size: int, _flags: int = 0) -> bytes:
        raise BlockingIOError

    def fileno(self) -> int:
        return -1

    def getsockname(self) -> tuple[str, int]:
        return self.host, 0

    def close(self) -> None:
        self.closed = True


@dataclass
class Host:
    condition: str = "well"
    dies: trio.Event = field(default_factory=trio.Event)  # with everything that is open to it

    def become(self, condition: str) -> None:
        self.condition = condition

    def die(self) -> None:
        self.dies.set()
        self.dies = trio.Event()


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
        found = CALLER.get().snapshot.by_endpoint.get(address)
        if found is not None and found[1].tunnel is not TunnelKind.NONE:
            self.broken.append(f"{address} is meshed, and was dialled in plain text")
        await self.reach(address, timeout)
        return Socket(address.host)

    async def reach(self, address: Address, timeout: float) -> None:
        """One attempt of CALLER's. Raises ConnectionFailed."""
        state = CALLER.get()
        known = state.endpoints.get(address)
        if known is not None and known.breaker.state(trio.current_time()) is BreakerState.OPEN:
            # One that was admitted just before it opened may still be on its way; a new one may not begin.
            self.broken.append(f"{address} was dialled while its breaker was open")
        host = self.hosts[address.host]
        self.attempts[host.condition] += 1
        reason = CONDITIONS[host.condition]
        if host.condition == "half" and self.dice.random() < 0.5:
            reason = Reason.CONNECT_REFUSED
        takes = _SLOW if host.condition == "slow" else ROUND_TRIP
        if reason is Reason.CONNECT_TIMEOUT or takes > timeout:
            await trio.sleep(timeout)
            raise ConnectionFailed(Reason.CONNECT_TIMEOUT, f"{address} did not answer within {timeout:g} s")
        await trio.sleep(takes)
        if reason is not None:
            raise ConnectionFailed(reason, f"{address}: simulated")


class Pool:
    """Tunnels that are made for each lease. `lease` is where a peer's certificate is judged."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.leased = 0

    def lease_idle(self, _address: Address, _identity: str) -> None:
        return None

    async def lease(self, address: Address, identity: str, *, patience: float, timeout: float) -> Any:
        self.leased += 1

        async def open_(request: Open, _early: bytes, patience: float) -> list[Frame]:
            await self._network.reach(Address(request.host, request.port), patience)
            return []

        return SimpleNamespace(
            key=(address, identity),
            port=0,
            channel=SimpleNamespace(version="TLSv1.3", cipher="simulated", resumed=False, host=address.host),
            wire=SimpleNamespace(idle=True),
            is_fresh=True,
            handshake_ms=1.0,
            took=0.002,
            open=open_,
        )

    def give_back(self, _tunnel: object, *, reusable: bool) -> None:
        self.leased -= 1

    def weed(self, _address: Address, _identity: str) -> None:
        pass

    def lend(self, _key: object) -> None:
        return None

    def close_idle(self) -> None:
        """There are none."""


class Relay:
    """Moves nothing for as long as a session lasts, or until its endpoint dies or somebody aborts it."""

    name = "simulated"
    takes_orders = False

    def __init__(self, network: Network) -> None:
        self._network = network
        self.lasts: Callable[[], float]

    def fits(self, _link: Link) -> bool:
        return True

    def suspend_orders(self) -> None:
        """It takes none."""

    async def run(self, link: Link, tally: Tally) -> Outcome:
        aborted = trio.Event()
        link.abort = aborted.set
        died = self._network.hosts[_host_of(link)].dies
        tally.sent = tally.received = 1
        tally.moved_at = trio.current_time()
        ends = {"done": False, "dead": False}

        async def until(event: trio.Event, what: str, scope: trio.CancelScope) -> None:
            await event.wait()
            ends[what] = True
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(until, died, "dead", nursery.cancel_scope)
            nursery.start_soon(until, aborted, "done", nursery.cancel_scope)
            await trio.sleep(self.lasts())
            nursery.cancel_scope.cancel()
        if isinstance(link.client, PlainLeg):
            link.client.sock.close()
        if ends["done"]:
            return Outcome(link.abort_reason, link.abort_by, reusable=False)
        if ends["dead"]:
            return Outcome(Reason.PEER_RST, EndedBy.SERVER, "the endpoint's host died")
        return Outcome(Reason.OK, EndedBy.CLIENT, reusable=True)


def _host_of(link: Link) -> str:
    leg: Any = link.endpoint
    return str(leg.sock.host if isinstance(leg, PlainLeg) else leg.channel.host)
