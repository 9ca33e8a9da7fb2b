"""Tunnels kept between leases, so that a handshake is paid per peer and not per connection.

A tunnel belongs to one peer address and one identity; it is leased to one connection at a time. Nothing watches an
idle tunnel: `reap` finds the dead ones in time, and who leases one before that learns it as tunnel.lost on a tunnel
that is not fresh, which says nothing about the endpoint.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from meshnet.codec.frames import Pong
from meshnet.errors import ConnectionFailed, Reason, TunnelError
from meshnet.model.address import Address
from meshnet.net import tls
from meshnet.net.deadline import Deadlines
from meshnet.net.strand import in_task
from meshnet.tunnel.client import ClientTunnel, Key, Tickets, connect

_HANDSHAKES_AT_ONCE = 32  # a burst to a cold peer queues here instead of starving the tunnels that already stand
_DEMAND_LEFT = 0.9  # at each reaping: what was needed once is thought to be needed half as much half a minute later
_PING_AFTER = 30.0  # seconds idle; an answer is expected by the next reaping


@dataclass(slots=True, eq=False)
class _Waiter:
    key: Key
    turn: trio.Event = field(default_factory=trio.Event)
    tunnel: ClientTunnel | None = None


class Pool:
    """All tunnels to all peers. `credentials` is asked at each handshake, so a renewed certificate is used at once."""

    def __init__(
        self,
        credentials: Callable[[], tls.Credentials | None],
        secure: tls.Tls,
        *,
        mark: int,
        idle_timeout: float,
        max_idle: int,
    ) -> None:
        self._credentials = credentials
        self._secure = secure
        self._deadlines = Deadlines()
        self._mark = mark
        self._idle_timeout = idle_timeout
        self._max_idle = max_idle
        self._idle: dict[Key, deque[ClientTunnel]] = {}
        self._leased: dict[Key, int] = {}
        self._tickets: Tickets = {}
        self._turns = _HANDSHAKES_AT_ONCE
        self._waiting: OrderedDict[Key, OrderedDict[_Waiter, None]] = OrderedDict()  # by peer, in the order they came
        self._demand: dict[Key, float] = {}  # the most that were leased at once, fading
        self.on_handshake: Callable[[float, bool], None] = lambda ms, resumed: None

    async def lease(
        self, address: Address, identity: str, *, patience: float = 5.0, timeout: float = 5.0
    ) -> ClientTunnel:
        """A tunnel to `address`, proven to be `identity`: an idle one, or one that comes back while we wait, or new.

        `timeout` seconds are for the connect, and again for the handshake of a new one.

        Raises ConnectionFailed: connect.*, tls.*, and limit.queue_timeout when so many handshakes are under way that
        the turn did not come within `patience` seconds; that is nobody's fault but our own.
        """
        key = (address, identity)
        tunnel = self._take(key) or await self._turn(key, patience)
        if tunnel is None:
            try:
                credentials = self._credentials()
                tunnel = await connect(
                    key,
                    credentials,
                    self._tickets,
                    secure=self._secure,
                    deadlines=self._deadlines,
                    mark=self._mark,
                    timeout=timeout,
                )
            finally:
                self._end_turn()
            self.on_handshake(tunnel.handshake_ms, tunnel.channel.resumed)
        return self._lent(tunnel)

    def lease_idle(self, address: Address, identity: str) -> ClientTunnel | None:
        """As `lease`, if one stands idle."""
        tunnel = self._take((address, identity))
        return None if tunnel is None else self._lent(tunnel)

    def weed(self, address: Address, identity: str) -> None:
        """After one kept tunnel turned out to be dead: closes those that the same fate has met."""
        idle = self._idle.get((address, identity), deque())
        for tunnel in [tunnel for tunnel in idle if not self._stands(tunnel)]:
            idle.remove(tunnel)
            tunnel.channel.close()

    def give_back(self, tunnel: ClientTunnel, *, reusable: bool) -> None:
        """Ends a lease. What cannot be used again is closed."""
        left = self._leased[tunnel.key] - 1
        if left:
            self._leased[tunnel.key] = left
        else:
            del self._leased[tunnel.key]
        idle = self._idle.setdefault(tunnel.key, deque())
        if not reusable or not tunnel.wire.idle or len(idle) >= self._max_idle or self._is_old(tunnel):
            tunnel.channel.close()
            return
        tunnel.idle_since = time.monotonic()
        tunnel.pinged = False  # a whole lease is an answer too, and may have overtaken the PONG
        if not self._hand_over(tunnel):
            idle.append(tunnel)

    def counts(self) -> dict[Key, tuple[int, int]]:
        """Idle and leased tunnels by peer."""
        keys = {key for key, idle in self._idle.items() if idle} | self._leased.keys()
        return {key: (len(self._idle.get(key, ())), self._leased.get(key, 0)) for key in keys}

    def reap(self, now: float) -> None:
        """Closes what is idle too long, near its certificate's end, retired or dead; pings the rest now and then.

        And, oldest first, what is more than the peer was lately asked for at once. `now` is monotonic; to be called
        every few seconds.
        """
        for key, demand in list(self._demand.items()):
            leased = self._leased.get(key, 0)
            demand = self._demand[key] = max(leased, demand * _DEMAND_LEFT)
            idle = self._idle.get(key, deque())
            while idle and leased + len(idle) > max(demand, 1.0):
                idle.popleft().channel.close()
            if not leased and not idle:
                del self._demand[key]
        for key, idle in list(self._idle.items()):
            for tunnel in list(idle):
                if not self._is_worth_keeping(tunnel, now - tunnel.idle_since):
                    idle.remove(tunnel)
                    tunnel.channel.close()
            if not idle:
                del self._idle[key]

    def close_idle(self) -> None:
        """Closes every idle tunnel; leased ones are closed as they come back if their credentials are old."""
        for idle in self._idle.values():
            for tunnel in idle:
                tunnel.channel.close()
        self._idle.clear()
        self._tickets.clear()

    async def _turn(self, key: Key, patience: float) -> ClientTunnel | None:
        """Waits for leave to make a handshake (None; owes one `_end_turn`), or for a tunnel that somebody gave back."""
        if self._turns:
            self._turns -= 1
            return None
        waiter = _Waiter(key)
        self._waiting.setdefault(key, OrderedDict())[waiter] = None
        try:
            await in_task()
            with trio.move_on_after(patience):
                await waiter.turn.wait()
            if waiter.turn.is_set():
                return waiter.tunnel
        except trio.Cancelled:
            if waiter.tunnel is not None and not self._hand_over(waiter.tunnel):
                self._idle.setdefault(key, deque()).append(waiter.tunnel)
            elif waiter.turn.is_set():
                self._end_turn()
            raise
        finally:
            self._forget(waiter)
        raise ConnectionFailed(
            Reason.LIMIT_QUEUE_TIMEOUT, f"too many handshakes at once: no tunnel to {key[0]} within {patience:.1f} s"
        )

    def _end_turn(self) -> None:
        """The peers in turn, so that a burst to one does not hold up another; for each, first come, first served."""
        if not self._waiting:
            self._turns += 1
            return
        key, waiters = next(iter(self._waiting.items()))
        self._waiting.move_to_end(key)
        self._call(next(iter(waiters)))

    def _hand_over(self, tunnel: ClientTunnel) -> bool:
        waiters = self._waiting.get(tunnel.key)
        if waiters is None:
            return False
        waiter = next(iter(waiters))
        waiter.tunnel = tunnel
        self._call(waiter)
        return True

    def _call(self, waiter: _Waiter) -> None:
        self._forget(waiter)
        waiter.turn.set()

    def _forget(self, waiter: _Waiter) -> None:
        waiters: OrderedDict[_Waiter, None] = self._waiting.get(waiter.key, OrderedDict())
        waiters.pop(waiter, None)
        if not waiters:
            self._waiting.pop(waiter.key, None)

    def _lent(self, tunnel: ClientTunnel) -> ClientTunnel:
        tunnel.leases += 1
        leased = self._leased[tunnel.key] = self._leased.get(tunnel.key, 0) + 1
        if leased > self._demand.get(tunnel.key, 0.0):
            self._demand[tunnel.key] = leased
        return tunnel

    def _take(self, key: Key) -> ClientTunnel | None:
        idle = self._idle.get(key)
        while idle:
            tunnel = idle.pop()  # the one used last: the others can grow old and be reaped
            if not self._is_old(tunnel):
                return tunnel
            tunnel.channel.close()
        return None

    def _is_worth_keeping(self, tunnel: ClientTunnel, idle: float) -> bool:
        if idle > self._idle_timeout or self._is_old(tunnel) or not self._stands(tunnel):
            return False
        return idle <= _PING_AFTER or self._ping(tunnel)

    def _is_old(self, tunnel: ClientTunnel) -> bool:
        credentials = self._credentials()
        return (
            credentials is None or tunnel.channel.context is not credentials.client or tunnel.good_until < time.time()
        )

    def _stands(self, tunnel: ClientTunnel) -> bool:
        try:
            while (data := tunnel.channel.receive_now()) is not None:
                if not data:
                    return False
                for frame in tunnel.wire.receive(memoryview(data)):
                    if isinstance(frame, Pong):
                        tunnel.pinged = False
        except (OSError, TunnelError):
            return False
        return tunnel.wire.idle

    def _ping(self, tunnel: ClientTunnel) -> bool:
        if tunnel.pinged:
            return False
        try:
            tunnel.channel.send_now(tunnel.wire.ping())
        except OSError:
            return False
        tunnel.pinged = True
        return True
