"""What `meshnet up` or `meshnet set` has done so far, how the host was before, and the way back there."""

import os
from pathlib import Path
from typing import Protocol

import msgspec

from meshnet.errors import ConfigError
from meshnet.model.capture import TakeUp
from meshnet.model.settings import Settings
from meshnet.net.files import write_files
from meshnet.net.keeper import tell_keeper
from meshnet_cli.configuration import read_settings
from meshnet_cli.vm import systemd
from meshnet_cli.vm.ledger import Ledger, remove_drafts
from meshnet_cli.vm.units import RULES
from meshnet_init.backends import Installed

NAME = "up.json"
_DRAIN = 5.0  # seconds that what was captured meanwhile gets to end


class Edit(msgspec.Struct, frozen=True, kw_only=True):
    """Of meshnet.toml, by `set`. `old` is None where there was none; `rights` as in an entry of the ledger."""

    file: str
    old: bytes | None
    new: bytes
    rights: str = ""


class Unfinished(msgspec.Struct, frozen=True, kw_only=True):
    """What a run has done so far, and how the host was before.

    `until` is a reading of CLOCK_BOOTTIME in seconds, and 0 as long as no rules are in. `boot` is the boot it ran in.
    """

    pid: int
    boot: str
    settings: Settings
    config: str | None
    by_systemd: bool
    keep: int  # entries of the ledger that were there before
    edit: Edit | None = None  # a run of `set`, then
    started: bool = False  # the sidecar
    captures: bool = False  # rules were changed
    rules_before: tuple[Installed, ...] = ()
    until: float = 0.0

    def command(self) -> str:
        return "up" if self.edit is None else "set"

    def state(self) -> Path:
        return Path(self.settings.mesh.last_good).parent

    def note(self) -> Path:
        """Where this is written down."""
        return note_of_up(self.settings) if self.edit is None else note_of_set(Path(self.edit.file))


def note_of_up(settings: Settings) -> Path:
    return Path(settings.mesh.last_good).parent / NAME


def note_of_set(file: Path) -> Path:
    """Beside the file itself: where anything else is depends on what is in it, be it the old or the new."""
    return file.with_name(f"{file.name}.unfinished")


class Keeper(Protocol):
    """Who looks after the sidecar: systemd, or a supervisor of our own."""

    def stop(self, drain: float) -> bool: ...


def put_back(unfinished: Unfinished) -> list[str]:
    """The host as it was before that run. What had to stay. Raises CommandError."""
    remove_drafts(unfinished.note())
    if unfinished.edit is None:
        return _put_back_up(unfinished)
    return _put_back_set(unfinished, unfinished.edit)


def _put_back_up(unfinished: Unfinished) -> list[str]:
    """Rules, sidecar, files and accounts."""
    from meshnet_init.rollback import put_back as put_rules_back

    keeper = _keeper_of(unfinished)
    was_kept = False
    if unfinished.captures and unfinished.boot == boot_id():
        if isinstance(keeper, systemd.Service):
            was_kept = keeper.leave_rules() and not unfinished.started
        put_rules_back(unfinished.rules_before, _DRAIN, lambda: unfinished.started and keeper.stop(0.0))
    if unfinished.started:
        keeper.stop(0.0)
    ledger = Ledger(unfinished.state())
    if isinstance(keeper, systemd.Service) and any(entry.kind == "unit" for entry in ledger.entries[unfinished.keep :]):
        keeper.disable()
        keeper.clean()
    stayed = ledger.undo(unfinished.keep)
    if isinstance(keeper, systemd.Service):
        systemd.systemctl("daemon-reload", check=False)
    if was_kept:  # by the settings whose rules have failed: it would put them in again
        stayed.append(f"{RULES} stopped; the next sudo meshnet up that succeeds starts it")
    return stayed


def _put_back_set(unfinished: Unfinished, edit: Edit) -> list[str]:
    """The file, then the rules: a keeper goes by the file when it is told to take up again."""
    from meshnet_init.apply import installed_rules
    from meshnet_init.rollback import put_back as put_rules_back

    file = Path(edit.file)
    try:
        stayed = _put_back_file(file, edit, unfinished)
    except OSError as error:
        stayed = [f"file {file}: {error.strerror or error}"]
    if not unfinished.captures:
        return stayed
    take_up = _asks_for_others(file, edit)
    if unfinished.boot != boot_id():
        if take_up:
            tell_keeper(TakeUp())  # it began with what was in the file
    elif any(not installed.draining() for installed in installed_rules()):
        put_rules_back(unfinished.rules_before, _DRAIN, take_up=take_up)
    # Else somebody has taken the rules out since, and nobody may be there whom they would lead to.
    return stayed


def _asks_for_others(file: Path, edit: Edit) -> bool:
    """Whether a keeper that reads the file gets other settings than those that `set` made."""
    try:
        if _content(file) == edit.new:
            return False
        read_settings(edit.file if file.exists() else None)
    except (OSError, ConfigError):
        return False  # it would stay with those that it has
    return True


def _put_back_file(file: Path, edit: Edit, unfinished: Unfinished) -> list[str]:
    """What had to stay. Raises OSError and CommandError."""
    found = _content(file)
    if found not in (edit.old, edit.new):
        return [f"file {file}: somebody has changed it since"]
    if edit.old is None:
        return Ledger(unfinished.state()).undo(unfinished.keep)
    if found != edit.old:
        user, group, mode = edit.rights.split(":")
        write_files(file.parent, {file.name: edit.old}, mode=int(mode, 8))
        if os.geteuid() == 0:
            os.chown(file, int(user), int(group))
    remove_drafts(file)
    return []


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def _keeper_of(unfinished: Unfinished) -> Keeper:
    if unfinished.by_systemd:
        return systemd.Service(unfinished.settings, unfinished.config)
    from meshnet_cli.supervise import Supervised

    return Supervised(unfinished.settings, unfinished.config)


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
