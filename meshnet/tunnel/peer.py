"""The tunnels to one peer that stand between leases: at hand for the pool, or parked for standing orders."""

from collections import deque
from dataclasses import dataclass, field

from meshnet.decide.demand import Demand
from meshnet.net.tls import Channel, Depot, Returned
from meshnet.tunnel.client import ClientTunnel, Resumable


@dataclass(slots=True, eq=False)
class Peer:
    """`idle`: at hand, the one used last to the right. `leased`: to connections that the pool knows of. `ending`: of
    those that stand, as of the last reaping. `coming`: are being made ahead. `pause`: monotonic seconds until which
    none is. `orders`: how many may lease from the depot.
    """

    demand: Demand
    idle: deque[ClientTunnel] = field(default_factory=deque)
    leased: int = 0
    ending: int = 0
    coming: int = 0
    pause: float = 0.0
    resumable: Resumable | None = None
    depot: Depot | None = None
    orders: int = 0
    _most_lent: int = field(init=False, default=0)  # at once, since somebody has last asked
    _lent: dict[Channel, ClientTunnel] = field(init=False, default_factory=dict)  # parked, or leased by an order

    @property
    def standing(self) -> int:
        return len(self.idle) + (self.depot.counts()[0] if self.depot else 0)

    @property
    def in_use(self) -> int:
        return self.leased + (self.depot.counts()[1] if self.depot else 0)

    def most_in_use(self) -> int:
        """Since this was last asked, as far as orders are concerned."""
        self._note_most()
        most, self._most_lent = self._most_lent, 0
        return self.leased + most

    @property
    def is_unused(self) -> bool:
        return not (self.leased or self.idle or self.coming or self.orders or self._lent)

    def spares(self, now: float) -> int:
        return self.demand.spares(self.in_use, now)

    def keep(self, tunnel: ClientTunnel) -> None:
        """It stands between leases."""
        if self.depot is not None and self.orders and tunnel.wire.is_between_frames:
            self._lent[tunnel.channel] = tunnel
            self.depot.park(tunnel.channel)
        else:
            self.idle.append(tunnel)

    def take(self) -> ClientTunnel | None:
        """The one that was used last."""
        if self.idle:
            return self.idle.pop()
        back = self.depot.take() if self.depot else None
        return None if back is None else self.regain(back)

    def gather(self) -> None:
        """All that stand are at hand. Those that orders have leased come back as their leases end."""
        if self.depot is not None:
            self._note_most()
            self.idle.extend(self.regain(back) for back in reversed(self.depot.recall()))

    def park(self) -> None:
        """What is at hand, for orders, if there are any."""
        if self.depot is not None and self.orders:
            idle, self.idle = self.idle, deque()
            for tunnel in idle:
                self.keep(tunnel)

    def _note_most(self) -> None:
        if self.depot is not None:
            self._most_lent = max(self._most_lent, self.depot.counts()[2])

    def regain(self, back: Returned) -> ClientTunnel:
        tunnel = self._lent.pop(back.channel)
        if back.leases:
            tunnel.wire.take_back(*back.channel.last_ends())
            tunnel.idle_since = back.idle_since
            tunnel.pinged = False
            tunnel.on_answer(tunnel)
        return tunnel
