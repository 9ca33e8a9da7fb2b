"""`meshnet conns`: the connections of this host's sidecar, open now and recently failed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import click

from meshnet.model.admin import (
    ConnectionEvent,
    ConnectionList,
    ConnectionListMetadata,
    FollowConnections,
    ListConnections,
)
from meshnet.model.connection import Connection
from meshnet_cli import filters, groups
from meshnet_cli.client import admin_options, stream
from meshnet_cli.columns import COLORS, COLUMNS, STREAM_WIDTHS, TABLE, WIDE, note, print_connections
from meshnet_cli.filter_flags import FilterCommand, chosen_filter, filter_options
from meshnet_cli.filters import Filter
from meshnet_cli.listing import listing
from meshnet_cli.output import (
    DURATION,
    Parsed,
    chosen_columns,
    output_options,
    print_as,
    print_json_line,
    printable,
    sort_option,
    table_options,
    warn,
)
from meshnet_cli.table import NOTE_INDENT, aligned, cell_colors

SORT_KEYS: dict[str, Callable[[Connection], float]] = {
    "age": lambda connection: connection.duration_ms,
    "tx": lambda connection: connection.bytes_sent,
    "rx": lambda connection: connection.bytes_received,
}

MARKS = {"open": "+", "close": "-", "fail": "!", "deny": "x"}
EVENT_WIDTH = len("+ close")


@click.command(
    cls=FilterCommand,
    epilog="\b\nExamples:\n"
    "  meshnet conns --to db --sort age\n"
    "  meshnet conns --plain --exit-code        # in CI: fails if anything is in plain text\n"
    "  meshnet conns -f --failed\n"
    "  meshnet conns --failed --since 10m --by service,reason\n"
    "  sudo meshnet conns --to db --min-age 1h --kill\n"
    "  meshnet conns -o json | jq '.items[].reason.code'",
)
@filter_options
@click.option("--since", type=DURATION, help="Opened or ended in this time, well or badly.")
@click.option("--recent", type=DURATION, default="60s", show_default=True, help="How far back failed ones are shown.")
@click.option("--all", "everything", is_flag=True, help="Also every ended one that the sidecar still remembers.")
@sort_option(*dict.fromkeys((*SORT_KEYS, *groups.SORT_KEYS)))
@click.option(
    "--top", type=click.IntRange(min=1), metavar="N", help="Only the first N by --sort; without it the newest."
)
@click.option(
    "--by",
    type=Parsed("keys", groups.parse_keys),
    metavar="A,B,...",
    help=f"Counts and bytes instead of rows, by any of: {', '.join(groups.KEYS)}.",
)
@click.option("--kill", "to_kill", is_flag=True, help="Reset the open ones that match, at both ends; asks before.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask, for scripts.")
@click.option("--uncaptured", "past", is_flag=True, help="Instead those that do not come through the sidecar, and why.")
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
    by: tuple[str, ...] | None,
    to_kill: bool,
    yes: bool,
    past: bool,
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
    wanted = chosen_filter(flags)
    if past:
        from meshnet_cli import uncaptured

        if since is not None or everything or by or to_kill or follow or sort not in (None, *uncaptured.SORT_KEYS):
            raise click.UsageError("--uncaptured goes with filters, --sort tx|rx, --top, --columns, --exit-code and -o")
        any_past = uncaptured.print_uncaptured(
            socket_path, wanted, columns, output, sort=sort, top=top, timeout=timeout, header=not no_header
        )
        if exit_code and any_past:
            click.get_current_context().exit(1)
        return
    names = chosen_columns(columns, WIDE if output == "wide" else TABLE, COLUMNS)
    if follow:
        if since is not None or everything or sort or top or by or to_kill or exit_code or output == "json":
            raise click.UsageError("--follow goes with filters, --columns and -o table|wide|jsonl|name only")
        events = stream(socket_path, FollowConnections(), ConnectionEvent, timeout=timeout)
        _follow(events, wanted, names, output, no_header=no_header)
        return

    if by and columns is not None:
        raise click.UsageError("--columns goes without --by")
    if sort is not None and sort not in (groups.SORT_KEYS if by else SORT_KEYS):
        raise click.UsageError(f"--sort {sort} {'does not go' if by else 'goes only'} with --by")
    if to_kill:
        from meshnet_cli import kill

        if by or exit_code:
            raise click.UsageError("--kill goes with filters, --since, --sort, --top, --columns and -o only")
        kill.need_choice(wanted, everything=everything or since is not None)
    elif yes:
        raise click.UsageError("--yes goes with --kill only")

    everything = everything and not to_kill
    well = everything or (since is not None and not to_kill and not _only_open_or_failed(wanted))
    reach = max(recent, since or 0.0)
    question = ListConnections(recent=reach, all=well)
    found = listing(socket_path, question, timeout=timeout, wanted=wanted, since=since)
    if silent := found.metadata.silent_workers:
        warn(f"workers that did not answer: {silent}; what they have is missing here (see meshnet status)")
    matching = found.items
    if by:
        _print_groups(matching, by, sort, top, output, header=not no_header)
    elif to_kill:
        still_open = _top([connection for connection in matching if filters.is_open(connection)], sort, top)
        kill.kill(socket_path, still_open, names, output, timeout=timeout, yes=yes, header=not no_header)
    else:
        when = "" if everything else f" in the last {reach:g}s"
        earliest = None if everything else filters.moment(found.metadata.generated_at, -reach)
        notes = [_totals(matching, found.known, when), *_past(found.metadata)]
        notes += _forgotten(found.metadata, earliest, well=well)
        _print(found.metadata, _top(matching, sort, top), names, output, notes, header=not no_header)
    if exit_code and matching:
        click.get_current_context().exit(1)


def _top(connections: Sequence[Connection], sort: str | None, top: int | None) -> Sequence[Connection]:
    """As they came they are in the order of time."""
    if sort:
        return sorted(connections, key=SORT_KEYS[sort], reverse=True)[:top]
    return connections[-top:] if top else connections


def _print_groups(
    connections: Sequence[Connection],
    keys: Sequence[str],
    sort: str | None,
    top: int | None,
    output: str,
    *,
    header: bool,
) -> None:
    found = groups.grouped(connections, keys)
    if sort:
        found.sort(key=groups.SORT_KEYS[sort], reverse=True)
    shown = found[:top]
    print_as(
        output,
        groups.ConnectionGroupList(items=tuple(shown)),
        shown,
        name=groups.group_name,
        table=lambda: groups.print_groups(shown, keys, header=header),
    )


def _print(
    metadata: ConnectionListMetadata,
    shown: Sequence[Connection],
    names: Sequence[str],
    output: str,
    notes: Sequence[str],
    *,
    header: bool,
) -> None:
    def table() -> None:
        print_connections(shown, names, header=header)
        if header:
            click.echo("\n".join(notes))

    items = tuple(shown)
    if output in {"json", "jsonl"}:
        from meshnet_cli.here import seen_here  # only for those who look

        items = seen_here(shown)
    whole = ConnectionList(metadata=metadata, items=items)
    print_as(output, whole, items, name=lambda connection: connection.id, table=table)


def _forgotten(metadata: ConnectionListMetadata, earliest: float | None, *, well: bool) -> Iterator[str]:
    """What there is no memory of, of what was asked for: since `earliest` (None: since ever), with `well` all of it."""
    back, failed_back = metadata.reaches_back if well else "", metadata.failed_reach_back
    for what, moment in (("ended", back), ("failed", failed_back)):
        if moment and (earliest is None or filters.moment(moment) > earliest):
            yield f"Of what {what} before {moment} not all is remembered (admin.memory_mib)."


def _past(metadata: ConnectionListMetadata) -> Iterator[str]:
    if count := metadata.uncaptured:
        yield f"{count} open got past the sidecar: meshnet conns --uncaptured lists {'it' if count == 1 else 'them'}."


def _only_open_or_failed(wanted: Filter) -> bool:
    return any(set(group) <= {filters.is_open, filters.is_failed} for group in wanted.wanted)


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
