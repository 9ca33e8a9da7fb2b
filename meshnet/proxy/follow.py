"""The mesh from a directory of YAML files, kept up to date while the sidecar runs.

Events of the kernel say when to look, never what changed: the directory is read as a whole, and a look every few
seconds finds what events miss (a link to a file elsewhere, a network file system, a folder that is not there yet).
"""

import errno
import os
import stat
from collections.abc import AsyncIterable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import trio
from msgspec import structs
from watchfiles import Change, awatch

from meshnet.codec.mesh import read_mesh
from meshnet.errors import ConfigError
from meshnet.model.snapshot import Snapshot

_MOST_BYTES = 16 << 20  # of all files together: some ten thousand services
_QUIET = 100  # milliseconds without a change, so that a copy of many files is read once
_PATIENCE = 1000  # milliseconds of changes without end, after which they are read all the same
_LOOK_EVERY = 5000  # milliseconds
_CONFIG_MAP = "..data"  # Kubernetes renames a new link over this one, and every file is a link through it


def load_directory(directory: str, version: int = 1) -> Snapshot:
    """The mesh that *.yaml and *.yml of `directory` describe; hidden files and folders are passed over.

    Raises ConfigError that names every problem, a line each, a file or directory that cannot be read among them.
    """
    return read_mesh(_texts(directory), version)


async def follow(
    directory: str,
    version: int,
    apply: Callable[[Snapshot], None],
    refused: Callable[[ConfigError], None],
    *,
    reload: AsyncIterable[object] | None = None,
) -> None:
    """Applies the mesh of `directory` now and after every change that matters; runs until cancelled.

    The first good state becomes snapshot `version` + 1, and each one after it counts on by one. A bad state is
    refused, once, and the last good one stays: so does it when the directory, or every resource file in it, is gone.
    What comes out of `reload` (a signal receiver or a memory channel) makes it look at once, and refuse again.
    `apply` and `refused` are called in the task that runs this.
    """
    follower = _Follower(directory, version, apply, refused)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch, follower)
        if reload is not None:
            nursery.start_soon(_obey, reload, follower)
        await follower.run()


Fingerprint = tuple[tuple[str | int, ...], ...]
"""What tells a file from another or from an older one, for each; None for a directory that cannot be listed."""


@dataclass(slots=True)
class _Follower:
    directory: str
    version: int
    apply: Callable[[Snapshot], None]
    refused: Callable[[ConfigError], None]
    current: Snapshot | None = None
    problem: str = ""  # why the state that was read last was refused
    repeat: bool = False  # refuse it again, for somebody asked
    seen: Fingerprint | None = None
    changed: bool = True
    wake: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self.directory = os.path.abspath(self.directory)

    def look(self, changed: bool) -> None:
        """Have a look soon; `changed`: and read it even if it looks as it did."""
        self.changed |= changed
        self.wake.set()

    async def run(self) -> None:
        while True:
            await self.wake.wait()
            self.wake = trio.Event()
            seen = await trio.to_thread.run_sync(_fingerprint, self.directory)
            if self.changed or seen != self.seen:
                self.seen, self.changed = seen, False
                await self.read()

    async def read(self) -> None:
        repeat, self.repeat = self.repeat, False
        try:
            # In a thread: a large mesh takes seconds, and no connection waits for it.
            snapshot = await trio.to_thread.run_sync(self.load)
        except ConfigError as error:
            if str(error) != self.problem or repeat:
                self.problem = str(error)
                self.refused(error)
            return
        if self.problem or self.current is None or not _same(self.current, snapshot):
            self.problem = ""
            self.current, self.version = snapshot, snapshot.version
            self.apply(snapshot)

    def load(self) -> Snapshot:
        texts = _texts(self.directory)
        if not texts and self.current is not None and not _same(self.current, Snapshot(version=0)):
            # An unmounted volume looks like this. Without its endpoints a meshed service would get plain text.
            raise ConfigError(
                "no *.yaml file is left", file=self.directory, suggestion="to empty the mesh, leave one without content"
            )
        return read_mesh(texts, self.version + 1)


async def _obey(reload: AsyncIterable[object], follower: _Follower) -> None:
    async for _ in reload:
        follower.repeat = True
        follower.look(True)


async def _watch(follower: _Follower) -> None:
    """Says when to look: after changes, every few seconds, and once whenever there is something new to watch."""
    directory = follower.directory

    def matters(_: Change, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder == directory and (_is_resource_file(name) or name == _CONFIG_MAP):
            return True
        return f"{directory}/".startswith(f"{path}/")

    while True:
        places = _places(directory)
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_set_when_cancelled, stop)
            watched = awatch(
                *(path for path, _, _ in places),
                watch_filter=matters,
                step=_QUIET,
                debounce=_PATIENCE,
                rust_timeout=_LOOK_EVERY,
                yield_on_timeout=True,
                recursive=False,
                stop_event=stop,
                ignore_permission_denied=True,
            )
            # The watch stands before the task that looks gets its turn, so no change falls between the two.
            follower.look(True)
            try:
                async with aclosing(watched) as batches:
                    async for batch in batches:
                        follower.look(bool(batch))
                        if _places(directory) != places:
                            break
            except (OSError, RuntimeError, ExceptionGroup):
                # A place went just now, or the user has no inotify instance left: they are few.
                await trio.sleep(_LOOK_EVERY / 1000)
            nursery.cancel_scope.cancel()


async def _set_when_cancelled(stop: trio.Event) -> None:
    """The thread that watches cannot be cancelled; it looks at `stop`."""
    try:
        await trio.sleep_forever()
    finally:
        stop.set()


def _places(directory: str) -> list[tuple[str, int, int]]:
    """What to watch, with device and inode: the directory, and the closest folder above it, where it may come,
    go or be replaced.
    """
    places = []
    for path in (directory, *map(str, Path(directory).parents)):
        try:
            info = os.stat(path)
        except OSError:
            continue
        if stat.S_ISDIR(info.st_mode):
            places.append((path, info.st_dev, info.st_ino))
            if path != directory:
                break
    return places


def _fingerprint(directory: str) -> Fingerprint | None:
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
    return [os.path.join(directory, name) for name in sorted(names) if _is_resource_file(name)]


def _unreadable(path: str, error: OSError) -> ConfigError:
    hint = f"let the sidecar's user read it: chmod o+rX {path}" if error.errno in (errno.EACCES, errno.EPERM) else ""
    return ConfigError(f"cannot be read: {error.strerror}", file=path, suggestion=hint)


def _is_resource_file(name: str) -> bool:
    """Not what editors leave beside a file: .web.yaml.swp, #web.yaml#, .#web.yaml."""
    return name.endswith((".yaml", ".yml")) and not name.startswith((".", "#"))


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


def _same(one: Snapshot, other: Snapshot) -> bool:
    return structs.replace(one, version=other.version) == other
