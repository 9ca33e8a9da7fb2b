"""What the parent answers: it asks every worker at once, and makes one answer of theirs."""

import os
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

import msgspec
import trio
from msgspec import structs

from meshnet import __version__
from meshnet.model.admin import (
    Accepted,
    AdmissionView,
    CertificateStatus,
    ConfigStatus,
    ConnectionEvent,
    ConnectionList,
    Drain,
    EndpointList,
    ExplainAdmission,
    ExplainConnection,
    ExplainRoute,
    Family,
    FamilyList,
    GetMetrics,
    GetStatus,
    KillConnections,
    ListConnections,
    ListEndpoints,
    ListLogLevels,
    ListUncaptured,
    LogLevelList,
    Ping,
    Question,
    Refused,
    RelayStatus,
    Reload,
    RouteView,
    Sample,
    SetLogLevel,
    Status,
    WorkerStatus,
)
from meshnet.model.connection import Connection, Shape
from meshnet.model.ping import PingResult
from meshnet.model.settings import Settings
from meshnet.net import sockets
from meshnet.proxy.answers import draining, killed, metadata, uncaptured, unknown
from meshnet.proxy.capture import CaptureProof
from meshnet.proxy.levels import LogLevels
from meshnet.proxy.metrics import exposition
from meshnet.proxy.ping import with_capture
from meshnet.proxy.record import rfc3339
from meshnet.proxy.registry import choose
from meshnet.proxy.status import node_name
from meshnet.proxy.workers.merge import merge_endpoints, merge_lists, merge_status, parts_of
from meshnet.proxy.workers.sums import Totals, add_up
from meshnet.proxy.workers.worker import Worker

T = TypeVar("T", bound=Shape)

_PING_ENDS = 2.0  # seconds beyond its own, in which what it opened is ended


