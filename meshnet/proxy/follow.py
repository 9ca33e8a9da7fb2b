"""The mesh from a directory of YAML files, kept up to date while the sidecar runs.

Events of the kernel say when to look, never what changed: the directory is read as a whole, and a look every few
seconds finds what events miss (a link to a file elsewhere, a network file system, a folder that is not there yet).
"""

import hashlib
import os
import stat
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import msgspec
import trio

from meshnet.codec.snapshot import decode_snapshot, encode_snapshot
from meshnet.errors import ConfigError
from meshnet.model.snapshot import Snapshot
from meshnet.net.inotify import Inotify
from meshnet.proxy import program
from meshnet.proxy.directory import Fingerprint, Refusal, fingerprint, is_resource_file, load_directory
from meshnet.proxy.slices import gently

_READER = "meshnet.proxy.directory"  # a program too
_LITTLE = 256 << 10  # bytes of all files together that take a tenth of a second at most: another program takes longer
_QUIET = 0.1  # seconds without a change, so that a copy of many files is read once
_PATIENCE = 1.0  # seconds of changes without end, after which they are read all the same
_LOOK_EVERY = 5.0  # seconds
_CONFIG_MAP = "..data"  # Kubernetes renames a new link over this one, and every file is a link through it


async def follow(
    directory: str,
    version: int,
    apply: Callable[[Snapshot], Awaitable[None]],
    refused: Callable[[ConfigError], Awaitable[None]],
    *,
    nothing_to_lose: Callable[[], bool] = lambda: True,
    reload: AsyncIterable[object] | None = None,
) -> None:
    """Applies the mesh of `directory` now and after every change that matters; runs until cancelled.

    The first good state becomes snapshot `version` + 1, and each one after it counts on by one. A bad state is
    refused, once, and the last good one stays: so does it when the directory, or every resource file in it, is gone.
    Before the first good state, `nothing_to_lose` says whether a directory without files may be one; a thread asks it.
    What comes out of `reload` (a signal receiver or a memory channel) makes it look at once, and refuse again.
    `apply` and `refused` are awaited in the task that runs this, one after the other.
    """
    follower = _Follower(directory, version, apply, refused, nothing_to_lose)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch, follower)
        if reload is not None:
            nursery.start_soon(_obey, reload, follower)
        await follower.run()


@dataclass(slots=True)
class _Follower:
    directory: str
    version: int
    apply: Callable[[Snapshot], Awaitable[None]]
    refused: Callable[[ConfigError], Awaitable[None]]
    nothing_to_lose: Callable[[], bool]
    current: bytes = b""  # a digest of the mesh in force
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
            seen = await trio.to_thread.run_sync(fingerprint, self.directory)
            if self.changed or seen != self.seen:
                self.seen, self.changed = seen, False
                await self.read()

    async def read(self) -> None:
        repeat, self.repeat = self.repeat, False
        try:
            if self.seen is not None and sum(int(size) for *_, size, _, _ in self.seen) > _LITTLE:
                snapshot, digest = await _read_elsewhere(self.directory, self.version + 1)
            else:
                snapshot, digest = await trio.to_thread.run_sync(self.load)
        except ConfigError as error:
            if str(error) != self.problem or repeat:
                self.problem = str(error)
                await self.refused(error)
            return
        if self.problem or digest != self.current:
            self.problem = ""
            self.current, self.version = digest, snapshot.version
            await self.apply(snapshot)

    def load(self) -> tuple[Snapshot, bytes]:
        may_be_empty = self.current == _EMPTY if self.current else self.nothing_to_lose()
        snapshot = load_directory(self.directory, self.version + 1, may_be_empty=may_be_empty)
        return snapshot, _digest(encode_snapshot(snapshot))


async def _read_elsewhere(directory: str, version: int) -> tuple[Snapshot, bytes]:
    """The snapshot of `directory`, read by a program of its own, and its digest. Raises ConfigError."""
    # Not a pipe: megabytes would have to be joined in trio's thread.
    with os.fdopen(os.memfd_create("mesh"), "r+b") as printed:
        try:
            done = await trio.run_process(
                program.command(_READER, directory),
                stdout=printed,
                check=False,
                start_new_session=True,  # a Ctrl-C is for us
                env=program.environment(),
            )
        except OSError as error:
            why = f"cannot be read, for no program can be started: {error.strerror}"
            raise ConfigError(why, file=directory) from None
        if done.returncode:
            printed.seek(0)
            raise _refusal(printed.read(), done.returncode, directory)
        try:
            return await trio.to_thread.run_sync(_decoded, printed, version)
        except ValueError as error:
            raise ConfigError(f"the program that reads it printed something else: {error}", file=directory) from None


def _decoded(printed: BinaryIO, version: int) -> tuple[Snapshot, bytes]:
    printed.seek(0)
    snapshot = decode_snapshot(gently(printed), version)
    printed.seek(0)
    return snapshot, _digest(gently(printed))


def _digest(lines: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line)
    return digest.digest()


_EMPTY = _digest(encode_snapshot(Snapshot(version=0)))


def _refusal(printed: bytes, code: int, directory: str) -> ConfigError:
    try:
        said = msgspec.json.decode(printed, type=Refusal)
    except msgspec.DecodeError:
        return ConfigError(f"the program that reads it ended with {code}, perhaps for want of memory", file=directory)
    return ConfigError(said.problem, file=said.file, line=said.line, suggestion=said.suggestion)


async def _obey(reload: AsyncIterable[object], follower: _Follower) -> None:
    async for _ in reload:
        follower.repeat = True
        follower.look(True)


async def _watch(follower: _Follower) -> None:
    """Says when to look: after changes, every few seconds, and once whenever there is something new to watch."""
    while True:
        places = _places(follower.directory)
        try:
            with Inotify(path for path, _, _ in places) as folders:
                follower.look(True)
                while _places(follower.directory) == places:
                    follower.look(await _change(folders, follower.directory))
        except OSError:
            # A place went just now, or the user has no inotify instance left: they are few.
            await trio.sleep(_LOOK_EVERY)
            follower.look(False)


async def _change(folders: Inotify, directory: str) -> bool:
    """Returns once something that matters has changed and all is quiet; False: nothing has, for a while."""
    changed = False
    with trio.move_on_after(_LOOK_EVERY):
        while not changed:
            changed = any(_matters(path, directory) for path in await folders.changed())
    if changed:
        with trio.move_on_after(_PATIENCE):
            is_quiet = False
            while not is_quiet:
                with trio.move_on_after(_QUIET) as quiet:
                    await folders.changed()
                is_quiet = quiet.cancelled_caught
    return changed


def _matters(path: str, directory: str) -> bool:
    folder, name = os.path.split(path)
    if folder == directory and (is_resource_file(name) or name == _CONFIG_MAP):
        return True
    return f"{directory}/".startswith(f"{path}/")


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
