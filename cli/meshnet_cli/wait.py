"""`meshnet wait`: until this host's sidecar is ready, so that what needs it starts behind it."""

import time

import click
import msgspec

from meshnet.errors import CommandError
from meshnet.model.admin import GetStatus, Status
from meshnet_cli.client import EXIT_TIMEOUT, EXIT_UNREACHABLE, ask, socket_option
from meshnet_cli.output import DURATION, output_options, print_as

_LOOK_AGAIN = 0.1  # seconds


class Waited(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    ready: bool
    seconds: float
    api_version: str = "meshnet.dev/v1"
    kind: str = "Waited"


@click.command(
    epilog="\b\nExamples:\n  meshnet wait && exec ./app\n  meshnet wait --timeout 2m\n"
    "  ExecStartPre=meshnet wait        in a unit that needs the mesh",
)
@output_options
@socket_option
@click.option("--timeout", type=DURATION, default="60s", show_default=True, help="How long to wait at most.")
def command(*, output: str, socket_path: str, timeout: float) -> None:
    """Wait until the sidecar is ready.

    Exit code 0 as soon as it is, 6 if it is not within the time, with what it is waiting for.
    """
    started = time.monotonic()
    while why := _not_ready_because(socket_path, started + timeout):
        if time.monotonic() >= started + timeout:
            raise CommandError(
                f"the sidecar is not ready within {timeout:g}s", why=why, fix="meshnet status", code=EXIT_TIMEOUT
            )
        time.sleep(_LOOK_AGAIN)  # noqa: TID251  # a socket that is not there yet cannot be waited for
    waited = Waited(ready=True, seconds=round(time.monotonic() - started, 3))
    print_as(output, waited, [waited], name=lambda _: "ready", table=lambda: click.echo("ready"))


def _not_ready_because(socket_path: str, until: float) -> str:
    """Empty when it is. Raises CommandError for what does not pass by waiting."""
    try:
        status = ask(socket_path, GetStatus(), Status, timeout=max(_LOOK_AGAIN, until - time.monotonic()))
    except CommandError as error:
        if error.code not in (EXIT_UNREACHABLE, EXIT_TIMEOUT):
            raise
        return f"{error.what}: {error.why}"
    if status.ready:
        return ""
    return "; ".join(status.not_ready_because) or ("it is draining" if status.draining else "it does not say why")
