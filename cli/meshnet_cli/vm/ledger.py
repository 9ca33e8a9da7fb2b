"""What meshnet made on this host, in the order it was made, so that it can take away that and nothing else.

Each entry is on disk before the thing itself is made: whatever is killed when, nothing is made that is not written
down. What cannot be taken away, as others have put something into it, is told.
"""

import os
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import msgspec

from meshnet.errors import CommandError
from meshnet.net.files import make_folders, write_files
from meshnet_cli.client import EXIT_FAILED, EXIT_PERMISSION
from meshnet_cli.output import with_sudo

NAME = "made.json"

Kind = Literal["user", "group", "unit", "file", "directory", "rights"]


class Entry(msgspec.Struct, frozen=True):
    """`before` is what a path's rights were, for `rights`: owner, group and mode, `0:0:700`."""

    kind: Kind
    name: str
    before: str = ""


class Ledger:
    """The one of a host, in the folder of its state. Raises CommandError where that cannot be written or read."""

    def __init__(self, state: Path) -> None:
        self.file = state / NAME
        self.entries = self._read()

    def note(self, kind: Kind, name: str | Path, before: str = "") -> None:
        """Writes down what is about to be made. What is there already is not ours: the caller looks first."""
        entry = Entry(kind, str(name), before)
        if entry in self.entries:
            return
        new = [entry]
        if not self.file.parent.exists() and name != self.file.parent:
            new.insert(0, Entry("directory", str(self.file.parent)))
        self._write([*self.entries, *new])

    def note_folders(self, folder: Path) -> None:
        """Of `folder` and those above it, the ones that are not there yet."""
        for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            self.note("directory", missing)

    def note_file(self, file: Path) -> None:
        if not os.path.lexists(file):
            self.note_folders(file.parent)
            self.note("file", file)

    def undo(self, keep: int = 0) -> list[str]:
        """Takes away what was made, last first, but for the first `keep` entries. What had to stay, and why."""
        ours = self.entries[keep:]
        last = [entry for entry in ours if entry.kind == "directory" and self.file.is_relative_to(entry.name)]
        stayed = self._taken_away(entry for entry in reversed(ours) if entry not in last)
        self._write(self.entries[:keep])
        if not self.entries:
            self.file.unlink(missing_ok=True)
        remove_drafts(self.file)
        return stayed + self._taken_away(sorted(last, key=lambda entry: len(entry.name), reverse=True))

    def _taken_away(self, entries: Iterable[Entry]) -> list[str]:
        return [f"{entry.kind} {entry.name}: {why}" for entry in entries if (why := _UNDO[entry.kind](entry))]

    def _read(self) -> list[Entry]:
        try:
            return msgspec.json.decode(self.file.read_bytes(), type=list[Entry])
        except (FileNotFoundError, NotADirectoryError):
            return []
        except PermissionError as error:
            raise CommandError(
                f"not allowed to read {self.file}, which says what meshnet made on this host",
                why=error.strerror or "",
                fix=with_sudo(),
                code=EXIT_PERMISSION,
            ) from error
        except (OSError, ValueError) as error:
            raise CommandError(
                f"what meshnet made on this host cannot be read from {self.file}",
                why=str(error),
                fix=f"ls -l {self.file}",
            ) from error

    def _write(self, entries: list[Entry]) -> None:
        if entries == self.entries:
            return
        try:
            make_folders(self.file.parent.parent)  # the last one is of those who hand it over to the sidecar's user
            write_files(self.file.parent, {NAME: msgspec.json.format(msgspec.json.encode(entries)) + b"\n"})
        except OSError as error:
            raise CommandError(
                f"cannot write {self.file}; nothing was changed that is not in it",
                why=error.strerror or str(error),
                fix=with_sudo()
                if isinstance(error, PermissionError)
                else f"df -h {self.file.parent}; ls -ld {self.file.parent}",
                code=EXIT_PERMISSION if isinstance(error, PermissionError) else EXIT_FAILED,
            ) from error
        self.entries = entries


def rights_of(path: Path) -> str:
    found = path.stat()
    return f"{found.st_uid}:{found.st_gid}:{found.st_mode & 0o7777:o}"


def _remove_account(command: str) -> Callable[[Entry], str]:
    def remove(entry: Entry) -> str:
        try:
            done = subprocess.run([command, entry.name], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return f"there is no {command}"
        # 6: there is none (userdel(8), groupdel(8)).
        return "" if done.returncode in (0, 6) else done.stderr.strip().replace("\n", "; ")

    return remove


def _remove_file(entry: Entry) -> str:
    file = Path(entry.name)
    try:
        file.unlink(missing_ok=True)
        remove_drafts(file)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def remove_drafts(file: Path) -> None:
    """What is left of `write_files` that was killed before it gave its draft the file's name. Raises OSError."""
    for draft in file.parent.glob(f".{file.name}.*"):
        draft.unlink(missing_ok=True)


def _remove_folder(entry: Entry) -> str:
    try:
        os.rmdir(entry.name)
    except FileNotFoundError:
        pass
    except OSError as error:
        names = sorted(os.listdir(entry.name)) if os.path.isdir(entry.name) else []
        return f"it has {', '.join(names)}" if names else error.strerror or str(error)
    return ""


def _restore_rights(entry: Entry) -> str:
    user, group, mode = entry.before.split(":")
    try:
        os.chown(entry.name, int(user), int(group))
        os.chmod(entry.name, int(mode, 8))
    except FileNotFoundError:
        pass
    except OSError as error:
        return error.strerror or str(error)
    return ""


_UNDO: dict[Kind, Callable[[Entry], str]] = {
    "user": _remove_account("userdel"),
    "group": _remove_account("groupdel"),
    "unit": _remove_file,
    "file": _remove_file,
    "directory": _remove_folder,
    "rights": _restore_rights,
}
