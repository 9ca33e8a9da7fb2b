"""Tunnels kept between leases, so that a handshake is paid per peer and not per connection.

A tunnel belongs to one peer address and one identity; it is leased to one connection at a time. Where demand grows, or
tunnels get old, others are made before a connection has to wait for one. Nothing watches an idle tunnel: `reap` finds
the dead ones in time, and who leases one before that learns it as tunnel.lost on a tunnel that is not fresh, which says
nothing about the endpoint.
"""

import logging
import time
from collections.abc import Callable
from functools import partial

import trio

from meshnet.codec.frames import Pong
from meshnet.decide.demand import Demand
from meshnet.errors import ConnectionFailed, TunnelError
from meshnet.model.address import Address
from meshnet.net import tls
from meshnet.net.deadline import Deadlines
from meshnet.net.tls import Depot, Returned
from meshnet.tunnel.client import ClientTunnel, Key, Resumable, connect
from meshnet.tunnel.peer import Peer
from meshnet.tunnel.turns import Turns

_log = logging.getLogger("meshnet.tunnel")

# A burst to a cold peer queues here instead of starving the tunnels that stand. One thread makes handshakes: from eight
# at once on it is busy, and with 64 each takes ten times as long. Twice as many is for peers that are far away.
_HANDSHAKES_AT_ONCE = 16
_AHEAD_AT_ONCE = 4  # of these, for connections that are still to come
_AHEAD_TIMEOUT = 5.0  # seconds, as for a lease
_PAUSE = 30.0  # seconds until the next tunnel ahead to a peer, after one failed or was made to no purpose
_REAP_EVERY = 5.0  # seconds
_ENDS_SOON = 3 * _REAP_EVERY  # then another takes its place
_PING_AFTER = 30.0  # seconds idle; an answer is expected by the next reaping


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
        self._peers: dict[Key, Peer] = {}
        self._turns = Turns(_HANDSHAKES_AT_ONCE, self._keep)
        self._short: set[Key] = set()  # of spares, and on the way to who makes them
        self._ask_ahead, self._asked_ahead = trio.open_memory_channel[Key](float("inf"))
        self.on_handshake: Callable[[float, bool], None] = lambda ms, resumed: None

    async def run(self) -> None:
        """Reaps, and makes tunnels ahead, until it is cancelled."""
        async with trio.open_nursery() as nursery:
            for _ in range(_AHEAD_AT_ONCE):
                nursery.start_soon(self._make_ahead)
            while True:
                await trio.sleep(_REAP_EVERY)
                self.reap(time.monotonic())

    async def lease(
        self,
        address: Address,
        identity: str,
        *,
        patience: float = 5.0,
        timeout: Callable[[], float] = lambda: 5.0,
    ) -> ClientTunnel:
        """A tunnel to `address`, proven to be `identity`: an idle one, or one that comes back while we wait, or new.

        `timeout` is asked when the turn for a new one has come: the seconds for its connect and its handshake.

        Raises ConnectionFailed: connect.*, tls.*, and limit.queue_timeout when so many handshakes are under way that
        the turn did not come within `patience` seconds; that is nobody's fault but our own.
        """
        key = address, identity
        tunnel = self._take(key)
        if tunnel is None:
            if not self._turns.is_free and (peer := self._peers.get(key)) is not None:
                peer.gather()  # what orders have leased comes to who waits, when it comes back
                tunnel = self._take(key)  # or it has come back just now
            tunnel = tunnel or await self._turns.wait(key, patience)
        if tunnel is None:
            try:
                tunnel = await self._connect(key, timeout())
            finally:
                self._turns.end()
        return self._lent(tunnel)

    def lease_idle(self, address: Address, identity: str) -> ClientTunnel | None:
        """As `lease`, if one stands idle."""
        tunnel = self._take((address, identity))
        return None if tunnel is None else self._lent(tunnel)

    async def apart(self, address: Address, identity: str, timeout: float) -> ClientTunnel:
        """A new one by a full handshake, which never becomes the pool's: whoever has it closes its channel.

        `timeout` and what is raised as for `lease`.
        """
        return await connect(
            (address, identity),
            self._credentials(),
            None,
            secure=self._secure,
            deadlines=self._deadlines,
            mark=self._mark,
            timeout=timeout,
        )

    def weed(self, address: Address, identity: str) -> None:
        """After one kept tunnel turned out to be dead: closes those that the same fate has met."""
        peer = self._peers.get((address, identity))
        if peer is not None:
            peer.gather()
            for tunnel in [tunnel for tunnel in peer.idle if not self._stands(tunnel)]:
                peer.idle.remove(tunnel)
                tunnel.channel.close()
            peer.park()

    def lend(self, key: Key) -> Depot | None:
        """To a standing order, which may lease what stands idle by itself: owes one `unlend`. None: there is no way."""
        peer = self._peer(key)
        if peer.depot is None:
            peer.depot = self._secure.depot(partial(self._come_back, key))
        if peer.depot is not None:
            peer.orders += 1
            peer.park()
        return peer.depot

    def unlend(self, key: Key) -> None:
        peer = self._peers[key]
        peer.orders -= 1
        if not peer.orders:
            peer.gather()

    def give_back(self, tunnel: ClientTunnel, *, reusable: bool) -> None:
        """Ends a lease. What cannot be used again is closed."""
        peer = self._peers[tunnel.key]
        peer.leased -= 1
        if not reusable or not tunnel.wire.idle or self._is_old(tunnel):
            tunnel.channel.close()
            self._look_ahead(tunnel.key, peer)
            return
        self._keep(tunnel)

    def counts(self) -> dict[Key, tuple[int, int]]:
        """Idle and leased tunnels by peer."""
        counts = {key: (peer.standing, peer.in_use) for key, peer in self._peers.items()}
        return {key: count for key, count in counts.items() if any(count)}

    def handshakes(self) -> tuple[int, int]:
        """How many are under way, and how many connections wait for their turn at one; any thread may ask."""
        return self._turns.taken, self._turns.waiting

    def tunnels(self) -> tuple[int, int]:
        """Idle and leased ones; any thread may ask."""
        peers = list(self._peers.values())
        return sum(peer.standing for peer in peers), sum(peer.in_use for peer in peers)

    def reap(self, now: float) -> None:
        """Closes what is idle too long, near its certificate's end, retired or dead; pings the rest now and then.

        And, oldest first, what is more than the peer was lately asked for at once. `now` is monotonic; to be called
        every few seconds.
        """
        for key, peer in list(self._peers.items()):
            peer.demand.hold(peer.most_in_use(), now)
            peer.gather()
            while len(peer.idle) > min(max(peer.spares(now), 1 - peer.in_use), self._max_idle):
                peer.idle.popleft().channel.close()
            unused = False
            for tunnel in list(peer.idle):
                idle = now - tunnel.idle_since
                if idle > self._idle_timeout or not self._is_worth_keeping(tunnel, idle):
                    unused |= idle > self._idle_timeout
                    peer.idle.remove(tunnel)
                    tunnel.channel.close()
            if unused:
                peer.demand.limit(peer.in_use + len(peer.idle))
            peer.ending = sum(map(_ends_soon, peer.idle))
            peer.park()
            self._look_ahead(key, peer)
            if peer.is_unused and not (peer.spares(now) or self._resumes(peer)):
                del self._peers[key]

    def renew(self) -> None:
        """The credentials are others: what is idle is closed, and as much as is needed made anew.

        Leased tunnels are closed as they come back.
        """
        for key, peer in self._peers.items():
            peer.pause, peer.resumable = 0.0, None
            self._close_idle(peer)
            self._look_ahead(key, peer)

    def close_idle(self) -> None:
        """Closes every idle tunnel, and makes none ahead but where demand grows again."""
        for peer in self._peers.values():
            self._close_idle(peer)
            peer.demand = Demand(time.monotonic())

    def _close_idle(self, peer: Peer) -> None:
        peer.gather()
        for tunnel in peer.idle:
            tunnel.channel.close()
        peer.idle.clear()
        peer.ending = 0

    async def _connect(self, key: Key, timeout: float) -> ClientTunnel:
        peer = self._peers.get(key)
        tunnel = await connect(
            key,
            self._credentials(),
            peer.resumable if peer else None,
            secure=self._secure,
            deadlines=self._deadlines,
            mark=self._mark,
            timeout=timeout,
        )
        self.on_handshake(tunnel.handshake_ms, tunnel.channel.resumed)
        how = "resumed" if tunnel.channel.resumed else "full"
        _log.debug("tunnel to %s, %s: %s handshake in %.1f ms", tunnel.key[0], tunnel.key[1], how, tunnel.handshake_ms)
        tunnel.on_answer = self._learn
        return tunnel

    def _learn(self, tunnel: ClientTunnel) -> None:
        """The ticket that comes with a tunnel's first lease, so that the rest of a burst can begin with it."""
        if not tunnel.is_known and (ticket := tunnel.channel.ticket) is not None:
            self._peer(tunnel.key).resumable = Resumable(tunnel.channel.context, ticket)
        tunnel.is_known = True

    async def _make_ahead(self) -> None:
        """One after the other, the peers in turn."""
        async for key in self._asked_ahead:
            self._short.discard(key)
            peer = self._peers.get(key)
            if peer is not None and self._lacks(peer) and self._turns.take_if_idle():
                peer.coming += 1
                try:
                    tunnel = await self._connect(key, _AHEAD_TIMEOUT)
                    if _ends_soon(tunnel):
                        peer.pause = time.monotonic() + _PAUSE
                    self._keep(tunnel)
                except ConnectionFailed as failure:
                    peer.pause = time.monotonic() + _PAUSE  # a connection that needs one tries by itself, and says so
                    _log.debug("no tunnel to %s ahead: %s", key[0], failure)
                except Exception:
                    peer.pause = time.monotonic() + _PAUSE
                    _log.exception("a tunnel to %s could not be made ahead", key[0])
                finally:
                    peer.coming -= 1
                    self._turns.end()
                self._look_ahead(key, peer)

    def _look_ahead(self, key: Key, peer: Peer) -> None:
        if key not in self._short and self._lacks(peer):
            self._short.add(key)
            self._ask_ahead.send_nowait(key)

    def _lacks(self, peer: Peer) -> bool:
        """Whether one more should be made ahead."""
        now = time.monotonic()
        there = peer.standing + peer.coming
        # The other half is for those that come back, which would have to be closed for what was made ahead of them.
        wanted = min(peer.spares(now), (self._max_idle + 1) // 2)
        return there - peer.ending < wanted and there < self._max_idle and peer.pause <= now

    def _keep(self, tunnel: ClientTunnel, *, used: bool = True) -> None:
        """For the next who asks, or who is waiting."""
        if used:
            tunnel.idle_since = time.monotonic()
        tunnel.pinged = False  # a whole lease is an answer too, and may have overtaken the PONG
        if self._turns.offer(tunnel):
            return
        peer = self._peer(tunnel.key)
        if peer.standing < self._max_idle:
            peer.keep(tunnel)
        else:
            tunnel.channel.close()

    def _lent(self, tunnel: ClientTunnel) -> ClientTunnel:
        peer = self._peer(tunnel.key)
        peer.leased += 1
        peer.demand.asked(peer.in_use, time.monotonic())
        self._look_ahead(tunnel.key, peer)
        return tunnel

    def _peer(self, key: Key) -> Peer:
        if (peer := self._peers.get(key)) is None:
            peer = self._peers[key] = Peer(Demand(time.monotonic()))
        return peer

    def _take(self, key: Key) -> ClientTunnel | None:
        """The one that was used last: so the others can grow old and be reaped."""
        peer = self._peers.get(key)
        tunnel = peer.take() if peer else None
        while tunnel is not None and self._is_old(tunnel):
            tunnel.channel.close()
            tunnel = peer.take() if peer else None
        return tunnel

    def _come_back(self, key: Key, back: Returned) -> None:
        """From a lease that an order had, to be looked at."""
        peer = self._peers[key]
        tunnel = peer.regain(back)
        if self._stands(tunnel) and not self._is_old(tunnel):
            self._keep(tunnel, used=bool(back.leases))
        else:
            tunnel.channel.close()
            self._look_ahead(key, peer)

    def _resumes(self, peer: Peer) -> bool:
        credentials = self._credentials()
        return credentials is not None and peer.resumable is not None and peer.resumable.fits(credentials.client)

    def _is_worth_keeping(self, tunnel: ClientTunnel, idle: float) -> bool:
        return not self._is_old(tunnel) and self._stands(tunnel) and (idle <= _PING_AFTER or self._ping(tunnel))

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
        except (OSError, ConnectionFailed, TunnelError):
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


def _ends_soon(tunnel: ClientTunnel) -> bool:
    return tunnel.good_until < time.time() + _ENDS_SOON
