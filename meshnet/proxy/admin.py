"""The admin socket: a UNIX socket, one JSON line a request. What can be asked is in meshnet.model.admin.

Whoever may open it may look; what changes something is for root and our own user.
"""

import grp
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Protocol

import msgspec
import trio

from meshnet.model.admin import (
    GROUP,
    ConnectionEvent,
    Drain,
    FollowConnections,
    KillConnections,
    Question,
    Refused,
    Reload,
    Request,
    SetLogLevel,
    decode_request,
)
from meshnet.model.connection import Shape
from meshnet.net.keeper import peer_user

_log = logging.getLogger("meshnet.admin")

_MAX_REQUEST = 65536


class Answers(Protocol):
    """Who knows: one process, or the parent of several."""

    async def answer(self, question: Question) -> Shape: ...

    def follow(self) -> AbstractAsyncContextManager[AsyncIterable[ConnectionEvent]]:
        """First every open connection, then events as they come."""

    async def not_ready_because(self) -> tuple[str, ...]:
        """Empty when the sidecar can do its work."""

    async def scrape(self) -> bytes:
        """The metrics as Prometheus reads them."""


class AdminServer:
    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    async def handle(self, stream: trio.SocketStream) -> None:
        async with stream:
            try:
                async with aclosing(_lines(stream)) as lines:
                    async for line in lines:
                        await self._answer(line, stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

    async def _answer(self, line: bytes, stream: trio.SocketStream) -> None:
        try:
            request: Request = decode_request(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            await _send(stream, Refused(error=f"not a request: {error}", fix="use the same version of meshnet"))
            return
        _log.debug("asked by user %d: %s", peer_user(stream.socket), request)
        match request:
            case FollowConnections():
                await self._follow(stream)
            case Drain() | Reload() | KillConnections() | SetLogLevel() if not _may_change(stream):
                only = "only root and the sidecar's own user may change what it does; others may look"
                await _send(stream, Refused(error=only, fix="type it again with sudo"))
            case _:
                await _send(stream, await self._answers.answer(request))

    async def _follow(self, stream: trio.SocketStream) -> None:
        """Until the reader hangs up. Its end is noticed by reading, for it may be long until there is an event."""
        try:
            async with self._answers.follow() as events, trio.open_nursery() as nursery:
                nursery.start_soon(_pass_on, events, stream)
                await stream.receive_some(1)
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


@asynccontextmanager
async def admin_listener(path: str) -> AsyncIterator[trio.SocketListener]:
    """Listens at `path`, open to the group meshnet where there is one. Raises OSError if another proxy does."""
    where = trio.Path(path)
    await where.parent.mkdir(parents=True, exist_ok=True)
    if await where.is_socket() and not await _somebody_listens(path):
        await where.unlink()
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        await sock.bind(path)
    finally:
        os.umask(before)
    try:
        os.chown(path, -1, grp.getgrnam(GROUP).gr_gid)
        await where.chmod(0o660)
    except KeyError:
        pass  # without the group only our own user and root may look
    except OSError as error:  # giving it to a group takes being in it
        _log.warning("the group %s cannot be given %s: %s", GROUP, path, error.strerror)
    sock.listen(16)
    try:
        yield trio.SocketListener(sock)
    finally:
        sock.close()
        os.unlink(path)


def _may_change(stream: trio.SocketStream) -> bool:
    return peer_user(stream.socket) in (0, os.geteuid())


async def _somebody_listens(path: str) -> bool:
    try:
        stream = await trio.open_unix_socket(path)
    except OSError:
        return False
    await stream.aclose()
    return True


async def _pass_on(events: AsyncIterable[ConnectionEvent], stream: trio.SocketStream) -> None:
    async for event in events:
        await _send(stream, event)


async def _lines(stream: trio.SocketStream) -> AsyncGenerator[bytes]:
    waiting = b""
    async for data in stream:
        waiting += data
        *lines, waiting = waiting.split(b"\n")
        for line in lines:
            yield line
        if len(waiting) > _MAX_REQUEST:
            return


async def _send(stream: trio.SocketStream, message: Shape) -> None:
    await stream.send_all(msgspec.json.encode(message) + b"\n")
