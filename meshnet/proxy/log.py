"""The access log: one line per finished connection, written by a thread, so that a stuck reader stops nobody."""

import errno
import fcntl
import logging
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Literal, Protocol

from meshnet.model.connection import Connection

_log = logging.getLogger("meshnet.access")

_GATHER = 0.05  # seconds; lines of one such while are one write, and one wake-up of the thread
_WAITING_LINES = 10_000  # a reader slower than this loses lines, and is told how many
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})  # what a disk says that may have room again

Format = Literal["json", "text", "off"]


def log_to_stderr(level: str, who: str = "") -> None:
    """What is no access log. `who` is put before each line's text, where several processes write."""
    form = f"%(asctime)s %(levelname)s %(name)s {who}%(message)s"
    logging.basicConfig(level=level.upper(), format=form, force=True)


def access_format(setting: str) -> Format:
    """What `auto` means: text on a terminal, JSON otherwise."""
    if setting == "auto":
        return "text" if sys.stdout.isatty() else "json"
    return setting  # type: ignore[return-value] # LogSection.access has no other words


class Ended(Protocol):
    """What will not change any more: a record, or many connections that came and went."""

    def views(self) -> Iterable[Connection]: ...

    def lines(self) -> bytes:
        """The same in JSON, a line for each."""


class AccessLog:
    """Call it with all that ends. A context manager; what waits is written before it closes.

    Its thread makes the lines, many at a time: that costs half of what it does one by one between other work.

    `lock` is a file that every process has open which writes to the same `descriptor`: a pipe keeps together what is
    written at once only up to PIPE_BUF (pipe(7)). With it, so much is written at once and no more: who is killed then
    leaves no half of a line for the next one's to begin in.
    """

    def __init__(self, form: Format, descriptor: int = 1, lock: int | None = None) -> None:
        self._lines = _text if form == "text" else _json
        self._descriptor = descriptor
        self._lock = lock
        self._waiting: deque[tuple[Ended, int]] = deque()
        self._put = self._taken = 0  # how many lines that was so far
        self._lost = 0  # for want of a place among those that wait
        self._unwritten = 0  # for want of room on a disk, or as they could not be made
        self._told = 0  # of both
        self._is_torn = False  # the last line that was written has no end
        self._wake = threading.Event()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._write_forever, name="access-log", daemon=True)

    def __enter__(self) -> "AccessLog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._wake.set()
        self._thread.join(timeout=2.0)

    def __call__(self, ended: Ended, count: int = 1) -> None:
        """`count`: how many connections that is."""
        if self._put - self._taken >= _WAITING_LINES:
            self._lost += count
            return
        self._put += count
        self._waiting.append((ended, count))
        if not self._wake.is_set():
            self._wake.set()

    def _write_forever(self) -> None:
        while not (self._end.is_set() and not self._waiting):
            self._wake.wait()
            self._end.wait(_GATHER)
            if not self._end.is_set():
                self._wake.clear()
            lines: list[bytes] = []  # of one or of many each
            while self._waiting:
                ended, count = self._waiting.popleft()
                self._taken += count
                try:
                    lines.append(self._lines(ended))
                except Exception:
                    self._unwritten += count
                    _log.exception("a record could not be logged")
            try:
                self._write_counted(b"".join(lines))
            except OSError:
                return  # nobody reads any more; the proxy goes on

    def _write_counted(self, text: bytes) -> None:
        """And how many lines were lost before; those that do not go now are."""
        lost = self._lost + self._unwritten - self._told
        told = b'{"kind":"LinesLost","count":%d}\n' % lost if lost else b""
        end = b"\n" if self._is_torn and (text or told) else b""
        whole = end + text + told
        written = self._write(whole)
        if written:
            self._is_torn = not whole.endswith(b"\n", 0, written)
        if written == len(whole):
            self._told += lost
        else:
            self._unwritten += whole.count(b"\n", max(written, len(end)), len(whole) - len(told))

    def _write(self, text: bytes) -> int:
        """How many bytes went: fewer than there are where the disk is full. Raises OSError."""
        if self._lock is None:
            return _write_all(self._descriptor, text)
        written = 0
        fcntl.lockf(self._lock, fcntl.LOCK_EX)
        try:
            for piece in _pieces(text):
                size = _write_all(self._descriptor, piece)
                written += size
                if size < len(piece):
                    break
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)
        return written


def _pieces(text: bytes) -> Iterator[bytes]:
    """As many whole lines each as a pipe takes at once, or one that is longer."""
    at = 0
    while at < len(text):
        end = len(text)
        if end - at > select.PIPE_BUF:
            end = (text.rfind(b"\n", at, at + select.PIPE_BUF) + 1) or (text.index(b"\n", at) + 1)
        yield text[at:end]
        at = end


def _write_all(descriptor: int, data: bytes) -> int:
    """As `AccessLog._write`."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except OSError as error:
            if error.errno not in _FULL:
                raise
            break
    return len(data) - len(view)


def _json(ended: Ended) -> bytes:
    return ended.lines()


def _text(ended: Ended) -> bytes:
    return b"".join([_in_words(connection) + b"\n" for connection in ended.views()])


def _in_words(connection: Connection) -> bytes:
    reason = connection.reason
    source = connection.source.identity or connection.source.address
    ended = f"{reason.code} by {reason.ended_by} in {reason.phase}" if reason else ""
    detail = f" ({reason.message})" if reason and reason.message else ""
    line = (
        f"{connection.closed_at} {connection.id} {connection.direction} {source} -> "
        f"{connection.destination.service or connection.original_destination} {connection.endpoint or '-'} "
        f"{connection.tls.mode} sent={connection.bytes_sent} received={connection.bytes_received} "
        f"{connection.duration_ms:.0f}ms {ended}{detail}"
    )
    return line.encode("unicode_escape")  # a control character must not start a line, or paint one
