"""What one process answers to those who ask over the admin socket, and for its metrics and health."""

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import msgspec
import trio

from meshnet.errors import EndedBy, Reason
from meshnet.model.address import parse_address
from meshnet.model.admin import (
    Accepted,
    ConnectionEvent,
    ConnectionKey,
    ConnectionList,
    ConnectionListMetadata,
    Drain,
    ExplainConnection,
    ExplainRoute,
    FamilyList,
    GetMetrics,
    GetStatus,
    KillConnections,
    ListConnections,
    ListEndpoints,
    ListLogLevels,
    ListUncaptured,
    Ping,
    Question,
    Refused,
    Reload,
    RouteView,
    SetLogLevel,
)
from meshnet.model.connection import Connection, Security, Shape
from meshnet.model.uncaptured import UncapturedList
from meshnet.proxy import status
from meshnet.proxy.capture import CaptureProof
from meshnet.proxy.explain import explain_route, trace
from meshnet.proxy.levels import LogLevels
from meshnet.proxy.ping import ping, with_capture
from meshnet.proxy.sidecar import Sidecar
from meshnet.proxy.slices import slices


class OwnAnswers:
    """Without `capture`, somebody else proves it for this process."""

    def __init__(self, sidecar: Sidecar, listeners: Mapping[str, str], capture: CaptureProof | None = None) -> None:
        self._sidecar = sidecar
        self._capture = capture
        if capture is not None:
            sidecar.state.metrics.more = capture.families
        self._state = sidecar.state
        self._listeners = listeners
        self._levels = LogLevels()

    async def answer(self, question: Question) -> Shape:
        match question:
            case ListConnections(recent=recent, all=everything):
                return await self._connections(recent, everything)
            case ExplainConnection(id=connection_id):
                return self._explain(connection_id)
            case ExplainRoute(target=target):
                return self._explain_route(target)
            case GetStatus():
                return status.status(self._state, self._listeners, self._capture)
            case ListEndpoints(service=service):
                return status.endpoints(self._state, service)
            case Drain(timeout=timeout):
                self._sidecar.ask_drain(timeout)
                return draining(len(self._state.registry.open))
            case Reload():
                self._sidecar.reload()
                return Accepted(message="reading the mesh files")
            case GetMetrics():
                return FamilyList(items=await self._state.metrics.families())
            case KillConnections(connections=keys):
                return killed(await self._kill(keys))
            case Ping(target=target, timeout=timeout):
                result = await ping(target, timeout, self._state)
                if self._capture is None or isinstance(result, Refused):
                    return result
                return with_capture(result, self._capture)
            case ListUncaptured():
                return await uncaptured(self._capture)
            case ListLogLevels():
                return self._levels.told()
            case SetLogLevel():
                return self._levels.set(question)

    @asynccontextmanager
    async def follow(self) -> AsyncIterator[trio.MemoryReceiveChannel[ConnectionEvent]]:
        registry = self._state.registry
        follower = registry.follow()
        try:
            yield follower.receive
        finally:
            registry.unfollow(follower)

    async def not_ready_because(self) -> tuple[str, ...]:
        return status.not_ready_because(self._state, self._capture)

    async def scrape(self) -> bytes:
        return await self._state.metrics.scrape()

    async def _connections(self, recent: float, everything: bool) -> ConnectionList:
        """Seen and encoded in slices: ten thousand at once take a quarter of a second."""
        still_open = failed = plaintext = 0
        pieces: list[bytes] = []
        for records in slices(list(self._state.registry.listing(recent=recent, everything=everything))):
            items = [record.view() for record in records]
            for item in items:
                is_open = item.reason is None
                still_open += is_open
                failed += item.reason is not None and item.reason.code != "ok"
                plaintext += is_open and item.tls.mode is Security.PLAIN
            pieces.append(msgspec.json.encode(items)[1:-1])
            await trio.lowlevel.checkpoint()
        return ConnectionList(
            metadata=_metadata(still_open, failed, plaintext),
            items=msgspec.Raw(b"[%b]" % b",".join(pieces)),  # type: ignore[arg-type] # they are encoded already
        )

    def _explain_route(self, target: str) -> RouteView | Refused:
        try:
            address = parse_address(target)
        except ValueError as error:
            return Refused(error=str(error), fix="write HOST:PORT, as in 10.0.0.1:80")
        return explain_route(address, self._state)

    async def _kill(self, keys: Iterable[ConnectionKey]) -> int:
        """How many it was done to: those that have ended meanwhile, or are about to, are left alone."""
        wanted, count = set(keys), 0
        self._state.registry.catch_up()
        for records in slices(self._state.registry.open.values()):
            for record in records:
                if record.reason is None and record.abort_reason is None and record.key() in wanted:
                    record.abort(Reason.ADMIN_KILLED, EndedBy.ADMIN)
                    count += 1
            await trio.lowlevel.checkpoint()
        return count

    def _explain(self, connection_id: str) -> Connection | Refused:
        record = self._state.registry.find(connection_id)
        if record is None:
            kept = self._state.settings.admin.recent
            return Refused(
                error=f"no connection {connection_id} here",
                fix=f"meshnet conns --all lists the open ones and the last {kept}",
            )
        return record.view(trace=trace(record))


def draining(connections: int) -> Accepted:
    return Accepted(message=f"draining {connections} connections", connections=connections)


async def uncaptured(capture: CaptureProof | None) -> UncapturedList | Refused:
    if capture is None:
        return Refused(error="a worker does not look at the sockets of its host", fix="ask its parent")
    try:
        return await capture.uncaptured()
    except OSError as error:
        return Refused(error=f"the kernel does not list its sockets: {error.strerror}")


def killed(connections: int) -> Accepted:
    return Accepted(message=f"reset {connections} connections", connections=connections)


def connection_list(items: tuple[Connection, ...], silent_workers: int = 0) -> ConnectionList:
    still_open = [item for item in items if item.reason is None]
    return ConnectionList(
        metadata=_metadata(
            len(still_open),
            len([item for item in items if item.reason is not None and item.reason.code != "ok"]),
            len([item for item in still_open if item.tls.mode is Security.PLAIN]),
            silent_workers,
        ),
        items=items,
    )


def _metadata(still_open: int, failed: int, plaintext: int, silent_workers: int = 0) -> ConnectionListMetadata:
    return ConnectionListMetadata(
        node=status.node_name(),
        generated_at=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        open=still_open,
        failed=failed,
        plaintext=plaintext,
        silent_workers=silent_workers,
    )
