"""The lock of one supervisor per folder: who holds it looks after the sidecar there, and its process id is in it.

A supervisor that is killed lets go of it and leaves its number; one that ends in order takes the number out.
"""

import fcntl
import os
from pathlib import Path
from typing import IO

NAME = "supervise.lock"
ORPHANED = "its supervisor was killed: if it dies, nothing starts it again; sudo meshnet down && sudo meshnet up"


def folder_of(admin_socket: str) -> Path:
    """Where a supervisor has its lock and its log: root's alone, inside the folder where the sidecar has its socket."""
    return Path(admin_socket).parent / "supervisor"


def take(folder: Path) -> IO[bytes] | None:
    """The lock, or None if another has it. It is held until the last copy is closed. Raises OSError."""
    while True:
        file = os.fdopen(os.open(folder / NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600), "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / NAME)):
                return file
        except FileNotFoundError:
            pass
        file.close()  # who had it before has removed it meanwhile


def is_held(folder: Path) -> bool:
    """Raises OSError."""
    try:
        file = (folder / NAME).open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def holder(folder: Path) -> int:
    """The process id of who has it, or of who was killed with it; 0 if there is none. Raises OSError."""
    try:
        return int((folder / NAME).read_bytes().partition(b"\n")[0] or 0)
    except (FileNotFoundError, NotADirectoryError):
        return 0


def own(folder: Path) -> None:
    """What its holder does first: who gave it the lock may have been killed before it wrote the number down."""
    with (folder / NAME).open("ab") as file:
        file.truncate(0)
        file.write(b"%d\n" % os.getpid())


def is_orphaned(folder: Path) -> bool:
    """Whether a supervisor was killed here. Not so where we may not look."""
    try:
        return bool(holder(folder)) and not is_held(folder)
    except PermissionError:
        return False


def disown(folder: Path) -> None:
    """What its holder does before it ends in order."""
    try:
        os.truncate(folder / NAME, 0)
    except FileNotFoundError:
        pass
