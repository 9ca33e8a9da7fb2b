"""A look for connections that got past the sidecar: by the kernel's list of sockets, without any right.

What was captured shows: an application's outbound connection has its other end at the sidecar's outbound port, and
an application is called by this host itself. What should have been captured and does not show that got past.
"""

import socket
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from meshnet.decide.bypass import CaptureScope
from meshnet.model.canary import CANARY, OWN_CANARY
from meshnet.model.connection import Direction
from meshnet.model.settings import Settings
from meshnet.net.addresses import LocalAddresses
from meshnet.net.processes import socket_inodes
from meshnet.net.sock_diag import LISTEN, TcpSocket, host_of, tcp_sockets

_LOOPBACK = (b"\x7f", bytes(15) + b"\x01")
_CANARIES = frozenset(
    socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    for host in (*CANARY.values(), *OWN_CANARY.values())
)


class Beside(NamedTuple):
    """A connection that does not come through the sidecar. `leaves`: the setting that leaves it alone; empty: none."""

    direction: Direction
    socket: TcpSocket
    leaves: str


class Bypass:
    """`pids` are the sidecar's own processes, whose sockets are its own."""

    def __init__(self, settings: Settings, addresses: LocalAddresses, pids: Callable[[], Iterable[int]]) -> None:
        self.scope = CaptureScope(settings)
        self._own_ports = settings.own_ports()
        self._readiness_port = settings.capture.readiness_port
        self._outbound_port = settings.proxy.outbound_port
        self._addresses = addresses
        self._pids = pids
        self._served: set[int] = set()  # ports that were listened at; who is called there calls nobody
        self.is_taken = False
        """Whether others reached somebody at capture.readiness_port at the last look, who would have answered in the
        sidecar's place without rules."""

    def look(self) -> frozenset[tuple[Direction, TcpSocket]]:
        """Established connections that should have come through the sidecar, and do not. Blocks; raises OSError."""
        every = tcp_sockets()
        asked = [it for it in every if it.state == LISTEN and it.local_port == self._readiness_port]
        strangers = {it.inode for it in asked if not it.local.startswith(_LOOPBACK)}
        self.is_taken = bool(strangers) and bool(strangers - self._own_inodes())
        meant = (it for it in self._beside(every) if not it.leaves and it.direction not in self.scope.not_judged)
        # The inode comes when a program accepts it; it is the same connection.
        return frozenset((it.direction, it.socket._replace(inode=0)) for it in self._not_own(meant))

    def beside(self) -> list[Beside]:
        """All established ones that do not come through it, but for those that stay on this host. As `look`."""
        return self._not_own(self._beside(tcp_sockets()))

    def _beside(self, every: Sequence[TcpSocket]) -> list[Beside]:
        established = [found for found in every if found.state != LISTEN]
        self._served |= {found.local_port for found in every if found.state == LISTEN}
        captured = {
            (found.remote, found.remote_port) for found in established if found.local_port == self._outbound_port
        }
        # Where the sidecar speaks in its client's name (capture.original_source) the other end is of this host, too.
        ends = {(each.local, each.local_port) for each in established}
        return [
            found
            for each in established
            if (found := self._judged(each)) is not None
            and (each.local, each.local_port) not in captured
            and not (found.direction is Direction.INBOUND and (each.remote, each.remote_port) in ends)
            and not self._is_local(each.remote)
        ]

    def _judged(self, found: TcpSocket) -> Beside | None:
        """The way it took past the sidecar, if it did; None for what is no application's."""
        if found.local.startswith(_LOOPBACK) or found.local_port in self._own_ports or found.remote in _CANARIES:
            return None
        if found.local_port in self._served:
            return Beside(Direction.INBOUND, found, self.scope.leaves_inbound(found.local_port, found.remote))
        leaves = self.scope.leaves_outbound(found.remote, found.remote_port, found.uid)
        return Beside(Direction.OUTBOUND, found, leaves)

    def _not_own(self, found: Iterable[Beside]) -> list[Beside]:
        """Without the sidecar's own: looking for these takes long where it has many connections."""
        some = list(found)
        if some:
            own = self._own_inodes()
            some = [each for each in some if each.socket.inode not in own]
        return some

    def _own_inodes(self) -> set[int]:
        return {inode for pid in self._pids() for inode in socket_inodes(pid)}

    def _is_local(self, packed: bytes) -> bool:
        return packed.startswith(_LOOPBACK) or host_of(packed) in self._addresses
