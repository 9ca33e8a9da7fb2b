"""`meshnet conns`: the connections of this host's sidecar, open now and recently failed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import click
import msgspec

from meshnet.model.admin import ConnectionEvent, ConnectionList, FollowConnections, ListConnections
from meshnet.model.connection import Connection
from meshnet_cli import filters
from meshnet_cli.client import admin_options, ask, stream
from meshnet_cli.columns import COLORS, COLUMNS, STREAM_WIDTHS, TABLE, WIDE, note, print_connections
from meshnet_cli.filters import Filter, Predicate
from meshnet_cli.output import (
    DURATION,
    Parsed,
    chosen_columns,
    output_options,
    parse_size,
    print_as,
    print_json_line,
    printable,
    sort_option,
    table_options,
    warn,
)
from meshnet_cli.table import NOTE_INDENT, aligned, cell_colors


@dataclass(frozen=True, slots=True)
class Flag:
    """One filter: a flag that takes a value (`make`) or stands for itself (`holds`). Flags of a group are OR."""

    name: str
    help: str
    make: Callable[[str], Predicate] | None = None
    metavar: str = ""
    holds: Predicate | None = None
    group: str = ""


_WHO = "NAME|IP|CIDR|SPIFFE"
FLAGS = (
    Flag("from", "Who opened it.", filters.client, _WHO),
    Flag("to", "Where it went.", filters.server, _WHO),
    Flag("peer", "Either of the two.", filters.peer, _WHO),
    Flag("service", "The service called, with or without its port.", filters.service, "NAME"),
    Flag("port", "The port called.", filters.port, "PORT"),
    Flag("dir", "Into this host or out of it.", filters.direction, "in|out"),
    Flag("state", "As in the STATE column.", filters.state, "STATE"),
    Flag("open", "Not ended.", holds=filters.is_open, group="state"),
    Flag("failed", "Refused, denied or failed.", holds=filters.is_failed, group="state"),
    Flag("tls", "How the leg between the hosts is protected.", filters.tls, "mtls|plain|none"),
    Flag("plain", "The same as --tls plain.", holds=filters.is_plain, group="tls"),
    Flag("identity", "The SPIFFE id of either side; * is a wildcard.", filters.identity, "GLOB"),
    Flag("policy", "The policy that allowed or denied it.", filters.policy, "GLOB"),
    Flag("reason", "Why it ended, such as breaker.open or 'connect.*'.", filters.reason, "CODE|GLOB"),
    Flag("min-age", "At least this old.", filters.min_age, "DURATION"),
    Flag("min-bytes", "At least this much, both ways together.", lambda t: filters.min_bytes(parse_size(t)), "SIZE"),
)
_NAMES = frozenset(flag.name for flag in FLAGS)

SORT_KEYS: dict[str, Callable[[Connection], float]] = {
    "age": lambda connection: connection.duration_ms,
    "tx": lambda connection: connection.bytes_sent,
    "rx": lambda connection: connection.bytes_received,
}

MARKS = {"open": "+", "close": "-", "fail": "!", "deny": "x"}
EVENT_WIDTH = len("+ close")


class FilterCommand(click.Command):
    """Reads `--not --to db` as `--not-to db`, so that click does the rest."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _joined_not(args, ctx))


def _joined_not(args: Sequence[str], ctx: click.Context) -> list[str]:
    joined: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg == "--not":
            inverted = next(rest, "")
            if inverted.removeprefix("--").partition("=")[0] not in _NAMES:
                raise click.UsageError("--not stands before the filter it inverts, as in: --not --to db", ctx)
            arg = "--not-" + inverted.removeprefix("--")
        joined.append(arg)
    return joined


def filter_options(command: Any) -> Any:
    """Every flag of FLAGS, and its hidden inverse. The command gets them as keyword arguments."""
    command = click.option(
        "--not", is_flag=True, expose_value=False, help="Inverts the next filter, as in: --not --to db."
    )(command)
    for flag in reversed(FLAGS):
        for prefix, hidden in (("not-", True), ("", False)):
            name = f"--{prefix}{flag.name}"
            if flag.make is None:
                option = click.option(name, is_flag=True, hidden=hidden, help=flag.help)
            else:
                kind = Parsed(flag.name, flag.make)
                option = click.option(
                    name, type=kind, multiple=True, metavar=flag.metavar, hidden=hidden, help=flag.help
                )
            command = option(command)
    return command


