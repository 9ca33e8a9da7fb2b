"""One worker as its parent sees it: a place, and the processes that fill it one after the other."""

import logging
import socket
import subprocess
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing

import msgspec
import trio

from meshnet.decide.pauses import Pauses
from meshnet.model.admin import ConnectionEvent, FollowConnections, Question
from meshnet.model.settings import Settings
from meshnet.proxy import program
from meshnet.proxy.listen import Listeners
from meshnet.proxy.workers.line import Brief, ParentsEnd

_log = logging.getLogger("meshnet.proxy")

_PROGRAM = "meshnet.proxy.workers"
_PATIENCE = 2.0  # seconds for an answer: less than an operator's command waits for all of them
_GRACE = 5.0  # seconds beyond the drain, after which a worker that still lives is killed


class Worker:
    """`number` counts from 1. `pid` is 0 while no process fills the place; `deaths` are those that nobody asked for.

    `died` is called with the pid of each process that has ended.
    """

    def __init__(
        self,
        number: int,
        settings: Settings,
        listeners: Listeners,
        log_lock: int,
        ticket_secret: bytes,
        died: Callable[[int], None],
    ) -> None:
        self.number = number
        self.pid = 0
        self.deaths = 0
        self.began = 0.0  # the process, in seconds since the epoch
        self.alive = trio.Event()
        self.ended = trio.Event()
        self._brief = Brief(
            number=number,
            settings=settings,
            listeners={name: tuple(sock.fileno() for sock in found) for name, found in listeners.items()},
            log_lock=log_lock,
            ticket_secret=ticket_secret,
        )
        self._died = died
        self.to_hear: Callable[[], Iterable[Question]] = tuple
        """What each new process is to be told first, because those before it were."""
        self.answer_readiness: Callable[[socket.socket], None] = socket.socket.close
        """Takes what comes to a worker and is for the sidecar as a whole."""
        self._line: ParentsEnd | None = None
        self._drained = trio.Event()
        self._until_killed = trio.CancelScope()

    async def run(self) -> None:
        """Until it has been asked to drain, and has ended."""
        pauses = Pauses()
        while not self._drained.is_set():
            started = trio.current_time()
            how = await self._live()
            if self._drained.is_set():
                return
            self.deaths += 1
            pause = pauses.after(trio.current_time() - started)
            _log.error("worker %d %s; again in %.1f s", self.number, how, pause)
            with trio.move_on_after(pause):
                await self._drained.wait()

    def drain_begins(self, timeout: float) -> None:
        """When the worker is asked to. Asked twice, it ends at once; nobody takes its place."""
        again = self._drained.is_set()
        self._drained.set()
        self._until_killed.deadline = trio.current_time() + (0.0 if again else timeout) + _GRACE

    async def ask(self, question: Question, patience: float = _PATIENCE) -> bytes | None:
        """Its answer, a line of JSON; None if it gives none within `patience` seconds."""
        with trio.move_on_after(patience):
            async with aclosing(self._answers(question)) as lines:
                async for line in lines:
                    return line
        return None

    async def follow(self) -> AsyncGenerator[ConnectionEvent]:
        """Its events, until it ends."""
        async with aclosing(self._answers(FollowConnections())) as lines:
            async for line in lines:
                yield msgspec.json.decode(line, type=ConnectionEvent)

    async def _answers(self, request: Question | FollowConnections) -> AsyncGenerator[bytes]:
        if self._line is None:
            return
        try:
            async with self._line.call() as stream:
                await stream.send_all(msgspec.json.encode(request) + b"\n")
                waiting: list[bytes] = []
                async for data in stream:
                    *whole, rest = bytes(data).split(b"\n")
                    for line in whole:
                        yield b"".join((*waiting, line))
                        waiting.clear()
                    waiting.append(rest)
        except (OSError, trio.BrokenResourceError):
            return  # it is about to end, or so far behind that it takes no more questions

    async def _tell(self) -> None:
        for question in list(self.to_hear()):
            await self.ask(question)

    async def _take(self, line: ParentsEnd) -> None:
        async for client in line.clients():
            self.answer_readiness(client)

    async def _live(self) -> str:
        """One process from its start to its end. What became of it, in words."""
        listeners = [descriptor for found in self._brief.listeners.values() for descriptor in found]
        with ParentsEnd() as line:
            try:
                process = await trio.lowlevel.open_process(
                    program.command(_PROGRAM, str(line.other)),
                    stdin=subprocess.DEVNULL,
                    pass_fds=(line.other, self._brief.log_lock, *listeners),
                    env=program.environment(),
                )
            except OSError as error:
                return f"cannot be started: {error.strerror}"
            try:
                line.begin(self._brief)
            except OSError:
                pass  # it has died already
            self.pid, self._line, self._until_killed = process.pid, line, trio.CancelScope()
            self.began = time.time()
            if self._drained.is_set():  # meanwhile; it has not begun to accept
                process.kill()
            self.alive.set()
            try:
                with self._until_killed:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._tell)
                        nursery.start_soon(self._take, line)
                        await process.wait()
                        nursery.cancel_scope.cancel()
                if self._until_killed.cancelled_caught:
                    _log.error("worker %d (pid %d) does not end, and is killed", self.number, self.pid)
                    process.kill()
                    await process.wait()
            finally:
                self._died(self.pid)
                self.pid, self._line = 0, None
                self.ended.set()
                self.alive, self.ended = trio.Event(), trio.Event()
        return f"(pid {process.pid}) ended: {_how(process.returncode)}"


def _how(code: int | None) -> str:
    return f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
