"""Programs of the soak's own: one that speaks first or only echoes, and who talks to it."""

import hashlib
import socket
import socketserver
import threading
from enum import Enum, auto

from meshnet_cli.demo.world import Host
from tests.proxy.programs import read, reset
from tests.soak.kind import last

SECRET = b"for the endpoint alone"
"""In all that they say; no frame between hosts may hold it."""
GREETING = b"220 ready\n"
SIZE = 16384

_TRICKLE = 64  # bytes of an answer that come one by one
_BETWEEN = 0.01  # seconds
_LINGER = 0.5  # seconds


class Mood(Enum):
    """How an application treats who calls it."""

    USUAL = auto()
    SILENT = auto()  # it reads, and never answers
    RESETS = auto()  # in the middle of what it has to say
    TRICKLES = auto()
    LINGERS = auto()  # its own end comes a while after its client's


class Talker:
    """A thread for each connection, so that one that is stuck keeps nobody waiting. `mood` may be set at any time."""

    def __init__(self, host: Host, port: int, *, greets: bool) -> None:
        self.mood = Mood.USUAL
        say, linger = self._say, self._linger

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                try:
                    if greets:
                        say(self.request, GREETING)
                    while data := self.request.recv(65536):
                        say(self.request, data)
                    linger()
                except OSError:
                    pass  # a reset is an end like any other

        with host.entered():
            self._server = socketserver.ThreadingTCPServer(("0.0.0.0", port), Handler, bind_and_activate=False)
            self._server.allow_reuse_address = True
            self._server.daemon_threads = True
            self._server.block_on_close = False
            self._server.request_queue_size = 128
            self._server.server_bind()
            self._server.server_activate()
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1})
        self._thread.start()

    def _say(self, client: socket.socket, data: bytes) -> None:
        match self.mood:
            case Mood.SILENT:
                return
            case Mood.RESETS:
                client.sendall(data[: len(data) // 2])
                reset(client)
                raise ConnectionResetError
            case Mood.TRICKLES:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for byte in data[:_TRICKLE]:
                    client.sendall(bytes([byte]))
                    last(_BETWEEN)
                client.sendall(data[_TRICKLE:])
            case _:
                client.sendall(data)

    def _linger(self) -> None:
        if self.mood is Mood.LINGERS:
            last(_LINGER)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def greet(host: Host, address: str, port: int, timeout: float = 5.0) -> None:
    """One short connection to who speaks first. Raises OSError or EOFError."""
    with host.connect(address, port, timeout) as client:
        if read(client, len(GREETING)) != GREETING:
            raise EOFError("another greeting")
        client.sendall(SECRET)
        if read(client, len(SECRET)) != SECRET:
            raise EOFError("another answer")
        client.shutdown(socket.SHUT_WR)
        if client.recv(1):
            raise EOFError("more than was said")


class LongTalk:
    """One connection for as long as it lasts; what comes back is compared by hash. `say` raises OSError or EOFError."""

    def __init__(self, host: Host, address: str, port: int) -> None:
        self._client = host.connect(address, port, timeout=10.0)
        self._count = 0

    def say(self) -> None:
        self._count += 1
        said = SECRET + hashlib.shake_256(self._count.to_bytes(8, "big")).digest(SIZE)
        self._client.sendall(said)
        if hashlib.sha256(read(self._client, len(said))).digest() != hashlib.sha256(said).digest():
            raise EOFError("what came back is not what was said")

    def close(self) -> None:
        self._client.close()
