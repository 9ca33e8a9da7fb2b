"""The line between the parent and one worker: a pair of sockets that nobody else has.

The parent's first message is the worker's brief. Each one after it brings a socket, over which the worker answers as it
would at an admin socket. A worker's messages bring clients that the parent is to answer. When one of the two is gone,
however it ended, the other reads the end of the line.
"""

import socket
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import msgspec
import trio

from meshnet.model.settings import Settings

_MOST = 1 << 16  # bytes of a brief


class Brief(msgspec.Struct, frozen=True):
    """What a worker is to do. Listeners, by what they take, and the lock of the access log are descriptors.

    With `ticket_secret` workers resume each other's TLS sessions.
    """

    number: int
    settings: Settings
    listeners: dict[str, tuple[int, ...]]
    log_lock: int
    ticket_secret: bytes


class ParentsEnd:
    """A context manager; leaving it hangs up."""

    def __init__(self) -> None:
        self._sock, self._other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.setblocking(False)

    @property
    def other(self) -> int:
        """The worker's end, as a descriptor to pass on."""
        return self._other.fileno()

    def begin(self, brief: Brief) -> None:
        """Once the worker has its end. Raises OSError if it is gone already."""
        self._other.close()
        self._sock.send(msgspec.json.encode(brief))

    def call(self) -> trio.SocketStream:
        """A stream to the worker's answers. Raises OSError if it takes no more."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._sock, [b"call"], [theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        return trio.SocketStream(trio.socket.from_stdlib_socket(ours))

    def clients(self) -> AsyncIterator[socket.socket]:
        """That the worker passes on, until it is gone. Owned by who takes them."""
        return _received(self._sock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._other.close()
        self._sock.close()


class WorkersEnd:
    """A context manager; leaving it hangs up."""

    def __init__(self, descriptor: int) -> None:
        self._sock = socket.socket(fileno=descriptor)
        self._sock.set_inheritable(False)

    def brief(self) -> Brief | None:
        """Waits for it; None if the parent is gone."""
        text = self._sock.recv(_MOST)
        return msgspec.json.decode(text, type=Brief) if text else None

    async def calls(self) -> AsyncIterator[trio.SocketStream]:
        """The parent's, until it is gone."""
        self._sock.setblocking(False)
        async for sock in _received(self._sock):
            yield trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    def pass_on(self, client: socket.socket) -> None:
        """To the parent. Where that is gone, or has too many to take already, it is closed."""
        with client:
            try:
                socket.send_fds(self._sock, [b"client"], [client.fileno()])
            except OSError:
                pass  # who asked hears nothing, and asks again

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sock.close()


async def _received(line: socket.socket) -> AsyncIterator[socket.socket]:
    """The sockets that come over `line`, one a message, until the other end is gone."""
    while True:
        await trio.lowlevel.wait_readable(line)
        try:
            text, descriptors, _, _ = socket.recv_fds(line, _MOST, 1)
        except BlockingIOError:
            continue
        except ConnectionResetError:  # it went without reading
            return
        if not text:
            return
        for descriptor in descriptors:
            sock = socket.socket(fileno=descriptor)
            sock.set_inheritable(False)
            sock.setblocking(False)
            yield sock
