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
from meshnet_cli.vm import deadman, systemd, turn
from meshnet_cli.vm.ledger import Ledger
from meshnet_cli.vm.unfinished import note_of_up


@click.command(
    "down",
    short_help="Take this host out of the mesh; open connections live on.",
    epilog="\b\nExamples:\n  sudo meshnet down\n  sudo meshnet down --drain 5m\n  sudo meshnet down --purge",
)
@config_option
@click.option("--drain", type=DURATION, default="30s", show_default=True, help="How long to wait for open connections.")
@click.option("--purge", is_flag=True, help="Then take away all that meshnet made here: units, users, groups, files.")
def command(config: str | None, drain: float, purge: bool) -> None:
    """Take this host out of the mesh, in three phases.

    New connections go direct at once; those that went through the sidecar are waited for; then the rules are deleted
    and the sidecar ends, and is not there after a reboot. Nothing is cut unless it outlives --drain: such connections
    are reset. When nothing is up, nothing is done. It works with a meshnet.toml that is wrong, too.

    --purge takes away what `meshnet up` and `meshnet set` have made, an authority among it, and nothing else.
    """
    mistake: ConfigError | None = None
    try:
        settings = read_settings(config)
    except ConfigError as error:  # the way out does not depend on what may be the reason to leave
        mistake = error
        settings = Settings(admin=AdminSection(socket=_admin_socket(config)))
        warn(f"the settings are wrong: {error}")
    from meshnet_init.remove import remove

    preflight.need_right()
    turn.hold()
    preflight.need_here(supervise.heard(settings))  # else it would end, and its rules stay; one that is mute may be
    _finish(settings, Path(config or DEFAULT_CONFIG).resolve())
    service = systemd.Service(settings, config) if systemd.is_here() and systemd.is_installed() else None
    keeper = service or supervise.Supervised(settings, config)
    stopped = False

    def cut() -> None:
        nonlocal stopped
        try:
            stopped = keeper.stop(0.0)
        except CommandError:
            pass  # that keeps no rules in: it is stopped again below, which says why not

    if service is not None:
        service.leave_rules()
    removed = remove(drain=drain, waiting=lambda left: click.echo(f"  waiting for {left} open connections"), cut=cut)
    click.echo(f"✓ rules      {'removed' if removed.backends else 'there were none'}")
    for each in removed.warnings():
        warn(each)
    if removed.cut:
        click.echo(f"! {removed.cut} connections were still open after {drain:g} s and are cut", err=True)
    if service is not None:
        service.disable()
    stopped = keeper.stop(0.0 if removed.cut else drain) or stopped
    remove(drain=0.0)  # what a keeper that was just beginning has put in: it has ended by now
    click.echo(f"✓ proxy      {'stopped' if stopped else 'there was none'}")
    if mistake is not None and not stopped:
        raise CommandError(
            f"no sidecar was found at {settings.admin.socket}; if there is one, it still runs",
            why=f"the settings that name its socket are wrong: {mistake}",
            fix="mend them, then again: sudo meshnet down",
            code=EXIT_CONFIG,
        )
    if purge:
        _purge(settings, service)


def _finish(settings: Settings, file: Path) -> None:
    """What was stopped in its middle; where nobody can know what that was, all of it goes. Raises CommandError."""
    try:
        deadman.finish_set(file)
    except deadman.Unreadable as error:
        warn(f"{error}: {error.why}")  # it stays, for the old text of that file is in it
    try:
        deadman.finish(note_of_up(settings))
    except deadman.Unreadable as error:
        warn(f"{error}: {error.why}")
        note_of_up(settings).unlink()


def _purge(settings: Settings, service: systemd.Service | None) -> None:
    if service is not None:
        service.clean()
    else:
        supervise.remove_output(settings)
    ledger = Ledger(Path(settings.mesh.last_good).parent)
    made = len(ledger.entries)
    stayed = ledger.undo()
    if service is not None:
        systemd.systemctl("daemon-reload")
    click.echo(f"✓ purge      {made - len(stayed)} things taken away" if made else "✓ purge      there was nothing")
    for line in stayed:
        click.echo(f"! it stays: {line}", err=True)


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
