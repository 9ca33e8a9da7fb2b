"""Files that are replaced whole: a reader, or who looks after a crash, finds all of the old one or all of the new."""

import errno
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path


def write_files(
    directory: Path, files: Mapping[str, bytes | Iterable[bytes]], *, replace: bool = True, mode: int = 0o600
) -> None:
    """All of `files`, by name, with `mode` from their first moment, in order and each at once, and lasting (fsync).

    A content may come in pieces. All are complete on disk before the first is seen. The directory is made if it is not
    there, for its owner only. Written by root they belong to whom the directory belongs: a certificate that root renews
    is the sidecar's to read.
    Raises OSError, FileExistsError among them: a file is there already, unless `replace`.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(directory)) from error
    drafts: dict[str, Path] = {}
    try:
        for name, content in files.items():
            descriptor, draft = tempfile.mkstemp(dir=directory, prefix=f".{name}.")  # mode 0600
            drafts[name] = Path(draft)
            with os.fdopen(descriptor, "wb") as file:
                if os.geteuid() == 0:
                    owner = directory.stat()
                    with suppress(PermissionError):  # root without CAP_CHOWN: the folder's owner may read it then
                        os.fchown(descriptor, owner.st_uid, owner.st_gid)
                os.fchmod(descriptor, mode)
                file.writelines((content,) if isinstance(content, bytes) else content)
                file.flush()
                os.fsync(descriptor)
        if not replace:
            for name in files:
                if os.path.lexists(directory / name):
                    raise FileExistsError(f"{directory / name} is already there")
        for name, path in drafts.items():
            if replace:
                path.replace(directory / name)
            else:
                os.link(path, directory / name)  # unlike a rename it fails if somebody was faster
    finally:
        for path in drafts.values():
            path.unlink(missing_ok=True)
    _sync(directory)


def make_folders(folder: Path) -> None:
    """`folder` and those above it, where they are not there: open to all, whatever the umask. Raises OSError."""
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(0o755)
        missing.chmod(0o755)
    folder.mkdir(exist_ok=True)  # says so where it is no folder


def _sync(directory: Path) -> None:
    """Makes the names in it last, too."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
