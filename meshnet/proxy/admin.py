"""The admin socket: a UNIX socket, one JSON line a request. What can be asked is in meshnet.model.admin.

Whoever may open it may look; what changes something is for root and our own user.
"""

import grp
import logging
import os
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime

import msgspec
import trio

from meshnet.model.admin import (
    GROUP,
    Accepted,
    ConnectionList,
    ConnectionListMetadata,
    Drain,
    ExplainConnection,
    FollowConnections,
    GetStatus,
    ListConnections,
    ListEndpoints,
    Refused,
    Request,
    decode_request,
)
from meshnet.model.connection import Security, Shape
from meshnet.proxy import status
from meshnet.proxy.explain import trace
from meshnet.proxy.registry import Follower
from meshnet.proxy.state import ProxyState

_log = logging.getLogger("meshnet.admin")

_MAX_REQUEST = 65536


class AdminServer:
    def __init__(self, state: ProxyState, listeners: Mapping[str, str], drain: Callable[[float], None]) -> None:
        self._state = state
        self._listeners = listeners
        self._drain = drain

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
        match request:
            case ListConnections(recent=recent, all=everything):
                await _send(stream, self._connections(recent, everything))
            case FollowConnections():
                await self._follow(stream)
            case ExplainConnection(id=connection_id):
                await _send(stream, self._explain(connection_id))
            case GetStatus():
                await _send(stream, status.status(self._state, self._listeners))
            case ListEndpoints(service=service):
                await _send(stream, status.endpoints(self._state, service))
            case Drain() if not _may_change(stream):
                only = "only root and the sidecar's own user may end it"
                await _send(stream, Refused(error=only, fix="sudo meshnet down"))
            case Drain(timeout=timeout):
                self._drain(timeout)
                await _send(stream, Accepted(message=f"draining {len(self._state.registry.open)} connections"))

    def _connections(self, recent: float, everything: bool) -> ConnectionList:
        items = tuple(record.view() for record in self._state.registry.listing(recent=recent, everything=everything))
        still_open = [item for item in items if item.reason is None]
        return ConnectionList(
            metadata=ConnectionListMetadata(
                node=status.node_name(),
                generated_at=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                open=len(still_open),
                failed=len([item for item in items if item.reason is not None and item.reason.code != "ok"]),
                plaintext=len([item for item in still_open if item.tls.mode is Security.PLAIN]),
            ),
            items=items,
        )

    def _explain(self, connection_id: str) -> Shape:
        record = self._state.registry.find(connection_id)
        if record is None:
            kept = self._state.settings.admin.recent
            return Refused(
                error=f"no connection {connection_id} here",
                fix=f"meshnet conns --all lists the open ones and the last {kept}",
            )
        return record.view(trace=trace(record))

    async def _follow(self, stream: trio.SocketStream) -> None:
        """Until the reader hangs up. Its end is noticed by reading, for it may be long until there is an event."""
        follower = self._state.registry.follow()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_pass_on, follower, stream)
                await stream.receive_some(1)
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self._state.registry.unfollow(follower)


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
    """SO_PEERCRED (man unix): who the other side was when it connected, whatever it has become since."""
    credentials = stream.socket.getsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_PEERCRED, struct.calcsize("iII"))
    _, user, _ = struct.unpack("iII", credentials)
    return user in (0, os.geteuid())


async def _somebody_listens(path: str) -> bool:
    try:
        stream = await trio.open_unix_socket(path)
    except OSError:
        return False
    await stream.aclose()
    return True


async def _pass_on(follower: Follower, stream: trio.SocketStream) -> None:
    async for event in follower.receive:
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
