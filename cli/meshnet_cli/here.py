"""Connections with what the kernel of this host knows of open ones, beside the sidecar's records."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from meshnet.model.address import Address, parse_address
from meshnet.model.connection import Connection, Direction, Shape
from meshnet.model.uncaptured import ProcessView
from meshnet.net.sock_diag import TcpInfo
from meshnet_cli.legs import endpoint_legs


class TcpView(Shape, frozen=True):
    """Of the endpoint leg, or of the tunnel that it goes through: `retransmits` since that was opened."""

    rtt_us: int
    rtt_var_us: int
    retransmits: int

    @classmethod
    def of(cls, leg: TcpInfo) -> "TcpView":
        return cls(leg.rtt_us, leg.rtt_var_us, leg.retransmits)


class ConnectionHere(Connection, frozen=True, kw_only=True):
    """Without what is not known: of what has ended, of another host's, or without the right to look."""

    tcp: TcpView | UnsetType = UNSET
    process: ProcessView | UnsetType = UNSET


def seen_here(connections: Sequence[Connection]) -> tuple[ConnectionHere, ...]:
    processes = programs(connections)
    return tuple(
        ConnectionHere(
            **msgspec.structs.asdict(it),
            tcp=TcpView.of(leg) if leg else UNSET,
            process=processes.get(it.source.address, UNSET) if it.reason is None else UNSET,
        )
        for it, leg in zip(connections, endpoint_legs(connections), strict=True)
    )


def programs(connections: Sequence[Connection]) -> dict[str, ProcessView]:
    """Those of this host that have them open, by their end; as far as whoever asks may see that."""
    from meshnet.net.processes import processes_at  # only for those who look

    ends: set[Address] = set()
    try:
        for it in connections:
            if it.direction is Direction.OUTBOUND and it.reason is None:
                ends.add(parse_address(it.source.address))
        found = processes_at(ends)
    except (OSError, ValueError):
        return {}
    return {str(end): ProcessView(process.pid, process.name) for end, process in found.items()}
