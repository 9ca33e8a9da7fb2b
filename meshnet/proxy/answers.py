"""What one process answers to those who ask over the admin socket, and for its metrics and health."""

import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from itertools import islice

import msgspec
import trio

from meshnet.errors import EndedBy, Reason
from meshnet.model.address import canonical_host, parse_address
from meshnet.model.admin import (
    Accepted,
    AdmissionView,
    ConnectionEvent,
    ConnectionKey,
    ConnectionList,
    ConnectionListMetadata,
    Drain,
    ExplainAdmission,
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
    SetLogLevel,
)
from meshnet.model.connection import Connection, Security, Shape
from meshnet.model.uncaptured import UncapturedList
from meshnet.proxy import status
from meshnet.proxy.capture import CaptureProof
from meshnet.proxy.explain import explain_admission, explain_route, trace
from meshnet.proxy.levels import LogLevels
from meshnet.proxy.passed import Passed
from meshnet.proxy.ping import ping, with_capture
from meshnet.proxy.record import rfc3339
from meshnet.proxy.registry import Listing, choose
from meshnet.proxy.sidecar import Sidecar
from meshnet.proxy.slices import slices

_AT_ONCE = 128  # connections; a millisecond or two


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
            case ListConnections():
                return await self._connections(question)
            case ExplainConnection(id=connection_id):
                return await self._explain(connection_id)
            case ExplainRoute(target=target):
                return explain_route(target, self._state)
            case ExplainAdmission(source=source, target=target):
                return self._explain_admission(source, target)
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
    async def follow(self) -> AsyncIterator[AsyncIterable[ConnectionEvent]]:
        registry = self._state.registry
        follower = registry.follow()
        try:
            yield follower
        finally:
            registry.unfollow(follower)

    async def not_ready_because(self) -> tuple[str, ...]:
        return status.not_ready_because(self._state, self._capture)

    async def scrape(self) -> bytes:
        return await self._state.metrics.scrape()

    async def _connections(self, question: ListConnections) -> ConnectionList:
        """Seen and encoded in slices: ten thousand at once take a quarter of a second."""
        registry = self._state.registry
        if question.id:
            listing = Listing(iter(await registry.find(question.id)), None)
        else:
            before = (question.before[0], question.before[1]) if len(question.before) == 2 else None
            listing = registry.listing(recent=question.recent, everything=question.all, before=before)
        still_open = failed = plaintext = 0
        pieces: list[bytes] = []
        while items := list(islice(listing.connections, _AT_ONCE)):
            for item in items:
                if isinstance(item, Passed):
                    pieces += item.lines().splitlines()
                    continue
                is_open = item.reason is None
                still_open += is_open
                failed += item.reason is not None and item.reason.code != "ok"
                plaintext += is_open and item.tls.mode is Security.PLAIN
                pieces.append(msgspec.json.encode(item))
            await trio.lowlevel.checkpoint()
        past = registry.past
        told = msgspec.structs.replace(
            metadata(still_open, failed, plaintext),
            before=listing.before or (),
            forgotten=past.well.forgotten + past.failed.forgotten,
            reaches_back=_moment(max(past.well.since, past.failed.since)),
            failed_reach_back=_moment(past.failed.since),
            uncaptured=self._capture.past if self._capture else 0,
        )
        return ConnectionList(
            metadata=told,
            items=msgspec.Raw(b"[%b]" % b",".join(pieces)),  # type: ignore[arg-type] # they are encoded already
        )

    def _explain_admission(self, source: str, target: str) -> AdmissionView | Refused:
        try:
            return explain_admission(canonical_host(source), parse_address(target), self._state)
        except ValueError as error:
            return Refused(error=str(error), fix="write an address, and HOST:PORT, as in 10.0.0.1:80")

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

    async def _explain(self, connection_id: str) -> Connection | Refused:
        found = choose(await self._state.registry.find(connection_id))
        if found is not None:
            return msgspec.structs.replace(found, trace=trace(found))
        past = self._state.registry.past
        return unknown(connection_id, _moment(max(past.well.since, past.failed.since)))


def unknown(connection_id: str, reaches_back: str, silent_workers: int = 0) -> Refused:
    silent = f", but {silent_workers} workers do not answer" if silent_workers else ""
    back = f"; of those that ended before {reaches_back} not all are remembered" if reaches_back else ""
    return Refused(
        error=f"no connection {connection_id} here{silent}{back}",
        fix="meshnet conns --all lists every one that is open or remembered",
    )


def _moment(wall: float) -> str:
    return rfc3339(wall) if wall else ""


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


def metadata(still_open: int, failed: int, plaintext: int) -> ConnectionListMetadata:
    """Of a list of now that has so many."""
    return ConnectionListMetadata(
        node=status.node_name(),
        generated_at=rfc3339(time.time()),
        open=still_open,
        failed=failed,
        plaintext=plaintext,
    )
