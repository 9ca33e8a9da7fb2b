"""A connection as cells of a table. What it is called here, `explain` calls it too."""

import shlex
from collections.abc import Callable, Mapping, Sequence

from meshnet.errors import Reason
from meshnet.model.address import parse_address
from meshnet.model.canary import is_canary
from meshnet.model.connection import Connection, Direction, Security
from meshnet.model.identity import short_name
from meshnet_cli.output import age, milliseconds, size
from meshnet_cli.table import Colors, print_table

CANARY = "(rules verify)"
"""Stands in the SERVICE column for a connection that is nobody's traffic; a service's name has no parentheses."""


def client_name(connection: Connection) -> str:
    source = connection.source
    return source.service or short_name(source.identity) or source.address or "-"


def service_name(connection: Connection) -> str:
    destination = connection.destination
    if goes_to_canary(connection):
        return CANARY
    return destination.service or connection.original_destination or destination.address or "-"


def goes_to_canary(connection: Connection) -> bool:
    """Whether `meshnet rules verify` opened it, or `up`, to see whether the rules capture."""
    if connection.direction is not Direction.OUTBOUND or connection.destination.service:
        return False
    try:
        return is_canary(parse_address(connection.original_destination))
    except ValueError:
        return False


def direction_name(connection: Connection) -> str:
    return "in" if connection.direction is Direction.INBOUND else "out"


def tls_name(connection: Connection) -> str:
    """Plain text stands out; a connection without an endpoint leg has neither."""
    return {Security.MTLS: "mtls", Security.PLAIN: "PLAIN", Security.NONE: "-"}[connection.tls.mode]


COLUMNS: Mapping[str, Callable[[Connection], str]] = {
    "ID": lambda connection: connection.id,
    "DIR": direction_name,
    "CLIENT": client_name,
    "SERVICE": service_name,
    "ENDPOINT": lambda connection: connection.endpoint or "-",
    "TLS": tls_name,
    "POLICY": lambda connection: connection.policy or "-",
    "AGE": lambda connection: age(connection.duration_ms / 1000),
    "TX": lambda connection: size(connection.bytes_sent),
    "RX": lambda connection: size(connection.bytes_received),
    "STATE": lambda connection: connection.state.value,
    "IDLE": lambda connection: "-" if connection.idle_ms is None else age(connection.idle_ms / 1000),
    "CONNECT": lambda connection: milliseconds(connection.connect_ms),
    "TLS_MS": lambda connection: milliseconds(connection.tls.handshake_ms),
    "TRIES": lambda connection: str(len(connection.attempts)),
    "ORIG_DST": lambda connection: connection.original_destination or "-",
    "SRC_IDENTITY": lambda connection: connection.source.identity or "-",
    "DST_IDENTITY": lambda connection: connection.destination.identity or "-",
    "RELAY": lambda connection: connection.relay or "-",
    "REASON": lambda connection: connection.reason.code.value if connection.reason else "-",
    "PROCESS": lambda _: "-",  # a record does not know it; see _looked_up
    "LEG_PORT": lambda connection: str(connection.leg_port or "-"),
    "RTT": lambda _: "-",  # nor these
    "RETRANS": lambda _: "-",
}
WIDE = tuple(COLUMNS)
TABLE = WIDE[: WIDE.index("STATE") + 1]

COLORS: Colors = {
    "TLS": {"PLAIN": "yellow"},
    "STATE": {"refused": "red", "denied": "red", "failed": "red", "queued": "yellow"},
}

# A stream cannot wait for its widest row; wider cells push the rest of their line to the right.
STREAM_WIDTHS: Mapping[str, int] = {
    "ID": 8,
    "DIR": 3,
    "CLIENT": 16,
    "SERVICE": 16,
    "ENDPOINT": 18,
    "TLS": 5,
    "POLICY": 12,
    "AGE": 6,
    "TX": 5,
    "RX": 5,
}


def print_connections(connections: Sequence[Connection], columns: Sequence[str], *, header: bool = True) -> None:
    """A table of them; without `header` also without the second lines."""
    found = _looked_up(connections, columns)
    cells = [found.get(name) or [COLUMNS[name](connection) for connection in connections] for name in columns]
    rows = list(zip(*cells, strict=True))
    notes = [note(connection) for connection in connections] if header else []
    print_table(columns, rows, header=header, notes=notes, colors=COLORS)


def _looked_up(connections: Sequence[Connection], columns: Sequence[str]) -> dict[str, list[str]]:
    """The cells of those columns that say what the kernel of this host knows."""
    found = {}
    if "PROCESS" in columns:
        from meshnet_cli.here import programs  # only for those who look

        known = programs(connections)
        processes = (known.get(connection.source.address) for connection in connections)
        found["PROCESS"] = [f"{process.name}[{process.pid}]" if process else "-" for process in processes]
    if "RTT" in columns or "RETRANS" in columns:
        from meshnet_cli.legs import endpoint_legs  # only for those who look

        legs = endpoint_legs(connections)
        found["RTT"] = [milliseconds(leg.rtt_us / 1000) if leg else "-" for leg in legs]
        found["RETRANS"] = [str(leg.retransmits) if leg else "-" for leg in legs]
    return found


def note(connection: Connection) -> str:
    """The second line of a row that did not end well: why, and where to read on. Empty for all others."""
    reason = connection.reason
    if reason is None or reason.code is Reason.OK:
        return ""
    # The id may have been made by the peer's sidecar, and this line is made to be pasted into a shell.
    return "  ".join(filter(None, (reason.code, reason.message, f"meshnet explain {shlex.quote(connection.id)}")))
