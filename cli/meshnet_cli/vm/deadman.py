"""The dead-man switch of `meshnet up` and `meshnet set`: a process of its own that puts the host back as it was.

It acts when the command is gone without having said that it reached its end (killed, its terminal closed, its SSH
session cut), and when that is not said in time after the rules went in. What has to be put back is in a file, the note;
whoever renames that first, the command at its end or the switch, has decided. It takes the turn of a command that is
gone (`turn`); one that only is late has it, and waits for the switch before it ends.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
import msgspec

from meshnet.errors import CommandError
from meshnet.net.files import write_files
from meshnet_cli import preflight
from meshnet_cli.output import DURATION, warn
from meshnet_cli.vm import systemd, turn
from meshnet_cli.vm.ledger import Ledger, remove_drafts
from meshnet_cli.vm.unfinished import Unfinished, boot_id, note_of_set, put_back
from meshnet_init.backends import Installed

EXIT_ROLLED_BACK = 7
_LOOK_EVERY = 0.2  # seconds
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def rollback_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--rollback-after. The command gets `rollback_after`, in seconds."""
    return click.option(
        "--rollback-after",
        type=DURATION,
        default="30s",
        show_default=True,
        help="How long after the rules went in all is put back, unless this command has reached its end.",
    )(command)


class Unreadable(CommandError):
    """There is a note, and what it says cannot be known: of another version of meshnet, say."""

    def __init__(self, note: Path, error: Exception) -> None:
        super().__init__(
            f"what has to be put back cannot be read from {note}: a meshnet command was stopped in its middle",
            why=str(error),
            fix="sudo meshnet with the version that wrote it, or sudo meshnet down with this one; "
            f"then, if the file is still there: sudo mv {note} {note}.old",
        )


class Switch:
    """Armed by a command before it changes anything. Raises CommandError where the file cannot be written."""

    def __init__(self, unfinished: Unfinished, seconds: float) -> None:
        self._seconds = seconds
        self._file = unfinished.note()
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
            self._wait()
            raise CommandError(
                "the dead-man switch has put this host back as it was",
                why=f"`meshnet {self.unfinished.command()}` did not reach its end within {self._seconds:g} s",
                fix=f"again, with more time: sudo meshnet {self.unfinished.command()} --rollback-after 2m",
                code=EXIT_ROLLED_BACK,
            )
        self._end()

    def put_back(self) -> list[str]:
        """Now, unless the switch does it already. What had to stay."""
        if not _claim(self._file):
            self._wait()
            return []
        with _to_its_end():
            self._end()
            return put_back(self.unfinished)

    def _end(self) -> None:
        """The process has nothing left to do."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        else:
            systemd.systemctl("stop", _unit(self.unfinished.pid), check=False)

    def _wait(self) -> None:
        """Until the process has put back: as long as that lasts nobody else has his turn."""
        if self._process is not None:
            self._process.wait()
        while self._process is None and systemd.is_up(_unit(self.unfinished.pid)):
            time.sleep(_LOOK_EVERY)  # noqa: TID251 - the end of a unit is polled; nothing tells us

    def _write(self) -> None:
        try:
            write_files(self._file.parent, {self._file.name: msgspec.json.encode(self.unfinished)})
        except OSError as error:
            raise CommandError(
                f"cannot write {self._file}, by which everything could be put back",
                why=error.strerror or str(error),
                fix=f"df -h {self._file.parent}; findmnt -T {self._file.parent}; ls -ld {self._file.parent}",
            ) from error


def finish(note: Path) -> bool:
    """Puts back what a run left when machine and switch were both stopped in the middle of it. Whether there was any.

    Raises CommandError; Unreadable is one.
    """
    found = _read(note)
    if found is None or _is_under_way(found) or not _claim(note):
        return False
    warn(f"the last `meshnet {found.command()}` was stopped in its middle: what it had done is put back first")
    with _to_its_end():
        for stayed in put_back(found):
            warn(f"it stays: {stayed}")
    return True


def finish_set(file: Path) -> None:
    """The same for `set` and that file. Raises CommandError, also where a run of it goes on."""
    note = note_of_set(file)
    if not os.path.lexists(note):
        return
    preflight.need_right()
    found = _read(note)
    if found is not None and _is_under_way(found):
        raise turn.taken_by(found.pid)
    finish(note)


@contextmanager
def _to_its_end() -> Iterator[None]:
    """Nobody else would do the rest."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_under_way(found: Unfinished) -> bool:
    return found.boot == boot_id() and _lives(found.pid) and not _is_late(found)


def _is_late(found: Unfinished) -> bool:
    return 0 < found.until < time.clock_gettime(time.CLOCK_BOOTTIME)


def _start(file: Path, unfinished: Unfinished) -> "subprocess.Popen[bytes] | None":
    """The process, out of reach of whatever ends the command and its session. None where it is one of systemd's."""
    about = (file, unfinished.pid, unfinished.state(), unfinished.keep)
    command = [sys.executable, "-m", "meshnet_cli.vm.deadman", *map(str, about)]
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


def watch(file: Path, pid: int, state: Path, keep: int) -> None:
    """Until the note is gone again, or it has to act. `pid` is that of the command; the rest as in Unfinished."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        process = -1
    seen = False
    while True:
        gone = process < 0 or bool(select.select([process], [], [], _LOOK_EVERY)[0])
        try:
            found = _read(file)
        except Unreadable as error:  # who comes next says so as well
            print(f"{error}: {error.why}", flush=True)
            return
        if found is None and seen:
            return
        seen = found is not None
        if not gone and not (found is not None and _is_late(found)):
            continue
        try:
            held: AbstractContextManager[object] = turn.take() if gone else nullcontext()
        except CommandError:  # another has been quicker, and puts back first
            if found is None:
                return  # a folder at most was made, and the other one has its ledger
            time.sleep(_LOOK_EVERY)  # noqa: TID251 - the end of a process that is no child is polled
            continue
        with held:
            if found is None:  # it was killed before it could write the file
                remove_drafts(file)
                Ledger(state).undo(keep)
            elif _may_act(file, gone):
                how = "is gone before its end" if gone else "is not at its end in time"
                print(f"`meshnet {found.command()}` (pid {pid}) {how}: this host is put back as it was", flush=True)
                for stayed in put_back(found):
                    print(f"it stays: {stayed}", flush=True)
        return


def _may_act(file: Path, gone: bool) -> bool:
    """Where the note cannot be taken away, by nobody, who is left has to."""
    try:
        return _claim(file)
    except CommandError:
        return gone


def _unit(pid: int) -> str:
    return f"meshnet-deadman-{pid}"


def _claim(file: Path) -> bool:
    """Whether it was there, and is ours: of two, one gets it. Raises CommandError where nobody can take it away."""
    mine = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.rename(mine)
        mine.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CommandError(
            f"cannot take away {file}, by which everything would be put back",
            why=error.strerror or str(error),
            fix=f"findmnt -T {file.parent}; ls -ld {file.parent}",
        ) from error
    return True


def _read(file: Path) -> Unfinished | None:
    """None where there is none. Raises Unreadable."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Unfinished)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise Unreadable(file, error) from error


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    watch(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
