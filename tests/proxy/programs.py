"""Applications in the test's own hands, on hosts of a world, and what the sidecars recorded about them.

A socket belongs to the host it was made on, whatever thread uses it, so a test can be client and server at once:

    server = listen(hosts.api, 8080)
    client = hosts.web.connect(API, 8080)
    app = accept(server)
"""

import os
import selectors
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from meshnet.model.connection import Connection
from meshnet.net.sockets import reset
from tests.produced import note
from tests.world import Host, Sidecar, stand_still, wait_for

TIMEOUT = 5.0


def listen(host: Host, port: int, *, backlog: int = 128) -> socket.socket:
    """An application on every address of the host, in both families."""
    server = host.open_socket(socket.AF_INET6)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.settimeout(TIMEOUT)
    server.bind(("::", port))
    server.listen(backlog)
    return server


def accept(server: socket.socket) -> socket.socket:
    """The next connection. Raises TimeoutError."""
    app, _ = server.accept()
    app.settimeout(TIMEOUT)
    return app


@contextmanager
def stopped(sidecar: Sidecar) -> Iterator[None]:
    """It stands still; the kernel goes on accepting and buffering for it."""
    process = sidecar.process
    assert process is not None
    stand_still(process.pid)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


def nobody_came(server: socket.socket) -> bool:
    """Whether not one connection waits at the server."""
    server.settimeout(0)
    try:
        server.accept()[0].close()
    except BlockingIOError:
        return True
    finally:
        server.settimeout(TIMEOUT)
    return False


def read(sock: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes. Raises EOFError when there are fewer."""
    data = bytearray()
    while len(data) < size:
        if not (piece := sock.recv(size - len(data))):
            raise EOFError(f"{len(data)} of {size} bytes")
        data += piece
    return bytes(data)


def read_all(sock: socket.socket) -> bytes:
    """What comes until the end. Raises ConnectionResetError when it ends by RST."""
    pieces = []
    while piece := sock.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def is_reset(host: Host, address: str, port: int, data: bytes = b"") -> bool:
    """Whether a connection is answered with RST, be it before connect has returned; not so where nobody listens."""
    try:
        with host.connect(address, port) as client:
            client.sendall(data)
            return ended_by_rst(client)
    except (ConnectionResetError, BrokenPipeError):
        return True


def ended_by_rst(sock: socket.socket) -> bool:
    """Whether the connection ends, and by RST; what comes before that is passed over."""
    try:
        read_all(sock)
    except ConnectionResetError:
        return True
    return False


def converse(client: socket.socket, app: socket.socket, up: bytes = b"question", down: bytes = b"answer") -> None:
    """Some bytes each way, and both ends closed, the client's first."""
    with client, app:
        client.sendall(up)
        assert read(app, len(up)) == up
        app.sendall(down)
        assert read(client, len(down)) == down
        client.shutdown(socket.SHUT_WR)
        assert app.recv(1) == b""
        app.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""


@contextmanager
def echo(host: Host, port: int) -> Iterator[Callable[[], int]]:
    """A server that says what it hears; gives how many connections it has had."""
    count = 0
    end_read, end_write = socket.socketpair()
    # Non-blocking writes suffice: nobody here sends more than a socket's buffer holds.
    with listen(host, port, backlog=1024) as server, selectors.DefaultSelector() as selector, end_read, end_write:
        server.setblocking(False)
        selector.register(server, selectors.EVENT_READ)
        selector.register(end_read, selectors.EVENT_READ)

        def take() -> None:
            nonlocal count
            app, _ = server.accept()
            count += 1
            selector.register(app, selectors.EVENT_READ)

        def answer(app: socket.socket) -> None:
            try:
                if data := app.recv(65536):
                    app.sendall(data)
                    return
            except OSError:
                pass
            selector.unregister(app)
            app.close()

        def serve() -> None:
            while True:
                for key, _ in selector.select():
                    if key.fileobj is end_read:
                        return
                    if key.fileobj is server:
                        take()
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        answer(key.fileobj)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield lambda: count
        finally:
            end_write.send(b".")
            thread.join()
            for key in list(selector.get_map().values()):
                if isinstance(key.fileobj, socket.socket) and key.fileobj not in (server, end_read):
                    key.fileobj.close()


def ask(host: Host, address: str, port: int, question: bytes = b"question") -> bytes:
    """One connection to an echoing server: what it answers until the end, or an OSError."""
    with host.connect(address, port) as client:
        client.sendall(question)
        client.shutdown(socket.SHUT_WR)
        return read_all(client)


class Records:
    """What a sidecar records from now on, or since it was started."""

    def __init__(self, sidecar: Sidecar, *, since_start: bool = False) -> None:
        self._sidecar = sidecar
        self._before = set() if since_start else {connection.id for connection in sidecar.connections()}

    def now(self) -> list[Connection]:
        """In the order in which they began, as far as the millisecond tells."""
        found = [each for each in self._sidecar.connections() if each.id not in self._before]
        note(found)
        return sorted(found, key=lambda each: each.opened_at)

    def ended(self, count: int) -> list[Connection]:
        """`count` records, all of them of connections that have ended; more is an error."""

        def all_ended() -> list[Connection]:
            found = self.now()
            return found if len(found) >= count and all(each.reason for each in found) else []

        found = wait_for(all_ended, what=f"{count} ended connections") if count else self.now()
        assert len(found) == count, found
        return found

    def one(self) -> Connection:
        """The one connection there was, when it has ended."""
        return self.ended(1)[0]

    def open(self, count: int = 1) -> list[Connection]:
        """As many connections as are open, with both legs up."""

        def up() -> list[Connection]:
            found = [each for each in self.now() if each.reason is None and each.connect_ms is not None]
            return found if len(found) >= count else []

        found = wait_for(up, what=f"{count} open connections")
        assert len(found) == count, found
        return found


def reason(connection: Connection) -> str:
    """Why it ended: `code by who in phase`."""
    assert connection.reason is not None
    note([connection])
    return f"{connection.reason.code} by {connection.reason.ended_by} in {connection.reason.phase}"


__all__ = [
    "Records",
    "accept",
    "ask",
    "converse",
    "echo",
    "ended_by_rst",
    "is_reset",
    "listen",
    "nobody_came",
    "read",
    "read_all",
    "reason",
    "reset",
]
