"""`meshnet stat`: how much each service is called, and how much of that fails, over a moment or since the start."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import click
import msgspec

from meshnet.errors import CommandError
from meshnet.model.admin import EndpointList, Family, FamilyList, GetMetrics, ListEndpoints
from meshnet_cli.client import EXIT_FAILED, admin_options, ask
from meshnet_cli.output import (
    DURATION,
    chosen_columns,
    milliseconds,
    output_options,
    print_as,
    size,
    sort_option,
    table_options,
)
from meshnet_cli.rates import ServiceRates, Stat, Times, stat
from meshnet_cli.table import table_lines

COLUMNS: Mapping[str, Callable[[ServiceRates], str]] = {
    "SERVICE": lambda it: it.service,
    "DIR": lambda it: {"outbound": "out", "inbound": "in"}.get(it.direction, it.direction),
    "OPEN": lambda it: str(it.open),
    "OPENED/S": lambda it: rate(it.opened_per_second),
    "FAILED/S": lambda it: rate(it.failed_per_second),
    "TX/S": lambda it: size(round(it.sent_per_second)),
    "RX/S": lambda it: size(round(it.received_per_second)),
    "P50": lambda it: _p50(it.connect),
    "P99": lambda it: _p99(it.connect),
    "FAILED": lambda it: str(it.failed),
    "OPENED": lambda it: str(it.opened),
    "TX": lambda it: size(it.bytes_sent),
    "RX": lambda it: size(it.bytes_received),
    "LASTED_P50": lambda it: _p50(it.duration),
    "LASTED_P99": lambda it: _p99(it.duration),
    "QUEUE_P99": lambda it: _p99(it.queue),
    "RETRIES": lambda it: str(it.retries),
    "DENIED": lambda it: str(it.retries_denied),
}
WIDE = tuple(COLUMNS)
TABLE = WIDE[: WIDE.index("FAILED") + 1]

SORT_KEYS: Mapping[str, Callable[[ServiceRates], float]] = {
    "open": lambda it: it.open,
    "opened": lambda it: it.opened_per_second,
    "failed": lambda it: it.failed_per_second,
    "tx": lambda it: it.sent_per_second,
    "rx": lambda it: it.received_per_second,
}

interval_option = click.option(
    "--interval", type=DURATION, default="1s", show_default=True, help="The time that rates are of."
)


@click.command(
    "stat",
    short_help="Rates and totals of each service.",
    epilog="\b\nExamples:\n  meshnet stat\n  meshnet stat api --interval 10s\n"
    "  meshnet stat -o jsonl | jq 'select(.failedPerSecond > 0)'",
)
@click.argument("service", default="")
@interval_option
@sort_option(*SORT_KEYS)
@table_options
@output_options
@admin_options
def command(
    *,
    service: str,
    interval: float,
    sort: str | None,
    no_header: bool,
    columns: str | None,
    output: str,
    socket_path: str,
    timeout: float,
) -> None:
    """How much each service is called, and how much of that fails.

    Rates are of --interval; OPEN is now, and FAILED, like all that -o wide adds, since the sidecar started. DIR is out
    for what this host calls, in for what it serves. TX and RX are as the client sends and receives. P50 and P99 are of
    the time from accept until both legs were up, of the connections that ended in the interval, or if none did, since
    the sidecar started; LASTED is until their end, QUEUE what those waited for the limits that had to. DENIED are
    retries for which the budget had no room.
    """
    names = chosen_columns(columns, WIDE if output == "wide" else TABLE, COLUMNS)
    need_service(service, socket_path, timeout)
    found = next(stats(socket_path, interval, timeout))
    shown = chosen(found, service, sort)

    def table() -> None:
        lines = stat_lines(shown, names, header=not no_header)
        click.echo("\n".join(lines))

    print_as(output, shown, shown.items, name=lambda it: it.service, table=table)


def need_service(service: str, socket_path: str, timeout: float) -> None:
    """Raises CommandError if neither the mesh nor the metrics know one of that name."""
    if service:
        families, _ = _look(socket_path, timeout)
        if not chosen(stat(families, families, 1.0), service, None).items:  # it may just not have been called yet
            found = ask(socket_path, ListEndpoints(service=service), EndpointList, timeout=timeout)
            if not found.items:
                why = "the sidecar knows none, and has counted nothing of one"
                fix = "meshnet endpoints lists them all"
                raise CommandError(f"no service {service!r}", why=why, fix=fix, code=EXIT_FAILED)


def stats(socket_path: str, interval: float, timeout: float) -> Iterator[Stat]:
    """One after each interval, without end. Raises CommandError as `ask` does."""
    earlier, then = _look(socket_path, timeout)
    while True:
        time.sleep(interval)  # noqa: TID251 - an interval is what was asked for
        later, now = _look(socket_path, timeout)
        yield stat(earlier, later, now - then)
        earlier, then = later, now


def chosen(found: Stat, service: str, sort: str | None) -> Stat:
    """Of `service` alone, if it is not empty; with or without its port."""
    items = [it for it in found.items if service in ("", it.service, it.service.rpartition(":")[0])]
    if sort:
        items.sort(key=SORT_KEYS[sort], reverse=True)
    if service:  # the times of all would be read as its own
        found = msgspec.structs.replace(found, connect=items[0].connect if len(items) == 1 else None)
    return msgspec.structs.replace(found, items=tuple(items))


def stat_lines(found: Stat, names: Sequence[str], *, header: bool) -> list[str]:
    """A table; with `header` also what failed of late below each row, and the totals."""
    rows = [[COLUMNS[name](it) for name in names] for it in found.items]
    notes = [_reasons(it) for it in found.items] if header else []
    lines = table_lines(names, rows, header=header, notes=notes)
    return [*lines, _totals(found)] if header else lines


def rate(value: float) -> str:
    """A second: `0`, `0.5`, `12`, `1.2K`."""
    return f"{value:.1f}".removesuffix(".0") if value < 9.95 else size(round(value))


def _p50(times: Times | None) -> str:
    return milliseconds(times.p50_ms if times else None)


def _p99(times: Times | None) -> str:
    return milliseconds(times.p99_ms if times else None)


def _reasons(it: ServiceRates) -> str:
    return ", ".join(f"{reason} {rate(value)}/s" for reason, value in it.failed_per_second_by_reason.items())


def _totals(found: Stat) -> str:
    items = found.items
    parts = [
        f"{sum(it.open for it in items)} open",
        f"{rate(sum(it.opened_per_second for it in items))} opened/s",
        f"{rate(sum(it.failed_per_second for it in items))} failed/s",
    ]
    if (connect := found.connect) is not None:
        since = " since it started" if connect.within == "start" else ""
        parts.append(f"connect p50 {milliseconds(connect.p50_ms)} p99 {milliseconds(connect.p99_ms)}{since}")
    return ", ".join(parts) + "."


def _look(socket_path: str, timeout: float) -> tuple[tuple[Family, ...], float]:
    """And when, in monotonic seconds."""
    families = ask(socket_path, GetMetrics(), FamilyList, timeout=timeout).items
    return families, time.monotonic()
