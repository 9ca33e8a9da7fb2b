"""`meshnet up`: brings this host into the mesh, in phases, or leaves it as it was."""

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshnet import __version__
from meshnet.errors import CommandError
from meshnet.model.admin import Status
from meshnet.model.settings import Settings
from meshnet.net.files import make_folders
from meshnet_cli import lock, preflight, supervise
from meshnet_cli.configuration import DEFAULT_CONFIG, config_option, read_settings
from meshnet_cli.init import form_for, print_plan
from meshnet_cli.main import EXIT_CONFIG
from meshnet_cli.output import warn, with_sudo
from meshnet_cli.phases import phase
from meshnet_cli.rules import asked_first, unproved
from meshnet_cli.vm import account, deadman, ssh, systemd, turn
from meshnet_cli.vm.deadman import EXIT_ROLLED_BACK, Switch
from meshnet_cli.vm.identity import TRUST_DOMAIN, make_identity, need_trust_domain
from meshnet_cli.vm.ledger import Ledger
from meshnet_cli.vm.unfinished import Unfinished, boot_id, note_of_up

if TYPE_CHECKING:
    from meshnet.model.snapshot import Snapshot
    from meshnet_init.choose import Choice

_READY_TIMEOUT = 20.0
_DEATHS = 3  # after so many of the sidecar's it is not waited for any longer,
_FOR_GOOD = frozenset({EXIT_CONFIG, 126, 127})  # after one of these at once: nothing changes by itself

Keeper = systemd.Service | supervise.Supervised


@click.command(
    "up",
    short_help="Bring this host into the mesh.",
    epilog="\b\nExamples:\n  sudo meshnet up\n  sudo meshnet up --dry-run\n  sudo meshnet up --rollback-after 2m",
)
@config_option
@click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")
@click.option("--trust-domain", show_default=TRUST_DOMAIN, help="For the authority made when there is none.")
@deadman.rollback_option
@ssh.risk_option
def command(
    config: str | None, dry_run: bool, trust_domain: str | None, rollback_after: float, accept_risk: tuple[str, ...]
) -> None:
    """Bring this host into the mesh: check it, start the sidecar, put in the rules, and prove that they work.

    Connections that are open stay open, SSH is left alone (capture.exclude_inbound_ports), and a failed proof puts
    everything back; so does another process if this one is killed or cut off. Where systemd runs the host the sidecar
    is a service of its, and both are there again after a reboot. A second run changes nothing. Undo it with `meshnet
    down`; settings are changed by `meshnet set`.
    """
    config = config and str(Path(config).resolve())
    with phase("preflight") as say:
        preflight.need_right()
        if not dry_run:
            turn.hold()
            deadman.finish_set(Path(config or DEFAULT_CONFIG).resolve())
        settings = read_settings(config)
        ssh.need_safe(settings, accept_risk, with_sudo())
        status = supervise.running(settings)
        keeper = _keeper(settings, config, status)
        # It dies again and again, or waits for meshnet.toml to be mended.
        kept = status is None and keeper.is_kept()
        if isinstance(keeper, systemd.Service):
            systemd.need_settings_kept(config)
        if not dry_run and deadman.finish(note_of_up(settings)):
            status, kept = supervise.running(settings), False
        if trust_domain is not None:
            need_trust_domain(settings, trust_domain)
        choice = preflight.check(settings, running=kept or status is not None)
        if status is not None:
            preflight.need_fit(settings, status)  # it may have been started with others
        snapshot = _mesh(settings)
        there = "a sidecar runs already" if status else "a sidecar is to come up again" if kept else ""
        say(f"rules by {choice.backend.name}, {there or 'ports and group are free'}")
    if status is not None and lock.is_orphaned(lock.folder_of(settings.admin.socket)):
        warn(f"nobody looks after the sidecar (pid {status.pid}), nor after the rules: {lock.ORPHANED}")
    with phase("discover") as say:
        say(" · ".join(_discovered(settings)) or "nobody listens here yet")
    if dry_run:
        for each in choice.passed_over:
            warn(each)
        print_plan(settings, form_for(choice.backend.name))
        return
    wanted = _Wanted(settings, config, keeper, trust_domain or TRUST_DOMAIN, snapshot, choice)
    _bring_up(wanted, status, kept, rollback_after)


