"""`meshnet conns --by`: connections counted by what they have in common."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from meshnet.model.address import parse_address
from meshnet.model.connection import Connection
from meshnet.model.identity import short_name
from meshnet_cli import filters
from meshnet_cli.columns import direction_name, service_name, tls_name
from meshnet_cli.output import size
from meshnet_cli.table import print_table


class ConnectionGroup(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """All connections that have the values `by`, each under its key. `open` and `failed` are among `connections`."""

    by: dict[str, str]
    connections: int
    open: int
    failed: int
    bytes_sent: int
    bytes_received: int


class ConnectionGroupList(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    items: tuple[ConnectionGroup, ...]
    api_version: str = "meshnet.dev/v1"
    kind: str = "ConnectionGroupList"


KEYS: Mapping[str, Callable[[Connection], str]] = {
    "service": service_name,
    "endpoint": lambda connection: connection.endpoint or "-",
    "from": lambda connection: (
        connection.source.service or short_name(connection.source.identity) or _host(connection.source.address)
    ),
    "to": lambda connection: (
        short_name(connection.destination.identity) or _host(connection.endpoint or connection.original_destination)
    ),
    "reason": lambda connection: connection.reason.code.value if connection.reason else "-",
    "state": lambda connection: connection.state.value,
    "dir": direction_name,
    "tls": tls_name,
    "policy": lambda connection: connection.policy or "-",
    "relay": lambda connection: connection.relay or "-",
}

SORT_KEYS: Mapping[str, Callable[[ConnectionGroup], float]] = {
    "conns": lambda group: group.connections,
    "failed": lambda group: group.failed,
    "tx": lambda group: group.bytes_sent,
    "rx": lambda group: group.bytes_received,
}


def parse_keys(text: str) -> tuple[str, ...]:
    """Of `service,state`. Raises ValueError."""
    keys = tuple(dict.fromkeys(key.strip() for key in text.split(",")))
    for key in keys:
        if key not in KEYS:
            raise ValueError(f"{key!r} is not one of {', '.join(KEYS)}")
    return keys


def grouped(connections: Iterable[Connection], keys: Sequence[str]) -> list[ConnectionGroup]:
    """One for each combination of values that occurs, the largest first."""
    members: dict[tuple[str, ...], list[Connection]] = {}
    for connection in connections:
        members.setdefault(tuple(KEYS[key](connection) for key in keys), []).append(connection)
    groups = [
        ConnectionGroup(
            by=dict(zip(keys, values, strict=True)),
            connections=len(found),
            open=sum(map(filters.is_open, found)),
            failed=sum(map(filters.is_failed, found)),
            bytes_sent=sum(each.bytes_sent for each in found),
            bytes_received=sum(each.bytes_received for each in found),
        )
        for values, found in members.items()
    ]
    return sorted(groups, key=lambda group: (-group.connections, *group.by.values()))


def group_name(group: ConnectionGroup) -> str:
    return " ".join(group.by.values())


def print_groups(groups: Sequence[ConnectionGroup], keys: Sequence[str], *, header: bool) -> None:
    print_table(
        [*(key.upper() for key in keys), "CONNS", "OPEN", "FAILED", "TX", "RX"],
        [
            [
                *group.by.values(),
                *map(str, (group.connections, group.open, group.failed)),
                size(group.bytes_sent),
                size(group.bytes_received),
            ]
            for group in groups
        ],
        header=header,
    )


def _host(address: str) -> str:
    """Without the port, which for a client is another each time."""
    try:
        return parse_address(address).host
    except ValueError:
        return address or "-"
