"""`meshnet set`: changes meshnet.toml, and what is in force with it."""

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from meshnet.errors import CommandError, ConfigError
from meshnet.model.admin import Status
from meshnet.model.settings import Settings
from meshnet_cli import preflight, supervise
from meshnet_cli.client import EXIT_PERMISSION
from meshnet_cli.configuration import DEFAULT_CONFIG, config_option, read_text
from meshnet_cli.output import warn, with_sudo
from meshnet_cli.vm import deadman, ssh, systemd, turn
from meshnet_cli.vm.deadman import EXIT_ROLLED_BACK, Switch
from meshnet_cli.vm.ledger import Ledger, rights_of
from meshnet_cli.vm.unfinished import Edit, Unfinished, boot_id
from meshnet_cli.vm.units import RULES
from meshnet_init.backends import Installed


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
@deadman.rollback_option
@ssh.risk_option
def command(
    config: str | None,
    changes: tuple[str, ...],
    unset: tuple[str, ...],
    dry_run: bool,
    rollback_after: float,
    accept_risk: tuple[str, ...],
) -> None:
    """Change settings in meshnet.toml, whose comments and order stay as they are.

    KEY is as `meshnet get` shows it; lists are comma-separated. The file is replaced in one step, and only if all of it
    is right. Rules that are in force are changed at once, without cutting anything, and proved; if the proof fails,
    rules and file are as before, and so does another process see to it if this one is killed or cut off. What only a
    new sidecar reads is told, with what to type.
    """
    from meshnet.codec.edit import edited
    from meshnet.codec.settings import settings_with_origin

    if not changes and not unset:
        raise click.UsageError("nothing to change: name a KEY=VALUE, or --unset KEY")
    file = Path(config or DEFAULT_CONFIG).resolve()
    if not dry_run:
        turn.hold()
        deadman.finish_set(file)
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
    if "capture.readiness_port" in names:
        preflight.need_free_readiness_port(settings, running=True)
    if dry_run:
        lines = difflib.unified_diff(old.splitlines(), new.splitlines(), f"{file}", f"{file} (new)", lineterm="")
        click.echo("\n".join(lines))
        return
    before = _settings(old, str(file))
    sidecar = supervise.running(settings if before is None else before)
    preflight.need_here(sidecar)
    change = _Change(file, new, settings, before, sidecar)
    in_force, why_not = _rules_to_change(settings, sidecar)
    if in_force:
        _change_both(change, in_force, rollback_after)
        return
    _write(change)
    if why_not:
        click.echo(why_not)


@dataclass(frozen=True, slots=True)
class _Change:
    """`before` is None where the file's settings were wrong, `sidecar` where none runs."""

    file: Path
    text: str
    settings: Settings
    before: Settings | None
    sidecar: Status | None


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


def _write(change: _Change) -> None:
    """All of it or nothing, with the rights that the file has. Raises CommandError."""
    from meshnet.net.files import write_files

    file = change.file
    with _writing(file):
        owner = file.stat() if file.exists() else None
        if owner is None:
            _make_folder(change)
        mode = 0o644 if owner is None else owner.st_mode & 0o7777  # the sidecar's user reads it
        write_files(file.parent, {file.name: change.text.encode()}, mode=mode)
        if owner is not None and os.geteuid() == 0:
            os.chown(file, owner.st_uid, owner.st_gid)
    click.echo(f"✓ {file} is changed")
    others = change.before is None or _without_capture(change.settings) != _without_capture(change.before)
    if others and change.sidecar is not None:
        click.echo(f"! the sidecar reads it when it starts again: {_restart(change.settings)}")


def _make_folder(change: _Change) -> None:
    """For a file that is not there yet. Raises CommandError."""
    from meshnet.net.files import make_folders

    with _writing(change.file):
        Ledger(Path(change.settings.mesh.last_good).parent).note_file(change.file)
        make_folders(change.file.parent)


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise CommandError(
            f"not allowed to write {file}", why=error.strerror or "", fix=with_sudo(), code=EXIT_PERMISSION
        ) from error
    except OSError as error:
        raise CommandError(
            f"cannot write {file}; it is as it was", why=error.strerror or str(error), fix=f"df -h {file.parent}"
        ) from error


