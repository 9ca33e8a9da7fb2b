"""What the kernel of this host knows of the endpoint legs of connections: TCP_INFO of tcp(7), by our own port of each.

That of a connection through a tunnel is the tunnel's: `retransmits` also of what earlier ones lost in it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from meshnet.model.address import Address, parse_address
from meshnet.model.connection import Connection, Direction, Security
from meshnet.net.sock_diag import TcpInfo, TcpSocket, host_of, tcp_sockets_with_info

Sockets = Iterable[tuple[TcpSocket, TcpInfo | None]]


def endpoint_legs(connections: Sequence[Connection]) -> list[TcpInfo | None]:
    """Of each of them, in order; None of one that is not open, or whose leg is not among this host's sockets."""
    if not any(map(_is_up, connections)):
        return [None] * len(connections)
    try:
        return found_among(tcp_sockets_with_info(), connections)
    except OSError:
        return [None] * len(connections)


def found_among(sockets: Sockets, connections: Sequence[Connection]) -> list[TcpInfo | None]:
    """The same of `sockets`. A leg that could be either of two is neither."""
    ports = {it.leg_port for it in connections if _is_up(it)}
    known: dict[tuple[int | None, str], list[tuple[int, TcpInfo]]] = defaultdict(list)
    for found, info in sockets:
        if found.local_port in ports and info is not None:
            known[found.local_port, host_of(found.remote)].append((found.remote_port, info))
    return [_one(known[it.leg_port, to.host], to, it) if (to := _endpoint(it)) else None for it in connections]


def _one(found: Sequence[tuple[int, TcpInfo]], to: Address, of: Connection) -> TcpInfo | None:
    """A plain leg goes to the endpoint's port, a tunnel to another of the same host, which no record has."""
    by_tunnel = of.direction is Direction.OUTBOUND and of.tls.mode is Security.MTLS
    fitting = [info for port, info in found if by_tunnel or port == to.port]
    return fitting[0] if len(fitting) == 1 else None


def _endpoint(connection: Connection) -> Address | None:
    try:
        return parse_address(connection.endpoint) if _is_up(connection) else None
    except ValueError:
        return None


def _is_up(connection: Connection) -> bool:
    return connection.reason is None and connection.leg_port is not None
