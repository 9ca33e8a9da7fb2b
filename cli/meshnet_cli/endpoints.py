"""`meshnet endpoints`: what stands behind each service, and which of it gets no connections just now."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import click

from meshnet.errors import CommandError
from meshnet.model.admin import EndpointList, EndpointView, ListEndpoints
from meshnet_cli.client import EXIT_FAILED, admin_options, ask
from meshnet_cli.output import (
    age,
    chosen_columns,
    output_options,
    print_as,
    sort_option,
    table_options,
)
from meshnet_cli.table import Colors, print_table

COLUMNS: Mapping[str, Callable[[EndpointView], str]] = {
    "SERVICE": lambda endpoint: endpoint.service,
    "ENDPOINT": lambda endpoint: _address(endpoint),
    "TUNNEL": lambda endpoint: endpoint.tunnel,
    "WEIGHT": lambda endpoint: str(endpoint.weight),
    "STATE": lambda endpoint: endpoint.state,
    "CONNS": lambda endpoint: str(endpoint.connections),
    "PENDING": lambda endpoint: str(endpoint.pending),
    "FAILS": lambda endpoint: str(endpoint.failures),
    "OPEN_FOR": lambda endpoint: age(endpoint.open_for_seconds) if endpoint.open_for_seconds else "-",
    "EJECTED_FOR": lambda endpoint: age(endpoint.ejected_for_seconds) if endpoint.ejected_for_seconds else "-",
    "CHECK": lambda endpoint: endpoint.check or "-",
    "LAST_ERROR": lambda endpoint: _error(endpoint) or "-",
    "CONNECT": lambda endpoint: "-" if endpoint.connect_ms is None else f"{endpoint.connect_ms:.1f}ms",
    "WORKERS": lambda endpoint: str(endpoint.workers) if endpoint.workers else "-",
    "IDENTITY": lambda endpoint: endpoint.identity or "-",
}
WIDE = tuple(COLUMNS)
TABLE = WIDE[: WIDE.index("LAST_ERROR") + 1]
COLORS: Colors = {
    "STATE": {"open": "red", "half-open": "yellow", "ejected": "red", "draining": "yellow", "unresolved": "red"},
    "CHECK": {"failing": "red", "panic": "red"},
}

SORT_KEYS: Mapping[str, Callable[[EndpointView], float]] = {
    "conns": lambda endpoint: endpoint.connections,
    "pending": lambda endpoint: endpoint.pending,
    "fails": lambda endpoint: endpoint.failures,
}


@click.command(
    epilog="\b\nExamples:\n  meshnet endpoints\n  meshnet endpoints api:8080 -o wide\n"
    "  meshnet endpoints -o jsonl | jq 'select(.state != \"healthy\")'",
)
@click.argument("service", default="")
@sort_option(*SORT_KEYS)
@table_options
@output_options
@admin_options
def command(
    *,
    service: str,
    sort: str | None,
    no_header: bool,
    columns: str | None,
    output: str,
    socket_path: str,
    timeout: float,
) -> None:
    """Endpoints behind each service: healthy, or why they get nothing.

    STATE is open where the breaker is: it failed so often in a row that it gets no connections for OPEN_FOR. Then it is
    half-open, and one connection probes it. An ejected one fails far more often than it should, and gets none for
    EJECTED_FOR. A draining one has the weight 0: it keeps what it has, and gets nothing new. CHECK is what active
    checks say: one that is failing gets no connections; panic: all are failing, and are used all the same. An endpoint
    that the Service gives by a DNS name has that beside its address. Where there are workers, each judges for itself:
    STATE and CHECK are the worst of theirs, and WORKERS says how many see STATE so.
    """
    names = chosen_columns(columns, WIDE if output == "wide" else TABLE, COLUMNS)
    answer = ask(socket_path, ListEndpoints(service=service), EndpointList, timeout=timeout)
    if service and not answer.items:
        raise CommandError(
            f"no endpoint of {service!r}",
            why="the sidecar knows no such service, or it has no endpoints",
            fix="meshnet endpoints lists them all",
            code=EXIT_FAILED,
        )
    items = sorted(answer.items, key=SORT_KEYS[sort], reverse=True) if sort else list(answer.items)

    def table() -> None:
        rows = [[COLUMNS[name](endpoint) for name in names] for endpoint in items]
        print_table(names, rows, header=not no_header, colors=COLORS)
        if not no_header:
            click.echo(_totals(items))

    whole = EndpointList(items=tuple(items))
    print_as(output, whole, items, name=lambda endpoint: endpoint.endpoint or endpoint.dns_name, table=table)


def _address(endpoint: EndpointView) -> str:
    """With the name beside it, if it has one; the name alone while no address of it is known."""
    name = f"({endpoint.dns_name})" if endpoint.dns_name else ""
    return " ".join(part for part in (endpoint.endpoint, name) if part)


def _error(endpoint: EndpointView) -> str:
    """What keeps it from getting connections, if anything does, before what is long over."""
    checks_say = endpoint.check in ("failing", "panic")
    return (checks_say and endpoint.check_error) or endpoint.last_error or endpoint.dns_problem or endpoint.check_error


def _totals(items: Sequence[EndpointView]) -> str:
    states = Counter(endpoint.state for endpoint in items)
    well = sum(endpoint.state == "healthy" and endpoint.check in ("", "passing") for endpoint in items)
    failing = sum(endpoint.check in ("failing", "panic") for endpoint in items)
    counts = [(state, states[state]) for state in ("open", "half-open", "ejected", "draining")]
    counts.append(("failing checks", failing))
    return ", ".join([f"{well} of {len(items)} healthy", *(f"{count} {what}" for what, count in counts if count)]) + "."
