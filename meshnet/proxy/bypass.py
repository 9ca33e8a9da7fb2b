"""A look for connections that got past the sidecar: by the kernel's list of sockets, without any right.

What was captured shows: an application's outbound connection has its other end at the sidecar's outbound port, and
an application is called by this host itself. What should have been captured and does not show that got past.
"""

import socket
from collections.abc import Callable, Iterable, Sequence
from functools import cache
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
        self._own: set[TcpSocket] = set()  # the sidecar's, of those that were found beside it at the last look
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
        self._served |= {found.local_port for found in every if found.state == LISTEN}
        established = [found for found in every if found.state != LISTEN]
        captured = {
            (found.remote, found.remote_port) for found in established if found.local_port == self._outbound_port
        }
        ends = {(each.local, each.local_port) for each in established}
        is_local = cache(self._is_local)
        leaves_inbound, leaves_outbound = cache(self.scope.leaves_inbound), cache(self.scope.leaves_outbound)
        beside: list[Beside] = []
        for each in established:
            # Of many sockets most are the sidecar's, or come through it: these are told by what costs least.
            if each.local_port in self._own_ports or (each.local, each.local_port) in captured:
                continue
            if each.local.startswith(_LOOPBACK) or each.remote in _CANARIES or is_local(each.remote):
                continue
            if each.local_port not in self._served:
                leaves = leaves_outbound(each.remote, each.remote_port, each.uid)
                beside.append(Beside(Direction.OUTBOUND, each, leaves))
            # Where the sidecar speaks in its client's name (capture.original_source) the other end is here, too.
            elif (each.remote, each.remote_port) not in ends:
                beside.append(Beside(Direction.INBOUND, each, leaves_inbound(each.local_port, each.remote)))
        return beside

    def _not_own(self, found: Iterable[Beside]) -> list[Beside]:
        """Without the sidecar's own. To look for these takes long where it has many: what was its own stays so."""
        some = list(found)
        own = {each.socket for each in some} & self._own
        if len(own) < len(some):
            inodes = self._own_inodes()
            own |= {each.socket for each in some if each.socket.inode in inodes}
        self._own = own
        return [each for each in some if each.socket not in own]

    def _own_inodes(self) -> set[int]:
        return {inode for pid in self._pids() for inode in socket_inodes(pid)}

    def _is_local(self, packed: bytes) -> bool:
        return packed.startswith(_LOOPBACK) or host_of(packed) in self._addresses
