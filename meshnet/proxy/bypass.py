"""A look for connections that got past the sidecar: by the kernel's list of sockets, without any right.

What was captured shows: an application's outbound connection has its other end at the sidecar's outbound port, and
an application is called by this host itself. What should have been captured and does not show that got past.
"""

import os
import socket
from collections.abc import Callable, Iterable

from meshnet.decide.bypass import CaptureScope
from meshnet.model.canary import CANARY, OWN_CANARY
from meshnet.model.connection import Direction
from meshnet.model.settings import Settings
from meshnet.net.addresses import LocalAddresses
from meshnet.net.sock_diag import LISTEN, TcpSocket, host_of, tcp_sockets

_LOOPBACK = (b"\x7f", bytes(15) + b"\x01")
_CANARIES = frozenset(
    socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    for host in (*CANARY.values(), *OWN_CANARY.values())
)


class Bypass:
    """`pids` are the sidecar's own processes, whose sockets are its own."""

    def __init__(self, settings: Settings, addresses: LocalAddresses, pids: Callable[[], Iterable[int]]) -> None:
        self.scope = CaptureScope(settings)
        self._own_ports = settings.own_ports()
        self._outbound_port = settings.proxy.outbound_port
        self._addresses = addresses
        self._pids = pids
        self._served: set[int] = set()  # ports that were listened at; who is called there calls nobody

    def look(self) -> frozenset[tuple[Direction, TcpSocket]]:
        """Established connections that should have come through the sidecar, and do not. Blocks; raises OSError."""
        every = tcp_sockets()
        established = [found for found in every if found.state != LISTEN]
        self._served |= {found.local_port for found in every if found.state == LISTEN}
        captured = {
            (found.remote, found.remote_port) for found in established if found.local_port == self._outbound_port
        }
        # Where the sidecar speaks in its client's name (capture.original_source) the other end is of this host, too.
        ends = {(each.local, each.local_port) for each in established}
        found = {
            (direction, each)
            for each in established
            if (direction := self._past(each)) is not None
            and (each.local, each.local_port) not in captured
            and not (direction is Direction.INBOUND and (each.remote, each.remote_port) in ends)
            and not self._is_local(each.remote)
        }
        if found:
            own = self._own_sockets()
            found = {pair for pair in found if pair[1].inode not in own}
        # The inode comes when a program accepts it; it is the same connection.
        return frozenset((direction, each._replace(inode=0)) for direction, each in found)

    def _past(self, found: TcpSocket) -> Direction | None:
        """The way it would have got past the sidecar, if it did."""
        if found.local.startswith(_LOOPBACK) or found.local_port in self._own_ports or found.remote in _CANARIES:
            return None
        if found.local_port in self._served:
            is_meant, direction = self.scope.inbound(found.local_port, found.remote), Direction.INBOUND
        else:
            is_meant = self.scope.outbound(found.remote, found.remote_port, found.uid)
            direction = Direction.OUTBOUND
        return direction if is_meant and direction not in self.scope.not_judged else None

    def _is_local(self, packed: bytes) -> bool:
        return packed.startswith(_LOOPBACK) or host_of(packed) in self._addresses

    def _own_sockets(self) -> set[int]:
        found = set()
        for pid in self._pids():
            for number in _descriptors(pid):
                try:
                    target = os.readlink(f"/proc/{pid}/fd/{number}")
                except OSError:  # closed meanwhile
                    continue
                if target.startswith("socket:["):
                    found.add(int(target[8:-1]))
        return found


def _descriptors(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/fd")
    except FileNotFoundError:  # it has ended
        return []
