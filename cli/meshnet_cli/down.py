"""`meshnet down`: takes this host out of the mesh without cutting what is open."""

import os
import re
from pathlib import Path

import click

from meshnet.errors import CommandError, ConfigError
from meshnet.model.settings import AdminSection, Settings
from meshnet_cli import preflight, supervise
from meshnet_cli.configuration import DEFAULT_CONFIG, config_option, read_settings
from meshnet_cli.main import EXIT_CONFIG
from meshnet_cli.output import DURATION, warn


@click.command(
    "down",
    short_help="Take this host out of the mesh; open connections live on.",
    epilog="\b\nExamples:\n  sudo meshnet down\n  sudo meshnet down --drain 5m",
)
@config_option
@click.option("--drain", type=DURATION, default="30s", show_default=True, help="How long to wait for open connections.")
def command(config: str | None, drain: float) -> None:
    """Take this host out of the mesh, in three phases.

    New connections go direct at once; those that went through the sidecar are waited for; then the rules are deleted
    and the sidecar ends. Nothing is cut unless it outlives --drain: such connections are reset. When nothing is up,
    nothing is done. It works with a meshnet.toml that is wrong, too.
    """
    mistake: ConfigError | None = None
    try:
        settings = read_settings(config)
    except ConfigError as error:  # the way out does not depend on what may be the reason to leave
        mistake = error
        settings = Settings(admin=AdminSection(socket=_admin_socket(config)))
        warn(f"the settings are wrong: {error}")
    from meshnet_init.remove import remove

    preflight.need_right("down")
    stopped = False

    def cut() -> None:
        nonlocal stopped
        stopped = supervise.cut(settings)

    removed = remove(drain=drain, waiting=lambda left: click.echo(f"  waiting for {left} open connections"), cut=cut)
    click.echo(f"✓ rules      {'removed' if removed.backends else 'there were none'}")
    if removed.cut:
        click.echo(f"! {removed.cut} connections were still open after {drain:g} s and are cut", err=True)
    stopped = supervise.stop(settings, drain=0.0 if removed.cut else drain) or stopped
    click.echo(f"✓ proxy      {'stopped' if stopped else 'there was none'}")
    if mistake is not None and not stopped:
        raise CommandError(
            f"no sidecar was found at {settings.admin.socket}; if there is one, it still runs",
            why=f"the settings that name its socket are wrong: {mistake}",
            fix="mend them, then again: sudo meshnet down",
            code=EXIT_CONFIG,
        )


def _admin_socket(config: str | None) -> str:
    """What wrong settings say of it. No other key is called `socket`, so that a file that is no TOML may tell too."""
    if path := os.environ.get("MESHNET_ADMIN__SOCKET"):
        return path
    try:
        text = Path(config or DEFAULT_CONFIG).read_text(errors="replace")
    except OSError:
        text = ""
    found = re.search(r"""^\s*(?:admin\s*\.\s*)?socket\s*=\s*["']([^"']+)["']""", text, re.MULTILINE)
    return found[1] if found else AdminSection().socket
