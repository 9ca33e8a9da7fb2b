"""`meshnet conns --uncaptured`: what does not come through the sidecar, and why."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import click
import msgspec

from meshnet.model.admin import ListUncaptured
from meshnet.model.connection import Connection, Peer, State
from meshnet.model.uncaptured import ProcessView, UncapturedConnection, UncapturedList
from meshnet_cli.client import ask
from meshnet_cli.filters import Filter
from meshnet_cli.output import chosen_columns, milliseconds, print_as, size
from meshnet_cli.table import Colors, print_table

COLUMNS: Mapping[str, Callable[[UncapturedConnection], str]] = {
    "DIR": lambda it: "in" if it.direction == "inbound" else "out",
    "CLIENT": lambda it: it.client,
    "SERVER": lambda it: it.server,
    "WHY": lambda it: it.why,
    "SETTING": lambda it: it.setting or "-",
    "UID": lambda it: str(it.uid),
    "PROCESS": lambda it: f"{it.process.name}[{it.process.pid}]" if it.process else "-",
    "RTT": lambda it: milliseconds(None if it.rtt_us is None else it.rtt_us / 1000),
    "RETRANS": lambda it: _or_dash(it.retransmits, str),
    "TX": lambda it: _or_dash(it.bytes_sent, size),
    "RX": lambda it: _or_dash(it.bytes_received, size),
}
WIDE = tuple(COLUMNS)
TABLE = WIDE[: WIDE.index("SETTING") + 1]
COLORS: Colors = {"WHY": {"bypassed": "red", "opened-before": "yellow"}}

SORT_KEYS: Mapping[str, Callable[[UncapturedConnection], float]] = {
    "tx": lambda it: it.bytes_sent or 0,
    "rx": lambda it: it.bytes_received or 0,
}


def print_uncaptured(
    socket_path: str,
    wanted: Filter,
    columns: str | None,
    output: str,
    *,
    sort: str | None,
    top: int | None,
    timeout: float,
    header: bool,
) -> bool:
    """Whether there is one that `wanted` holds of. Raises CommandError as `ask` does."""
    names = chosen_columns(columns, WIDE if output == "wide" else TABLE, COLUMNS)
    every = ask(socket_path, ListUncaptured(), UncapturedList, timeout=timeout).items
    matching = [it for it in every if wanted(_as_connection(it))]
    if sort:
        matching.sort(key=SORT_KEYS[sort], reverse=True)
    shown: Sequence[UncapturedConnection] = matching[:top]
    if "PROCESS" in names or output in {"json", "jsonl"}:
        shown = _with_processes(shown)

    def table() -> None:
        rows = [[COLUMNS[name](it) for name in names] for it in shown]
        print_table(names, rows, header=header, colors=COLORS)
        if header:
            click.echo(_totals(matching, len(every)))

    print_as(output, UncapturedList(items=tuple(shown)), shown, name=lambda it: f"{it.client} {it.server}", table=table)
    return bool(matching)


def _as_connection(it: UncapturedConnection) -> Connection:
    """As far as a filter can ask for it."""
    return Connection(
        id="",
        direction=it.direction,
        state=State.OPEN,
        source=Peer(address=it.client),
        destination=Peer(address=it.server),
        original_destination=it.server,
        endpoint=it.server,
        bytes_sent=it.bytes_sent or 0,
        bytes_received=it.bytes_received or 0,
    )


def _with_processes(items: Sequence[UncapturedConnection]) -> Sequence[UncapturedConnection]:
    """This command may see more of them than the sidecar, which has no rights."""
    from meshnet.net.processes import processes_of

    found = processes_of({it.inode for it in items})
    return [
        msgspec.structs.replace(it, process=ProcessView(pid=process.pid, name=process.name)) if process else it
        for it in items
        for process in (found.get(it.inode),)
    ]


def _totals(matching: Sequence[UncapturedConnection], known: int) -> str:
    counts = Counter(it.why for it in matching)
    parts = [f"{len(matching)} not captured", *(f"{count} {why}" for why, count in sorted(counts.items()))]
    hidden = known - len(matching)
    return ", ".join(parts) + "." + (f" {hidden} more {'does' if hidden == 1 else 'do'} not match." if hidden else "")


def _or_dash(value: int | None, shown: Callable[[int], str]) -> str:
    return "-" if value is None else shown(value)
