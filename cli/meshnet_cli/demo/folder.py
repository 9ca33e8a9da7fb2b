"""A folder under /tmp for the files of one run. What a killed run could not take away, the next one does."""

import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

_PREFIX = "meshnet-world-"
_OWNER = "owner"  # the kernel lets go of its lock when the process that has it ends, however it ends


class Folder:
    """Removed by `close`, or by the next run of the same user after a process that ended without it."""

    def __init__(self) -> None:
        remove_leftovers()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        draft = self.path / f"{_OWNER}.new"
        self._owner = draft.open("w")
        self._owner.write(f"{os.getpid()}\n")
        self._owner.flush()
        fcntl.flock(self._owner, fcntl.LOCK_EX)
        draft.rename(self.path / _OWNER)  # under this name it has never been without its lock

    def close(self, *, keep: bool) -> None:
        """`keep`: for good; no later run removes it."""
        if keep:
            (self.path / _OWNER).unlink(missing_ok=True)
        else:
            shutil.rmtree(self.path, ignore_errors=True)
        self._owner.close()


def remove_leftovers() -> None:
    """Removes the folders of this user's runs that are over. No link is followed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            _remove_if_over(path)
        except OSError:
            continue  # it has just gone, or it is somebody else's, or in use


def _remove_if_over(path: Path) -> None:
    """Raises OSError, BlockingIOError among them: its run goes on."""
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        return
    owner = os.open(path / _OWNER, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(owner)
