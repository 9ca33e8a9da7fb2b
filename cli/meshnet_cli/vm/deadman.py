"""The dead-man switch of `meshnet up`: a process of its own that puts the host back as it was.

It acts when `up` is gone without having said that it reached its end (killed, its terminal closed, its SSH session
cut), and when that is not said in time after the rules went in. What has to be put back is in a file beside the ledger;
whoever renames that file first, `up` at its end or the switch, has decided.
"""

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

import msgspec

from meshnet.errors import CommandError
from meshnet.model.settings import Settings
from meshnet.net.files import write_files
from meshnet_cli.vm import systemd
from meshnet_cli.vm.ledger import Ledger, remove_drafts
from meshnet_init.backends import Installed

NAME = "up.json"
EXIT_ROLLED_BACK = 7
_DRAIN = 5.0  # seconds that what was captured meanwhile gets to end
_LOOK_EVERY = 0.2  # seconds


class Unfinished(msgspec.Struct, frozen=True, kw_only=True):
    """What a run of `up` has done so far, and how the host was before.

    `until` is a reading of CLOCK_BOOTTIME in seconds, and 0 as long as no rules are in. `boot` is the boot it ran in.
    """

    pid: int
    boot: str
    settings: Settings
    config: str | None
    by_systemd: bool
    keep: int  # entries of the ledger that were there before
    started: bool = False  # the sidecar
    captures: bool = False  # rules were changed
    rules_before: tuple[Installed, ...] = ()
    until: float = 0.0


class Keeper(Protocol):
    """Who looks after the sidecar: systemd, or a supervisor of our own."""

    def stop(self, drain: float) -> bool: ...


class Switch:
    """Armed by `up` before it changes anything. Raises CommandError where the file cannot be written."""

    def __init__(self, unfinished: Unfinished, seconds: float) -> None:
        self._seconds = seconds
        self._file = _file(unfinished.settings)
        self._process: subprocess.Popen[bytes] | None = None
        self.unfinished = unfinished

    def arm(self, ledger: Ledger) -> None:
        self._process = _start(self._file, self.unfinished)
        ledger.note_folders(self._file.parent)
        self._write()

    def note(self, *, started: bool = False, captures: bool = False, rules_before: tuple[Installed, ...] = ()) -> None:
        """Before it is done. The time begins with `captures`."""
        found = self.unfinished
        self.unfinished = msgspec.structs.replace(
            found,
            started=started or found.started,
            captures=captures or found.captures,
            rules_before=rules_before or found.rules_before,
            until=time.clock_gettime(time.CLOCK_BOOTTIME) + self._seconds if captures else found.until,
        )
        self._write()

    def disarm(self) -> None:
        """Raises CommandError if it was too late."""
        if not _claim(self._file):
            raise CommandError(
                "the dead-man switch has put this host back as it was",
                why=f"`meshnet up` did not reach its end within {self._seconds:g} s",
                fix="sudo meshnet up --rollback-after 2m",
                code=EXIT_ROLLED_BACK,
            )
        self._end()

    def put_back(self) -> list[str]:
        """Now, unless the switch does it already. What had to stay."""
        if not _claim(self._file):
            return []
        self._end()
        return put_back(self.unfinished)

    def _end(self) -> None:
        """The process has nothing left to do."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        else:
            systemd.systemctl("stop", _unit(self.unfinished.pid), check=False)

    def _write(self) -> None:
        try:
            write_files(self._file.parent, {NAME: msgspec.json.encode(self.unfinished)})
        except OSError as error:
            raise CommandError(
                f"cannot write {self._file}, by which everything could be put back",
                why=error.strerror or str(error),
                fix=f"df -h {self._file.parent}; ls -ld {self._file.parent}",
            ) from error


def left_over(settings: Settings) -> Unfinished | None:
    """What a run of `up` left when machine and switch were both stopped in the middle of it."""
    found = _read(_file(settings))
    if found is None or (found.boot == boot_id() and _lives(found.pid)):
        return None
    return found if _claim(_file(settings)) else None


def put_back(unfinished: Unfinished) -> list[str]:
    """Rules, sidecar, files and accounts as they were before that run. What had to stay. Raises CommandError."""
    from meshnet_init.rollback import put_back as put_rules_back

    settings = unfinished.settings
    keeper = keeper_of(unfinished)
    same_boot = unfinished.boot == boot_id()
    if unfinished.captures and same_boot:
        if isinstance(keeper, systemd.Service):
            keeper.leave_rules()
        put_rules_back(unfinished.rules_before, _DRAIN, lambda: unfinished.started and keeper.stop(0.0))
    if unfinished.started:
        keeper.stop(0.0)
    remove_drafts(_file(settings))
    ledger = Ledger(_file(settings).parent)
    if isinstance(keeper, systemd.Service) and any(entry.kind == "unit" for entry in ledger.entries[unfinished.keep :]):
        keeper.disable()
        keeper.clean()
    stayed = ledger.undo(unfinished.keep)
    if isinstance(keeper, systemd.Service):
        systemd.systemctl("daemon-reload", check=False)
    return stayed


def keeper_of(unfinished: Unfinished) -> Keeper:
    if unfinished.by_systemd:
        return systemd.Service(unfinished.settings, unfinished.config)
    from meshnet_cli.supervise import Supervised

    return Supervised(unfinished.settings, unfinished.config)


def _start(file: Path, unfinished: Unfinished) -> "subprocess.Popen[bytes] | None":
    """The process, out of reach of whatever ends `up` and its session. None where it is one of systemd's."""
    command = [sys.executable, "-m", "meshnet_cli.vm.deadman", str(file), str(unfinished.pid), str(unfinished.keep)]
    if unfinished.by_systemd:  # a session of its own would still end with the login: KillUserProcesses=yes
        unit = (f"--unit={_unit(unfinished.pid)}", "--property=Restart=on-abnormal")
        command = ["systemd-run", "--quiet", "--collect", *unit, *command]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CommandError(
                "the dead-man switch could not be started", why=done.stderr.strip(), fix="systemctl status"
            )
        return None
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def watch(file: Path, pid: int, keep: int) -> None:
    """Until the file is gone again, or it has to act. `pid` is that of `up`, `keep` as in Unfinished."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        process = -1
    seen = False
    while True:
        gone = process < 0 or bool(select.select([process], [], [], _LOOK_EVERY)[0])
        found = _read(file)
        if found is None and seen:
            return
        if found is None and gone:  # it was killed before it could write the file
            remove_drafts(file)
            Ledger(file.parent).undo(keep)
            return
        seen = found is not None
        late = found is not None and 0 < found.until < time.clock_gettime(time.CLOCK_BOOTTIME)
        if found is not None and (gone or late) and _claim(file):
            how = "is gone before its end" if gone else "is not at its end in time"
            print(f"`meshnet up` (pid {pid}) {how}: this host is put back as it was", flush=True)
            for stayed in put_back(found):
                print(f"it stays: {stayed}", flush=True)
            return


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _unit(pid: int) -> str:
    return f"meshnet-deadman-{pid}"


def _file(settings: Settings) -> Path:
    return Path(settings.mesh.last_good).parent / NAME


def _claim(file: Path) -> bool:
    """Whether it was there, and is ours: of two, one gets it."""
    mine = file.with_name(f"{NAME}.{os.getpid()}")
    try:
        file.rename(mine)
    except FileNotFoundError:
        return False
    mine.unlink()
    return True


def _read(file: Path) -> Unfinished | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Unfinished)
    except (OSError, ValueError):
        return None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    watch(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
