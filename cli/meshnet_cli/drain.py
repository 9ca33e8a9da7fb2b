"""`meshnet drain`: has this host's sidecar end when what is open has ended, or in time."""

import time

import click
import msgspec

from meshnet.errors import CommandError
from meshnet.model.admin import Accepted, Drain, GetStatus, Status
from meshnet_cli.client import EXIT_TIMEOUT, EXIT_UNREACHABLE, ask, socket_option
from meshnet_cli.output import DURATION, output_options, print_as, warn

_LOOK_AGAIN = 0.2  # seconds
_LAST_RECORDS = 10.0  # seconds beyond the time that it was given, for the last to be reset and written down
_ANSWER = 5.0


class Drained(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """`connections` were open when it began; `ended`: whether the sidecar was waited for, and has ended."""

    connections: int
    ended: bool
    seconds: float
    api_version: str = "meshnet.dev/v1"
    kind: str = "Drained"


@click.command(
    epilog="\b\nExamples:\n  sudo meshnet drain\n  sudo meshnet drain --timeout 5m\n"
    "  meshnet drain --timeout 20s        as a preStop hook: less than the pod's grace period",
)
@output_options
@socket_option
@click.option(
    "--timeout", type=DURATION, default="30s", show_default=True, help="What is open then is reset, with reason drain."
)
@click.option("--wait/--no-wait", default=True, help="Come back when it has ended (the default), or at once.")
def command(*, output: str, socket_path: str, timeout: float, wait: bool) -> None:
    """Have the sidecar end without cutting what ends in time.

    It is not ready from now on, and its peers open no more connections on the tunnels they have. New connections are
    served until none is open: then it ends at once, however much time is left. SIGTERM does the same, within
    proxy.drain_timeout. A second request ends it at once.

    Its rules stay. Where systemd or a supervisor looks after it, it is started again: to take a host out of the mesh,
    type `meshnet down`.
    """
    started = time.monotonic()
    connections = ask(socket_path, Drain(timeout=timeout), Accepted, timeout=_ANSWER).connections
    if output == "table":
        click.echo(f"draining {connections} connections, for {timeout:g}s at most")
    if wait:
        _until_it_ends(socket_path, started + timeout + _LAST_RECORDS, connections)
    seconds = round(time.monotonic() - started, 3)
    drained = Drained(connections=connections, ended=wait, seconds=seconds)

    def table() -> None:
        if wait:
            click.echo(f"✓ ended after {seconds:.1f}s")

    print_as(output, drained, [drained], name=lambda _: "drained" if wait else "draining", table=table)


def _until_it_ends(socket_path: str, until: float, connections: int) -> None:
    """Says on standard error how many are left, whenever that changes. Raises CommandError if it stays."""
    while time.monotonic() < until:
        try:
            status = ask(socket_path, GetStatus(), Status, timeout=_ANSWER)
        except CommandError as error:
            if error.code == EXIT_UNREACHABLE:
                return
            if error.code != EXIT_TIMEOUT:
                return  # it hung up in the middle of its answer: that is its end
        else:
            if not status.draining:
                return  # another one, which somebody has started in its place
            if status.open_connections != connections:
                connections = status.open_connections
                warn(f"{connections} connections are open")
        time.sleep(_LOOK_AGAIN)  # noqa: TID251  # the end of a process that is not ours is polled; nothing tells us
    raise CommandError(
        "the sidecar has not ended", why="it drains still", fix="meshnet conns; meshnet status", code=EXIT_TIMEOUT
    )
