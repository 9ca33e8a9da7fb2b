"""What its operator reaches of a sidecar, of one process or of many: the admin socket, metrics, health and signals."""

import logging
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from meshnet.codec.probes import read_checks
from meshnet.errors import CommandError
from meshnet.model.admin import Drain, Reload
from meshnet.model.duration import parse_duration
from meshnet.model.settings import Settings
from meshnet.net import sockets
from meshnet.proxy import notify
from meshnet.proxy.admin import AdminServer, Answers, admin_listener
from meshnet.proxy.capture import CaptureProof
from meshnet.proxy.health import HealthServer
from meshnet.proxy.listen import Listeners
from meshnet.proxy.probes import ProbeRelay
from meshnet.proxy.readiness import CapturedReadiness
from meshnet.relay.ladder import serving

_log = logging.getLogger("meshnet.proxy")


@asynccontextmanager
async def front(
    settings: Settings,
    told: Mapping[str, str],
    listeners: Listeners,
    answers: Answers,
    capture: CaptureProof,
) -> AsyncIterator[Callable[[socket.socket], None]]:
    """Within it questions are answered, signals obeyed, and capture is proved. It takes who asks for readiness through
    the rules.

    `told` is what the log says of where it listens. Raises CommandError if the admin socket cannot be had, or the relay
    that the settings ask for.
    """
    admin = settings.admin
    relay, missing = serving(settings.proxy.relay)
    async with AsyncExitStack() as stack:
        try:
            admin_socket = await stack.enter_async_context(admin_listener(admin.socket))
        except PermissionError as error:
            raise CommandError(
                f"cannot listen at {admin.socket}: {error.strerror}",
                why="the folder belongs to somebody else",
                fix="sudo meshnet proxy",
                code=5,
            ) from error
        except OSError as error:
            raise CommandError(
                f"cannot listen at {admin.socket}: {error.strerror}",
                why="another sidecar may be running here",
                fix="meshnet status",
            ) from error
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(_obey_signals, answers, parse_duration(settings.proxy.drain_timeout), nursery)
        nursery.start_soon(trio.serve_listeners, guarded(AdminServer(answers).handle), [admin_socket])
        nursery.start_soon(trio.serve_listeners, guarded(HealthServer(answers).handle), _streams(listeners["health"]))
        if "probes" in listeners:
            probes = ProbeRelay(read_checks(settings.probes.checks), _mark(settings))
            nursery.start_soon(trio.serve_listeners, guarded(probes.handle), _streams(listeners["probes"]))
        answer_readiness: Callable[[socket.socket], None] = socket.socket.close  # nobody can have asked
        if settings.capture.readiness_port:
            readiness = CapturedReadiness(answers, capture.came)
            if "readiness" in listeners:
                found = _streams(listeners["readiness"])
                nursery.start_soon(trio.serve_listeners, guarded(readiness.answer), found)

            def take(client: socket.socket) -> None:
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(client))
                nursery.start_soon(guarded(readiness.handle), stream)

            answer_readiness = take
        nursery.start_soon(notify.keep_told, answers, listeners)
        nursery.start_soon(capture.run)
        _log.info("relay: %s, %s", relay, ", ".join(f"not {name}: {why}" for name, why in missing.items()))
        _log.info("listening: %s", ", ".join(told.values()))
        yield answer_readiness
        nursery.cancel_scope.cancel()


def guarded(handle: Callable[[trio.SocketStream], Awaitable[None]]) -> Callable[[trio.SocketStream], Awaitable[None]]:
    """A bug in answering one question must not end the sidecar."""

    async def answer(stream: trio.SocketStream) -> None:
        try:
            await handle(stream)
        except Exception:
            _log.exception("a request to the sidecar itself failed")

    return answer


def _streams(listeners: Sequence[socket.socket]) -> list[trio.SocketListener]:
    return [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in listeners]


def _mark(settings: Settings) -> int:
    return settings.proxy.mark if sockets.can_mark(settings.proxy.mark) else 0


async def _obey_signals(answers: Answers, drain_timeout: float, nursery: trio.Nursery) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
        async for number in received:
            question = Reload() if number == signal.SIGHUP else Drain(timeout=drain_timeout)
            nursery.start_soon(answers.answer, question)  # a worker may take its time; the next signal does not wait