@dataclass(frozen=True, slots=True)
class _Wanted:
    settings: Settings
    config: str | None
    keeper: Keeper
    trust_domain: str
    snapshot: "Snapshot | None"
    choice: "Choice"


def _bring_up(wanted: _Wanted, status: Status | None, kept: bool, rollback_after: float) -> None:
    settings, keeper = wanted.settings, wanted.keeper
    ledger = Ledger(Path(settings.mesh.last_good).parent)
    unfinished = Unfinished(
        pid=os.getpid(),
        boot=boot_id(),
        settings=settings,
        config=wanted.config,
        by_systemd=isinstance(keeper, systemd.Service),
        keep=len(ledger.entries),
    )
    switch = Switch(unfinished, rollback_after)
    switch.arm(ledger)
    try:
        changed = status is None
        if status is None:
            status = _start(wanted, kept, ledger, switch)
        changed |= _capture(wanted, status, switch)
        if isinstance(keeper, systemd.Service):
            changed |= _serve(keeper, wanted.config, ledger)
        elif not lock.is_orphaned(lock.folder_of(settings.admin.socket)):
            keeper.keep_rules()
        switch.disarm()
    except (CommandError, KeyboardInterrupt) as error:
        begun = switch.unfinished.started or switch.unfinished.captures
        for stayed in switch.put_back():
            warn(f"it stays: {stayed}")
        if begun and isinstance(error, CommandError):
            click.echo("✗ put back: the host is as it was before", err=True)
            raise CommandError(error.what, why=error.why, fix=error.fix, code=EXIT_ROLLED_BACK) from error
        raise
    if status.version != __version__:
        again = "systemctl restart meshnet" if unfinished.by_systemd else "meshnet down && sudo meshnet up"
        warn(f"the sidecar that runs is meshnet {status.version}, this is {__version__}: sudo {again}")
    what = "is in the mesh." if changed else "is in the mesh already: nothing changed."
    click.echo(f"{status.node} {what}   See: meshnet conns   Change: meshnet set   Undo: sudo meshnet down")


def _serve(service: systemd.Service, config: str | None, ledger: Ledger) -> bool:
    """Has systemd look after both, at boot too. Whether that is new."""
    with phase("service") as say:
        written = service.install(ledger)
        account.need_readable_by_keeper(config)
        service.start_rules()
        enabled = service.enable()
        note = f"{', '.join(written)} written again; " if written else ""
        say(f"{note}enabled: it is there after a reboot" if enabled else f"{note}nothing changed")
    return enabled or bool(written)


def _keeper(settings: Settings, config: str | None, status: Status | None) -> Keeper:
    """systemd where there is one, unless the sidecar that runs is another's."""
    if systemd.is_here() and not supervise.is_supervised(settings):
        service = systemd.Service(settings, config)
        if status is None or service.is_kept():
            return service
    return supervise.Supervised(settings, config)


def _mesh(settings: Settings) -> "Snapshot | None":
    """What the mesh directory says, if there is one. Raises ConfigError, before anything is started."""
    from meshnet.proxy.directory import load_directory

    return load_directory(settings.mesh.directory) if Path(settings.mesh.directory).is_dir() else None


def _start(wanted: _Wanted, kept: bool, ledger: Ledger, switch: Switch) -> Status:
    """The sidecar, with everything that it needs first. Returns when it is ready."""
    settings, keeper = wanted.settings, wanted.keeper
    with phase("account") as say:
        stays_root = account.why_none()
        if stays_root and not isinstance(keeper, systemd.Service):
            say(f"none is made: {stays_root}; the sidecar is root with the right to NET_ADMIN alone", mark="-")
        else:
            say(account.make(settings.capture.gid, ledger))
    with phase("identity") as say:
        say(make_identity(settings, wanted.trust_domain, wanted.snapshot, ledger))
    _make_folder(Path(settings.mesh.directory), ledger)
    ledger.note_file(Path(settings.mesh.last_good))
    if isinstance(keeper, systemd.Service) or not stays_root:
        account.hand_over(settings, ledger)
        account.need_readable(settings, wanted.config)
    with phase("proxy") as say:
        output = keeper.output()
        if isinstance(keeper, systemd.Service):
            keeper.install(ledger)
        if kept:
            keeper.try_again()
        else:
            switch.note(started=True)
            keeper.start()
        status = _wait_until_ready(settings, keeper, output, deaths=1 if kept else _DEATHS)
        preflight.need_fit(settings, status)
        say(f"ready (pid {status.pid}), {status.certificate.identity or 'no identity'}")
    return status


