"""`meshnet set`: changes meshnet.toml, and what is in force with it."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import click

from meshnet.errors import CommandError, ConfigError
from meshnet.model.settings import Settings
from meshnet_cli import preflight, supervise
from meshnet_cli.client import EXIT_PERMISSION
from meshnet_cli.configuration import DEFAULT_CONFIG, config_option, read_text
from meshnet_cli.output import warn, with_sudo
from meshnet_cli.vm import ssh, systemd
from meshnet_cli.vm.deadman import EXIT_ROLLED_BACK
from meshnet_cli.vm.ledger import Ledger
from meshnet_cli.vm.units import RULES

_DRAIN = 5.0  # seconds


@click.command(
    "set",
    short_help="Change settings; what is in force is changed with them.",
    epilog="\b\nExamples:\n  sudo meshnet set capture.exclude_inbound_ports=22,9100\n"
    "  sudo meshnet set proxy.workers=2 log.level=debug --dry-run\n  sudo meshnet set --unset log.level",
)
@config_option
@click.argument("changes", metavar="KEY=VALUE...", nargs=-1)
@click.option("--unset", metavar="KEY", multiple=True, help="Back to the default; may be given several times.")
@click.option("--dry-run", is_flag=True, help="Show how the file would change; change nothing.")
@ssh.risk_option
def command(
    config: str | None, changes: tuple[str, ...], unset: tuple[str, ...], dry_run: bool, accept_risk: tuple[str, ...]
) -> None:
    """Change settings in meshnet.toml, whose comments and order stay as they are.

    KEY is as `meshnet get` shows it; lists are comma-separated. The file is replaced in one step, and only if all of it
    is right. Rules that are in force are changed at once, without cutting anything, and proved; if the proof fails,
    rules and file are as before. What only a new sidecar reads is told, with what to type.
    """
    from meshnet.codec.edit import edited
    from meshnet.codec.settings import settings_with_origin

    if not changes and not unset:
        raise click.UsageError("nothing to change: name a KEY=VALUE, or --unset KEY")
    file = Path(config or DEFAULT_CONFIG).resolve()
    old = read_text(str(file)) if config or file.exists() else ""
    new = edited(old, dict(map(_pair, changes)), unset, str(file))
    settings, origins = settings_with_origin(new, os.environ, str(file))
    names = {change.partition("=")[0] for change in changes} | set(unset)
    for name in sorted(names):
        if origins[name].kind == "env":
            warn(f"{name} is also set by the variable {origins[name].place}, which beats the file")
    if new == old:
        click.echo("nothing changed")
        return
    ssh.need_safe(settings, accept_risk, with_sudo())
    if dry_run:
        lines = difflib.unified_diff(old.splitlines(), new.splitlines(), f"{file}", f"{file} (new)", lineterm="")
        click.echo("\n".join(lines))
        return
    before = _settings(old, str(file))
    _write(file, new, settings)
    click.echo(f"✓ {file} is changed")
    try:
        _put_in_force(settings, before, lambda: _write(file, old, settings))
    except (CommandError, ConfigError):
        _write(file, old, settings)
        raise


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"{text!r} is not KEY=VALUE; the default again: --unset {text}")
    return name, value


def _settings(text: str, file: str) -> Settings | None:
    """Those that the file has now; they may be what is to be mended."""
    from meshnet.codec.settings import load_settings

    try:
        return load_settings(text, os.environ, file)
    except ConfigError:
        return None


def _write(file: Path, text: str, settings: Settings) -> None:
    """All of it or nothing, with the rights that the file has. Raises CommandError."""
    from meshnet.net.files import write_files

    try:
        mode = file.stat().st_mode & 0o7777 if file.exists() else 0o644  # the sidecar's user reads it
        owner = file.stat() if file.exists() else None
        if owner is None:
            Ledger(Path(settings.mesh.last_good).parent).note_file(file)
            file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_files(file.parent, {file.name: text.encode()}, mode=mode)
        if owner is not None and os.geteuid() == 0:
            os.chown(file, owner.st_uid, owner.st_gid)
    except PermissionError as error:
        raise CommandError(
            f"not allowed to write {file}", why=error.strerror or "", fix=with_sudo(), code=EXIT_PERMISSION
        ) from error
    except OSError as error:
        raise CommandError(
            f"cannot write {file}; it is as it was", why=error.strerror or str(error), fix=f"df -h {file.parent}"
        ) from error


def _put_in_force(settings: Settings, before: Settings | None, restore: Callable[[], object]) -> None:
    """Raises CommandError, and ConfigError for settings that make no plan; then the rules are as they were.

    `restore` puts the file back.
    """
    from meshnet_init.apply import apply, installed_rules, would_change
    from meshnet_init.host import may_change_rules
    from meshnet_init.rollback import put_back
    from meshnet_init.verify import verify

    sidecar = supervise.running(settings if before is None else before)
    others = before is None or _without_capture(settings) != _without_capture(before)
    if others and sidecar is not None:
        click.echo(f"! the sidecar reads it when it starts again: {_restart(settings)}")
    in_force = installed_rules() if may_change_rules() else ()
    if not in_force or all(installed.draining() for installed in in_force) or not would_change(settings):
        if sidecar is None:
            click.echo("  nothing is up here: it is in force with the next `meshnet up`")
        return
    if sidecar is not None:
        try:
            preflight.need_fit(settings, sidecar)
        except CommandError:
            click.echo("! the rules stay as they are until then: they would not fit the sidecar that runs")
            return
    applied = apply(settings)
    result = verify(settings, sidecar)
    if not result.ok:
        restore()
        put_back(in_force, _DRAIN, take_up=True)
        raise CommandError(
            "the rules of these settings do not do what they should; rules and file are as they were",
            why="; ".join([*result.differences, *result.misfits]) or "a canary was not captured",
            fix=result.fix,
            code=EXIT_ROLLED_BACK,
        )
    click.echo(f"✓ {applied.rules} rules by {applied.backend} are in force")
    if systemd.is_here() and systemd.is_installed():
        systemd.systemctl("try-restart", RULES)  # who looks after them has to know of the new ones


def _without_capture(settings: Settings) -> object:
    """What the sidecar itself reads."""
    capture = settings.capture
    ways = (capture.gid, capture.inbound_mode, capture.original_source, bool(capture.reroute_interfaces))
    own = (ways, capture.proof_interval, capture.required, capture.truthful_connect)
    return settings.proxy, settings.admin, settings.mesh, settings.identity, settings.pool, settings.log, own


def _restart(settings: Settings) -> str:
    if systemd.is_here() and systemd.is_installed() and not supervise.is_supervised(settings):
        return "sudo meshnet up && sudo systemctl restart meshnet; for ports, mark and group: down and up"
    return "sudo meshnet down && sudo meshnet up"
