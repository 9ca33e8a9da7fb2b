"""The mesh files of a directory, read: in the sidecar itself, or, if there is much to read, by this file as a program.

Reading some thousand services takes a second of Python and hundreds of megabytes. In the sidecar every connection would
wait for its share of Python's lock, and the memory would stay.
"""

import errno
import os
import stat
import sys
from collections.abc import Sequence

import msgspec

from meshnet.codec.mesh import read_mesh
from meshnet.codec.snapshot import encode_snapshot
from meshnet.errors import ConfigError
from meshnet.model.snapshot import Snapshot

_MOST_BYTES = 16 << 20  # of all files together: some ten thousand services
_NICE = 10  # traffic goes first

Fingerprint = tuple[tuple[str | int, ...], ...]
"""What tells a file from another or from an older one, for each; None for a directory that cannot be listed."""


class Refusal(msgspec.Struct, frozen=True):
    """A ConfigError on its way from the program that reads."""

    problem: str
    file: str
    line: int
    suggestion: str


def load_directory(directory: str, version: int = 1, *, may_be_empty: bool = True) -> Snapshot:
    """The mesh that *.yaml and *.yml of `directory` describe; hidden files and folders are passed over.

    Raises ConfigError that names every problem, a line each, a file or directory that cannot be read among them.
    """
    texts = _texts(directory)
    if not texts and not may_be_empty:
        # An unmounted volume looks like this. Without its endpoints a meshed service would get plain text.
        raise ConfigError(
            "no *.yaml file is left", file=directory, suggestion="to empty the mesh, leave one without content"
        )
    return read_mesh(texts, version)


def main(arguments: Sequence[str]) -> int:
    """Prints the lines of the snapshot of a directory, or one Refusal and returns 1."""
    os.nice(_NICE)
    (directory,) = arguments
    try:
        # Who started this had seen files.
        sys.stdout.buffer.writelines(encode_snapshot(load_directory(directory, may_be_empty=False)))
    except ConfigError as error:
        refusal = Refusal(error.problem, error.file, error.line, error.suggestion)
        sys.stdout.buffer.write(msgspec.json.encode(refusal))
        return 1
    return 0


def is_resource_file(name: str) -> bool:
    """Not what editors leave beside a file: .web.yaml.swp, #web.yaml#, .#web.yaml."""
    return name.endswith((".yaml", ".yml")) and not name.startswith((".", "#"))


def fingerprint(directory: str) -> Fingerprint | None:
    try:
        infos = [(path, os.stat(path)) for path in _files(directory)]
    except (OSError, ConfigError):
        return None
    return tuple((path, i.st_dev, i.st_ino, i.st_size, i.st_mtime_ns, i.st_ctime_ns) for path, i in infos)


def _texts(directory: str) -> list[tuple[str, str]]:
    """Path and text of each resource file, sorted by name."""
    texts: list[tuple[str, str]] = []
    room = _MOST_BYTES
    for path in _files(directory):
        content = _content(path, room)
        room -= len(content)
        try:
            texts.append((path, content.decode("utf-8-sig")))
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise ConfigError("not UTF-8 text", file=path, line=line) from None
    return texts


def _files(directory: str) -> list[str]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        raise ConfigError(
            "there is no such directory", file=directory, suggestion="create it, or set directory in [mesh]"
        ) from None
    except OSError as error:
        raise _unreadable(directory, error) from None
    return [os.path.join(directory, name) for name in sorted(names) if is_resource_file(name)]


def _unreadable(path: str, error: OSError) -> ConfigError:
    hint = f"let the sidecar's user read it: chmod o+rX {path}" if error.errno in (errno.EACCES, errno.EPERM) else ""
    return ConfigError(f"cannot be read: {error.strerror}", file=path, suggestion=hint)


def _content(path: str, room: int) -> bytes:
    """Raises ConfigError, also if there are more than `room` bytes."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError("not a regular file", file=path)
            content = file.read(room + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(content) > room:
        raise ConfigError(f"with this file the directory has more than {_MOST_BYTES >> 20} MiB", file=path)
    return content


def _open_without_waiting(path: str, flags: int) -> int:
    """A pipe would wait for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