@click.command(
    cls=FilterCommand,
    epilog="\b\nExamples:\n"
    "  meshnet conns --to db --sort age\n"
    "  meshnet conns --plain --exit-code        # in CI: fails if anything is in plain text\n"
    "  meshnet conns -f --failed\n"
    "  meshnet conns -o json | jq '.items[].reason.code'",
)
@filter_options
@click.option("--since", type=DURATION, help="Opened or ended in this time.")
@click.option("--recent", type=DURATION, default="60s", show_default=True, help="How far back failed ones are shown.")
@click.option("--all", "everything", is_flag=True, help="Also every ended one that the sidecar still remembers.")
@sort_option(*SORT_KEYS)
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="Only the first N.")
@click.option("-f", "--follow", is_flag=True, help="Open ones, then a line for each event; Ctrl-C ends it.")
@click.option("--exit-code", is_flag=True, help="Exit with 1 if any row matches.")
@table_options
@output_options
@admin_options
def command(
    *,
    since: float | None,
    recent: float,
    everything: bool,
    sort: str | None,
    top: int | None,
    follow: bool,
    exit_code: bool,
    no_header: bool,
    columns: str | None,
    output: str,
    socket_path: str,
    timeout: float,
    **flags: Any,
) -> None:
    """Connections: open now, and recently failed.

    A filter given twice means either; different filters mean all of them. TX and RX are bytes as the client sent and
    received them.
    """
    wanted = _filter(flags)
    names = chosen_columns(columns, WIDE if output == "wide" else TABLE, COLUMNS)
    if follow:
        if since is not None or everything or sort or top or exit_code or output == "json":
            raise click.UsageError("--follow goes with filters, --columns and -o table|wide|jsonl|name only")
        events = stream(socket_path, FollowConnections(), ConnectionEvent, timeout=timeout)
        _follow(events, wanted, names, output, no_header=no_header)
        return

    reach = max(recent, since or 0.0)
    answer = ask(socket_path, ListConnections(recent=reach, all=everything), ConnectionList, timeout=timeout)
    if silent := answer.metadata.silent_workers:
        warn(f"workers that did not answer: {silent}; what they have is missing here (see meshnet status)")
    if since is not None:
        wanted = Filter((*wanted.wanted, (filters.since(since, answer.metadata.generated_at),)), wanted.unwanted)
    matching = [connection for connection in answer.items if wanted(connection)]
    if sort:
        matching.sort(key=SORT_KEYS[sort], reverse=True)
    shown = matching[:top]

    def table() -> None:
        print_connections(shown, names, header=not no_header)
        if not no_header:
            click.echo(_totals(matching, len(answer.items), "" if everything else f" in the last {reach:g}s"))

    whole = msgspec.structs.replace(answer, items=tuple(shown))
    print_as(output, whole, shown, name=lambda connection: connection.id, table=table)
    if exit_code and matching:
        click.get_current_context().exit(1)


def _filter(flags: dict[str, Any]) -> Filter:
    """`flags`: what click read, by parameter name; a tuple of predicates, or True for a flag without a value."""
    wanted: dict[str, list[Predicate]] = {}
    unwanted: list[Predicate] = []
    for flag in FLAGS:
        name = flag.name.replace("-", "_")
        given = _predicates(flag, flags[name])
        if given:
            wanted.setdefault(flag.group or flag.name, []).extend(given)
        unwanted.extend(_predicates(flag, flags[f"not_{name}"]))
    return Filter(tuple(map(tuple, wanted.values())), tuple(unwanted))


def _predicates(flag: Flag, value: Any) -> Iterable[Predicate]:
    if flag.holds is None:
        return value  # type: ignore[no-any-return]  # click's: a tuple of what Flag.make returned
    return [flag.holds] if value else []


def _totals(matching: Sequence[Connection], known: int, when: str) -> str:
    is_open = [connection for connection in matching if filters.is_open(connection)]
    plain = sum(map(filters.is_plain, is_open))
    failed = sum(map(filters.is_failed, matching))
    ended = len(matching) - len(is_open) - failed
    parts = [f"{len(is_open)} open" + (f" ({plain} plaintext)" if plain else "")]
    parts += [f"{ended} closed"] if ended else []
    parts += [f"{failed} failed{when}"]
    hidden = known - len(matching)
    return ", ".join(parts) + "." + (f" {hidden} more {'does' if hidden == 1 else 'do'} not match." if hidden else "")


def _follow(
    events: Iterable[ConnectionEvent], wanted: Filter, names: Sequence[str], output: str, *, no_header: bool
) -> None:
    """Prints events until the reader has had enough: Ctrl-C is the ordinary end of this command."""
    widths = [EVENT_WIDTH, *(max(STREAM_WIDTHS.get(name, 10), len(name)) for name in names)]
    if output in {"table", "wide"} and not no_header:
        click.echo(aligned(["EVENT", *names], widths))
    try:
        for event in events:
            if event.connection is None or wanted(event.connection):
                _print_event(event, names, widths, output, notes=not no_header)
    except KeyboardInterrupt:
        return


def _print_event(
    event: ConnectionEvent, names: Sequence[str], widths: Sequence[int], output: str, *, notes: bool
) -> None:
    connection = event.connection
    if output == "jsonl":
        print_json_line(event)
    elif connection is None:
        click.echo(f"{event.count} events lost: this reader was too slow", err=True)
    elif event.event not in MARKS:  # `update` only says that bytes have moved
        return
    elif output == "name":
        click.echo(printable(connection.id))
    else:
        cells = [printable(COLUMNS[name](connection)) for name in names]
        mark = f"{MARKS[event.event]} {event.event}"
        click.echo(aligned([mark, *cells], widths, [None, *cell_colors(names, cells, COLORS)]))
        if notes and note(connection):
            click.echo(NOTE_INDENT + printable(note(connection)))
