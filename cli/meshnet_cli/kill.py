"""`meshnet conns --kill`: resets open connections, asked for by filters and confirmed by a person."""

import sys
from collections.abc import Sequence
from itertools import chain

import click
import msgspec

from meshnet.errors import CommandError
from meshnet.model.admin import Accepted, ConnectionKey, KillConnections
from meshnet.model.connection import Connection
from meshnet_cli import filters
from meshnet_cli.client import EXIT_FAILED, ask
from meshnet_cli.columns import print_connections
from meshnet_cli.filters import Filter
from meshnet_cli.output import print_as

_AT_ONCE = 200  # in one request, which is a line of at most 64 KiB


class KilledConnections(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """`items` are those that matched, as they were before; `reset`: how many of them were still open then."""

    reset: int
    items: tuple[Connection, ...]
    api_version: str = "meshnet.dev/v1"
    kind: str = "KilledConnections"


def need_choice(wanted: Filter, *, everything: bool) -> None:
    """Raises UsageError where no filter chooses among the open ones, unless every one is meant."""
    says_nothing = set(chain(*wanted.wanted)) <= {filters.is_open} and set(wanted.unwanted) <= {filters.is_failed}
    if says_nothing and not everything:
        raise click.UsageError(
            "--kill takes a filter, as in: meshnet conns --to db --kill; or --all for every open one"
        )


def kill(
    socket_path: str,
    chosen: Sequence[Connection],
    names: Sequence[str],
    output: str,
    *,
    timeout: float,
    yes: bool,
    header: bool,
) -> None:
    """Shows them, asks, and resets them. Raises CommandError: code 1 if the person says no, 2 if there is nobody."""
    is_table = output in {"table", "wide"}
    if not yes and not (is_table and sys.stdin.isatty()):
        raise CommandError(
            "nobody is there to be asked",
            why="without a terminal, and with -o json, jsonl or name, --kill does not ask",
            fix="look first without --kill; then add --yes",
            code=2,
        )
    if is_table and chosen:
        print_connections(chosen, names, header=header)
    if not yes and chosen and not click.confirm(f"Reset {_count(len(chosen))}, at both ends?", err=True):
        raise CommandError("nothing was reset", code=EXIT_FAILED)
    reset = sum(_reset(socket_path, chosen[at : at + _AT_ONCE], timeout) for at in range(0, len(chosen), _AT_ONCE))

    def told() -> None:
        if not chosen:
            click.echo("no open connection matches")
        elif reset == len(chosen):
            click.echo(f"{_count(reset)} reset")
        else:
            click.echo(f"{reset} of {_count(len(chosen))} reset; the others had ended by then")

    whole = KilledConnections(reset=reset, items=tuple(chosen))
    print_as(output, whole, chosen, name=lambda connection: connection.id, table=told)


def _reset(socket_path: str, some: Sequence[Connection], timeout: float) -> int:
    keys = tuple(
        ConnectionKey(id=it.id, direction=it.direction, opened_at=it.opened_at, source=it.source.address) for it in some
    )
    return ask(socket_path, KillConnections(connections=keys), Accepted, timeout=timeout).connections


def _count(connections: int) -> str:
    return f"{connections} connection{'' if connections == 1 else 's'}"