class JointAnswers:
    """`listeners` as status tells them; `stop_listening` closes the parent's own copies of them."""

    def __init__(
        self,
        workers: Sequence[Worker],
        totals: Totals,
        settings: Settings,
        listeners: Mapping[str, str],
        stop_listening: Callable[[], None],
        capture: CaptureProof,
    ) -> None:
        self._capture = capture
        self._workers = workers
        self._stop_listening = stop_listening
        self._totals = totals
        self._settings = settings
        self._listeners = listeners
        self._levels = LogLevels()
        for worker in workers:
            worker.to_hear = self._levels.requests
        self._draining = False
        self._started = time.monotonic()
        self._mark = settings.proxy.mark if sockets.can_mark(settings.proxy.mark) else 0

    async def answer(self, question: Question) -> Shape:
        match question:
            case ListConnections():
                return await self._connections(question)
            case ExplainConnection(id=connection_id):
                return await self._explain(connection_id)
            case ExplainRoute():
                return await self._first(question, RouteView)
            case ExplainAdmission():
                return await self._first(question, AdmissionView)
            case GetStatus():
                return await self._status()
            case ListEndpoints():
                listed = await self._ask(question, EndpointList)
                return EndpointList(items=merge_endpoints(each.items for each in listed.values()))
            case Drain(timeout=timeout):
                return await self._drain(timeout)
            case Reload():
                await self._ask(question, Accepted)
                return Accepted(message="reading the mesh files")
            case GetMetrics():
                return FamilyList(items=await self._families())
            case KillConnections():
                answers = await self._ask(question, Accepted)
                return killed(sum(answer.connections for answer in answers.values()))
            case Ping():
                return await self._ping(question)
            case ListUncaptured():
                return await uncaptured(self._capture)
            case ListLogLevels():
                return self._levels.told()
            case SetLogLevel():
                answer = self._levels.set(question)
                if not isinstance(answer, Refused):
                    await self._ask(question, LogLevelList)
                return answer

    @asynccontextmanager
    async def follow(self) -> AsyncIterator[AsyncIterable[ConnectionEvent]]:
        """A reader that is slow makes the workers wait with their next event, and they count what they cannot keep."""
        send, receive = trio.open_memory_channel[ConnectionEvent](0)
        async with trio.open_nursery() as nursery:
            for worker in self._workers:
                nursery.start_soon(_pass_on, worker, send)
            yield receive
            nursery.cancel_scope.cancel()

    async def not_ready_because(self) -> tuple[str, ...]:
        return (await self._status()).not_ready_because

    async def scrape(self) -> bytes:
        return await trio.to_thread.run_sync(exposition, await self._families())

    async def _lines(self, questions: Mapping[Worker, Question]) -> dict[Worker, bytes]:
        """What those say who answer, and have not died until all have."""
        pids = {worker: worker.pid for worker in questions}
        lines: dict[Worker, bytes | None] = {}

        async def ask(worker: Worker, question: Question) -> None:
            lines[worker] = await worker.ask(question)

        async with trio.open_nursery() as nursery:
            for worker, question in questions.items():
                nursery.start_soon(ask, worker, question)
        return {
            worker: line for worker, pid in pids.items() if (line := lines[worker]) is not None and worker.pid == pid
        }

    async def _ask(self, question: Question, kind: type[T]) -> dict[Worker, T]:
        lines = await self._lines(self._all(question))
        return {worker: msgspec.json.decode(line, type=kind) for worker, line in lines.items()}

    def _all(self, question: Question) -> dict[Worker, Question]:
        return dict.fromkeys(self._workers, question)

    async def _connections(self, question: ListConnections) -> ConnectionList | Refused:
        questions = self._all(question)
        if question.before:
            parts = parts_of(question.before, len(self._workers))
            if parts is None:
                return Refused(error="no such part of the list", fix="ask for it from its beginning")
            before = zip(self._workers, parts, strict=True)
            questions = {worker: structs.replace(question, before=part) for worker, part in before if part}
        lines = await self._lines(questions)
        lists = {worker: msgspec.json.decode(line, type=ConnectionList) for worker, line in lines.items()}
        empty = ConnectionList(metadata=metadata(0, 0, 0)) if not lists else None
        listed = merge_lists([lists.get(worker, empty) for worker in self._workers])
        silent, lost = len(questions) - len(lists), self._lost()
        told = structs.replace(
            listed.metadata,
            silent_workers=silent,
            reaches_back=max(listed.metadata.reaches_back, lost),
            failed_reach_back=max(listed.metadata.failed_reach_back, lost),
            uncaptured=self._capture.past,
        )
        return structs.replace(listed, metadata=told)

    def _lost(self) -> str:
        """When the last worker began that took the place of one that died, and with it of all that this remembered."""
        began = [worker.began for worker in self._workers if worker.deaths]
        return rfc3339(max(began)) if began else ""

    async def _explain(self, connection_id: str) -> Connection | Refused:
        lines = await self._lines(self._all(ExplainConnection(id=connection_id)))
        found = []
        for line in lines.values():
            try:
                found.append(msgspec.json.decode(line, type=Connection))
            except msgspec.ValidationError:
                pass  # a Refused: it is another worker's
        if (chosen := choose(found)) is not None:
            return chosen
        return unknown(connection_id, self._lost(), len(self._workers) - len(lines))

    async def _first(self, question: Question, kind: type[Shape]) -> Shape:
        """As the first worker that answers sees it; each has breakers and connections of its own."""
        for line in (await self._lines(self._all(question))).values():
            try:
                return msgspec.json.decode(line, type=kind)
            except msgspec.ValidationError:
                return msgspec.json.decode(line, type=Refused)
        return Refused(error="no worker answers", fix="meshnet status")

    async def _ping(self, question: Ping) -> PingResult | Refused:
        """By the first worker that answers: what they know of the mesh is the same."""
        for worker in self._workers:
            line = await worker.ask(question, patience=question.timeout + _PING_ENDS) if worker.pid else None
            if line is not None:
                try:
                    return with_capture(msgspec.json.decode(line, type=PingResult), self._capture)
                except msgspec.ValidationError:
                    return msgspec.json.decode(line, type=Refused)
        return Refused(error="no worker answers", fix="meshnet status")

    async def _status(self) -> Status:
        answers = await self._ask(GetStatus(), Status)
        own = Status(
            node=node_name(),
            version=__version__,
            pid=os.getpid(),
            uptime_seconds=round(time.monotonic() - self._started, 1),
            ready=False,
            not_ready_because=() if self._draining else self._capture.problems(),
            draining=self._draining,
            listeners=dict(self._listeners),
            open_connections=0,
            opened_total=0,
            failed_total=0,
            certificate=CertificateStatus(),
            config=ConfigStatus(
                version=0, directory=self._settings.mesh.directory, services=0, policies=0, age_seconds=0.0
            ),
            relay=RelayStatus(in_use=()),
            mark=self._mark,
            gid=os.getegid(),
            inbound_mode=self._settings.capture.inbound_mode,
            original_source=self._settings.capture.original_source,
            readiness_port=self._settings.capture.readiness_port,
            capture=self._capture.status(),
        )
        rows = [_row(worker, answers.get(worker)) for worker in self._workers]
        return merge_status(own, rows, list(answers.values()))

    async def _drain(self, timeout: float) -> Accepted:
        """From here on no worker is started again, and who ends last of them closes the last copy of the listeners."""
        self._draining = True
        self._stop_listening()
        for worker in self._workers:
            worker.drain_begins(timeout)
        answers = await self._ask(Drain(timeout=timeout), Accepted)
        return draining(sum(answer.connections for answer in answers.values()))

    async def _families(self) -> tuple[Family, ...]:
        for worker, answer in (await self._ask(GetMetrics(), FamilyList)).items():
            self._totals.heard(worker.pid, answer.items)
        alive = sum(worker.pid != 0 for worker in self._workers)
        deaths = sum(worker.deaths for worker in self._workers)
        return (
            *await trio.to_thread.run_sync(add_up, self._totals.parts()),
            _family("meshnet_workers", "gauge", "Workers that run.", "meshnet_workers", alive),
            _family("meshnet_worker_deaths", "counter", "Workers that died.", "meshnet_worker_deaths_total", deaths),
            *self._capture.families(),
        )


async def _pass_on(worker: Worker, send: trio.MemorySendChannel[ConnectionEvent]) -> None:
    """Of one process after the other."""
    while True:
        alive, ended = worker.alive, worker.ended
        await alive.wait()
        async with aclosing(worker.follow()) as events:
            async for event in events:
                await send.send(event)
        await ended.wait()


def _row(worker: Worker, answer: Status | None) -> WorkerStatus:
    silent = "does not answer" if worker.pid else "does not run"
    return WorkerStatus(
        number=worker.number,
        pid=worker.pid,
        ready=answer is not None and answer.ready,
        open_connections=answer.open_connections if answer else 0,
        deaths=worker.deaths,
        uptime_seconds=answer.uptime_seconds if answer else 0.0,
        problem="" if answer else silent,
    )


def _family(name: str, kind: str, text: str, sample: str, value: float) -> Family:
    return Family(name=name, type=kind, help=text, samples=(Sample(name=sample, labels={}, value=value),))
