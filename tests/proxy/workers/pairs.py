"""Connections that are open through workers of `web`, and which of them has which."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from meshnet.model.admin import WorkerStatus
from meshnet.model.connection import Connection, Direction
from meshnet.proxy.record import number_in_letters
from tests.proxy.conftest import API, Hosts
from tests.proxy.programs import accept, read
from tests.world import Process, Sidecar, stand_still, wait_for

_MOST = 200


@dataclass
class Pair:
    """A connection of the test's own, with both ends in its hands, and its record when it was open."""

    client: socket.socket
    app: socket.socket
    record: Connection

    @property
    def worker(self) -> int:
        return worker_of(self.record)

    def talks(self) -> bool:
        """Whether bytes pass both ways. Raises OSError or EOFError."""
        self.client.sendall(b"question")
        asked = read(self.app, 8)
        self.app.sendall(b"answer")
        return (asked, read(self.client, 6)) == (b"question", b"answer")

    def close(self) -> None:
        self.client.close()
        self.app.close()


def worker_of(record: Connection) -> int:
    """The number of the worker that gave the record its id."""
    return next(number for number in range(1, 65) if record.id[8:] == number_in_letters(number))


def outbound(sidecar: Sidecar) -> dict[str, Connection]:
    """Its open connections that were captured on their way out, by the client's address."""
    return {
        each.source.address: each
        for each in sidecar.connections(ended=False)
        if each.direction is Direction.OUTBOUND and each.reason is None and each.connect_ms is not None
    }


@contextmanager
def on_every_worker(hosts: Hosts, server: socket.socket, each: int = 1) -> Iterator[list[Pair]]:
    """As many connections from `web` to `server` as it takes until every worker of `web` has `each` of them."""
    numbers = [worker.number for worker in hosts.sidecar(hosts.web).status().workers]
    with ExitStack() as stack:
        pairs: list[Pair] = []
        while min(sum(pair.worker == number for pair in pairs) for number in numbers) < each:
            assert len(pairs) < _MOST, f"one worker got them all: {[pair.worker for pair in pairs]}"
            pairs.append(one_more(hosts, server))
            stack.callback(pairs[-1].close)
        yield pairs


def one_more(hosts: Hosts, server: socket.socket) -> Pair:
    client, app = hosts.web.connect(API, server.getsockname()[1]), accept(server)
    host, port = client.getsockname()
    sidecar = hosts.sidecar(hosts.web)
    record = wait_for(lambda: outbound(sidecar).get(f"{host}:{port}"), what="the record of a new connection")
    assert record is not None
    return Pair(client, app, record)


def process_of(sidecar: Sidecar) -> Process:
    assert sidecar.process is not None
    return sidecar.process


def row(sidecar: Sidecar, number: int) -> WorkerStatus:
    return next(worker for worker in sidecar.status().workers if worker.number == number)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A worker that stands still, and goes on afterwards if it is not dead by then."""
    stand_still(pid)
    try:
        yield
    finally:
        if not is_gone(pid)():
            os.kill(pid, signal.SIGCONT)


def is_gone(pid: int) -> Callable[[], bool]:
    def gone() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False

    return gone
