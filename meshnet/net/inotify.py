"""What changes in a folder, as the kernel tells it: inotify(7)."""

import ctypes
import os
import struct
from collections.abc import Iterable, Iterator
from typing import Self

import trio

_EVENT = struct.Struct("iIII")  # struct inotify_event: watch, what happened, cookie, length of the name behind it
_LARGEST = 1 << 16  # bytes of events that are read at once
# <sys/inotify.h>
_MODIFY, _ATTRIB, _CLOSE_WRITE, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x2, 0x4, 0x8, 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF, _IGNORED, _ONLYDIR = 0x400, 0x800, 0x8000, 0x1000000
_MASK = _MODIFY | _ATTRIB | _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF | _MOVE_SELF
_MASK |= _ONLYDIR

_libc = ctypes.CDLL(None, use_errno=True)


class Inotify:
    """Watches `folders`, not those in them; a context manager. Raises OSError: one is none, or it is one too many."""

    def __init__(self, folders: Iterable[str]) -> None:
        self._fd = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "")
        self._folders: dict[int, str] = {}
        try:
            for folder in folders:
                watch = _checked(_libc.inotify_add_watch(self._fd, os.fsencode(folder), _MASK), folder)
                self._folders[watch] = folder
        except OSError:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        trio.lowlevel.notify_closing(self._fd)
        os.close(self._fd)

    async def changed(self) -> set[str]:
        """The paths of what has changed since it was asked last, at least one. Where events were lost: every folder."""
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            if paths := set(self._paths(os.read(self._fd, _LARGEST))):
                return paths

    def _paths(self, events: bytes) -> Iterator[str]:
        at = 0
        while at < len(events):
            watch, what, _, size = _EVENT.unpack_from(events, at)
            at += _EVENT.size + size
            name = os.fsdecode(events[at - size : at].rstrip(b"\0"))
            if watch < 0:  # IN_Q_OVERFLOW
                yield from self._folders.values()
            elif not what & _IGNORED:
                yield os.path.join(self._folders[watch], name) if name else self._folders[watch]


def _checked(result: int, folder: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), folder or None)
    return result