def _make_folder(folder: Path, ledger: Ledger) -> None:
    try:
        ledger.note_folders(folder)
        make_folders(folder)  # the sidecar's user reads what is in it
    except OSError as error:
        raise CommandError(
            f"cannot make {folder}, where the mesh resources are to be",
            why=str(error.strerror),
            fix="make it yourself, or name another: mesh.directory in meshnet.toml",
        ) from error


def _capture(wanted: _Wanted, status: Status, switch: Switch) -> bool:
    """Puts the rules in and proves them. Whether they are new."""
    from meshnet_init.apply import apply, installed_rules, would_change
    from meshnet_init.verify import verify

    settings, choice = wanted.settings, wanted.choice
    with phase("rules") as say:
        if would_change(settings, choice):
            switch.note(captures=True, rules_before=installed_rules())
        applied = apply(settings, choice=choice)
        for each in applied.warnings():
            warn(each)
        say(f"{applied.rules} rules by {applied.backend}, {'put in' if applied.changed else 'nothing changed'}")
    with phase("verify") as say:
        result = verify(settings, status)
        found = [f"{it.direction} {it.family}: {it.status}" for it in (*result.canaries, *result.inbound)]
        if not result.ok:
            why = "; ".join([*result.differences, *result.misfits, *found])
            raise CommandError("the rules do not do what they should", why=why, fix=result.fix)
        why_not, first = unproved(result), list(asked_first(result))
        told = "; ".join([why_not or ", ".join(found), *first])
        say(told, mark="!" if why_not or first else "✓")
    return applied.changed


def _discovered(settings: Settings) -> Iterator[str]:
    for listener in preflight.listeners(settings):
        yield f"{listener.port} {listener.why_not or 'captured'}"


def _wait_until_ready(
    settings: Settings, keeper: Keeper, output: "systemd.Output | supervise.Output", deaths: int
) -> Status:
    """Raises CommandError with the sidecar's last words when it does not come up."""
    deadline = time.monotonic() + _READY_TIMEOUT
    while True:
        status = supervise.heard(settings)
        if status is not None and status.waits_for_rules:
            return status
        codes = output.exit_codes()
        if status is None and (len(codes) >= deaths or _FOR_GOOD.intersection(codes)):
            raise _never_ready(f"the sidecar does not stay up: it ended with exit code {codes[-1]}", keeper, output)
        if not keeper.is_kept():
            raise _never_ready("the sidecar ended", keeper, output)
        if time.monotonic() > deadline:
            if status is None:
                raise _never_ready(f"the sidecar did not answer within {_READY_TIMEOUT:g} s", keeper, output)
            raise CommandError(
                "the sidecar did not become ready",
                why="; ".join(status.not_ready_because),
                fix=f"meshnet status, {keeper.log()}",
            )
        time.sleep(0.05)  # noqa: TID251 - another process's readiness is polled; nothing tells us


def _never_ready(what: str, keeper: Keeper, output: "systemd.Output | supervise.Output") -> CommandError:
    """With the sidecar's own `error:`, `why:` and `fix:`, or the end of whatever else it said."""
    said = output.last_words()
    fixes = [line.removeprefix("fix: ") for line in said if line.startswith("fix: ")]
    because = [re.sub("^(error|why): +", "", line).strip() for line in said if not line.startswith("fix: ")]
    return CommandError(what, why="; ".join(because) or "it said nothing", fix="; or ".join([*fixes, keeper.log()]))