def _rules_to_change(settings: Settings, sidecar: Status | None) -> tuple[tuple[Installed, ...], str]:
    """Those in force that these settings change; none, and what to say of it.

    Raises CommandError, and ConfigError for settings that make no plan.
    """
    from meshnet_init.apply import installed_rules, would_change
    from meshnet_init.host import may_change_rules

    in_force = installed_rules() if may_change_rules() else ()
    if not in_force or all(installed.draining() for installed in in_force) or not would_change(settings):
        return (), "" if sidecar is not None else "  nothing is up here: it is in force with the next `meshnet up`"
    if sidecar is not None:
        try:
            preflight.need_fit(settings, sidecar)
        except CommandError:
            return (), "! the rules stay as they are until then: they would not fit the sidecar that runs"
    return in_force, ""


def _change_both(change: _Change, in_force: tuple[Installed, ...], rollback_after: float) -> None:
    """The file, and the rules with it. Raises CommandError and ConfigError; then both are as they were."""
    switch = Switch(_unfinished(change), rollback_after)
    if switch.unfinished.edit is not None and switch.unfinished.edit.old is None:
        _make_folder(change)
    switch.arm(Ledger(switch.unfinished.state()))
    try:
        switch.note(captures=True, rules_before=in_force)
        _write(change)
        said = _put_in_force(change.settings, change.sidecar)
        switch.disarm()
    except (CommandError, ConfigError, KeyboardInterrupt) as error:
        for stayed in switch.put_back():
            warn(f"it stays: {stayed}")
        if not switch.unfinished.captures:
            raise
        click.echo("✗ put back: rules and file are as they were", err=True)
        if isinstance(error, CommandError):
            raise CommandError(error.what, why=error.why, fix=error.fix, code=EXIT_ROLLED_BACK) from error
        raise
    click.echo(said)
    if systemd.is_here() and systemd.is_installed():
        systemd.systemctl("try-restart", RULES)  # who looks after them has to know of the new ones


def _unfinished(change: _Change) -> Unfinished:
    file, settings = change.file, change.settings
    old, rights = (file.read_bytes(), rights_of(file)) if file.exists() else (None, "")
    return Unfinished(
        pid=os.getpid(),
        boot=boot_id(),
        settings=settings,
        config=str(file),
        by_systemd=systemd.is_here(),
        keep=len(Ledger(Path(settings.mesh.last_good).parent).entries),
        edit=Edit(file=str(file), old=old, new=change.text.encode(), rights=rights),
    )


def _put_in_force(settings: Settings, sidecar: Status | None) -> str:
    """What to say of the rules once they are proved. Raises CommandError and ConfigError."""
    from meshnet_init.apply import apply
    from meshnet_init.verify import verify

    applied = apply(settings)
    result = verify(settings, sidecar)
    if not result.ok:
        raise CommandError(
            "the rules of these settings do not do what they should",
            why="; ".join([*result.differences, *result.misfits]) or "a canary was not captured",
            fix=result.fix,
        )
    return f"✓ {applied.rules} rules by {applied.backend} are in force"


def _without_capture(settings: Settings) -> object:
    """What the sidecar itself reads."""
    capture = settings.capture
    ways = (capture.gid, capture.inbound_mode, capture.original_source, bool(capture.reroute_interfaces))
    readiness = (capture.readiness_port, capture.ipv6) if capture.readiness_port else ()
    own = (ways, capture.proof_interval, capture.required, capture.truthful_connect, readiness)
    return settings.proxy, settings.admin, settings.mesh, settings.identity, settings.pool, settings.log, own


def _restart(settings: Settings) -> str:
    if systemd.is_here() and systemd.is_installed() and not supervise.is_supervised(settings):
        return "sudo meshnet up && sudo systemctl restart meshnet; for ports, mark and group: down and up"
    return "sudo meshnet down && sudo meshnet up"
