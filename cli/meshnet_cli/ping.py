"""`meshnet ping`: whether a connection from this host would reach a service, seen with the sidecar's eyes."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import click
import msgspec

from meshnet.errors import CommandError
from meshnet.model.admin import Ping, endpoint_state
from meshnet.model.ping import EndpointPing, PingResult
from meshnet_cli.client import EXIT_FAILED, admin_options, ask
from meshnet_cli.output import (
    DURATION,
    chosen_columns,
    milliseconds,
    output_options,
    print_json,
    print_json_line,
    printable,
    table_options,
)
from meshnet_cli.table import Colors, print_table

_LONGER = 2.0  # seconds that the sidecar may take to end what it has opened

COLUMNS: Mapping[str, Callable[[EndpointPing], str]] = {
    "ENDPOINT": lambda it: it.endpoint,
    "TUNNEL": lambda it: it.tunnel,
    "STATE": lambda it: endpoint_state(it.breaker, it.weight, it.ejected_for_seconds),
    "CHECK": lambda it: it.check or "-",
    "TCP": lambda it: milliseconds(it.tcp_ms),
    "TLS": lambda it: milliseconds(it.tls_ms),
    "OPEN": lambda it: milliseconds(it.open_ms),
    "IDENTITY": lambda it: it.identity or "-",
    "VERDICT": lambda it: it.verdict + (f" by {it.policy}" if it.policy else ""),
    "REASON": lambda it: str(it.reason.code) if it.reason else "-",
}
TABLE = tuple(name for name in COLUMNS if name not in ("CHECK", "REASON"))  # the reason is in the line below
COLORS: Colors = {
    "STATE": {"open": "red", "half-open": "yellow", "ejected": "red", "draining": "yellow"},
    "CHECK": {"failing": "red", "panic": "red"},
    "VERDICT": {"denied": "red"},
}


class PingList(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    items: tuple[PingResult, ...]
    api_version: str = "meshnet.dev/v1"
    kind: str = "PingList"


@click.command(
    "ping",
    short_help="Whether a connection would reach a service.",
    epilog="\b\nExamples:\n  meshnet ping 10.96.0.10:8080\n  meshnet ping api:8080 --count 5\n"
    "  meshnet ping 10.0.0.2:8080           # one endpoint, by its own address\n"
    "  meshnet ping db:5432 -o json | jq '.items[].items[].tlsMs'",
)
@click.argument("target", metavar="HOST:PORT")
@click.option("--count", type=click.IntRange(min=1), default=1, metavar="N", help="How often.")
@click.option("--interval", type=DURATION, default="1s", show_default=True, help="The pause between.")
@table_options
@output_options
@admin_options
def command(
    *,
    target: str,
    count: int,
    interval: float,
    no_header: bool,
    columns: str | None,
    output: str,
    socket_path: str,
    timeout: float,
) -> None:
    """Whether a connection from this host to HOST:PORT would be captured, reach an endpoint, and be let in there.

    The sidecar dials every endpoint of the service (16 at most) as it would for an application, and ends that at once:
    TCP and TLS are the times of a new tunnel, OPEN that of the peer's answer, which its access policy and its
    application give. HOST is an address, a service of the mesh, or a name of DNS.

    Exit code 1 if an endpoint was not reached, or a connection would get none. What is not captured is told, and is no
    failure. --timeout is for each endpoint.
    """
    names = chosen_columns(columns, tuple(COLUMNS) if output == "wide" else TABLE, COLUMNS)
    results = []
    try:
        for result in _results(target, count, interval, socket_path, timeout):
            results.append(result)
            match output:
                case "jsonl":
                    print_json_line(result)
                case "name":
                    for item in result.items:
                        click.echo(printable(item.endpoint))
                case "table" | "wide":
                    _print(result, names, header=not no_header)
                case _:
                    pass  # one document, when all of them are there
    except KeyboardInterrupt:
        if not results:
            raise
    if output == "json":
        print_json(PingList(items=tuple(results)))
    if any(map(would_fail, results)):
        click.get_current_context().exit(EXIT_FAILED)


def would_fail(result: PingResult) -> bool:
    """Whether a connection could fail: it may get any endpoint that has a weight and whose checks do not fail.

    Unless its breaker is open; but that closes by itself.
    """
    willing = [item for item in result.items if item.weight and item.check != "failing"]
    if result.reason is not None or any(item.reason for item in willing):
        return True
    return not result.more and all(item.breaker == "open" for item in willing)


def _results(target: str, count: int, interval: float, socket_path: str, timeout: float) -> Iterator[PingResult]:
    for number in range(count):
        if number:
            time.sleep(interval)  # noqa: TID251 - a pause is what was asked for
        try:
            yield _ask(target, socket_path, timeout)
        except CommandError as error:
            address = _by_dns(target) if error.code == EXIT_FAILED else None
            if address is None:
                raise
            target = address
            yield _ask(target, socket_path, timeout)


def _ask(target: str, socket_path: str, timeout: float) -> PingResult:
    return ask(socket_path, Ping(target=target, timeout=timeout), PingResult, timeout=timeout + _LONGER)


def _by_dns(target: str) -> str | None:
    """The first address that the name stands for, as HOST:PORT; None if there is none."""
    import socket

    from meshnet.model.address import Address, canonical_host

    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        return None
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
        return str(Address(canonical_host(str(found[0][4][0])), int(port)))
    except (OSError, ValueError, UnicodeError):
        return None


def _print(result: PingResult, names: Sequence[str], *, header: bool) -> None:
    if header:
        click.echo(printable(_title(result)))
    if result.items:
        rows = [[COLUMNS[name](item) for name in names] for item in result.items]
        notes = [_note(item) for item in result.items] if header else []
        print_table(names, rows, header=header, notes=notes, colors=COLORS)
    if not header:
        return
    if result.reason is not None:
        click.echo(printable(f"{result.reason.code}: {result.reason.message}"))
        return
    reached = sum(item.reason is None for item in result.items)
    more = f"; {result.more} more were not tried" if result.more else ""
    click.echo(f"{reached} of {len(result.items)} reached{more}.")


def _title(result: PingResult) -> str:
    address = f" ({result.address})" if result.address not in ("", result.target) else ""
    captured = {True: "captured", False: "NOT captured", None: "capture unknown"}[result.captured]
    why = f" ({result.capture})" if result.capture else ""
    way = {"service": f"service {result.service}", "passthrough": "in no mesh, passed through", "refused": "refused"}
    return f"{result.target}{address}: {captured}{why}, {way.get(result.route, result.route)}"


def _note(item: EndpointPing) -> str:
    return "  ".join(filter(None, (item.reason.code, item.reason.message))) if item.reason is not None else ""
