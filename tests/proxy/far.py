"""A peer sidecar in the test's own hands, the accepting end: it serves tunnels frame by frame, on blocking sockets."""

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager

from meshnet.codec.frames import Data, Fin, Open
from meshnet.tunnel.protocol import Role
from tests.proxy.peer import TUNNEL_PORT, End, credentials, issue
from tests.proxy.programs import TIMEOUT, listen
from tests.world import Host, Mesh, wait_for


class FarTunnel(End):
    """One tunnel that a sidecar has opened to us."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        super().__init__(sock, Role.SERVER)

    def asked(self) -> Open:
        frame = self.frame()
        assert isinstance(frame, Open), frame
        return frame

    def read(self, size: int) -> bytes:
        """Exactly so many bytes of DATA."""
        data = b""
        while len(data) < size:
            frame = self.frame()
            assert isinstance(frame, Data), frame
            data += frame.payload
        assert len(data) == size
        return data

    def say(self, *frames: bytes) -> None:
        self.sock.sendall(b"".join(frames))

    def converse(self, client: socket.socket) -> None:
        """Some bytes each way in a lease that has begun, and its end; the client ends first."""
        with client:
            client.sendall(b"question")
            assert self.read(8) == b"question"
            self.send(b"answer")
            assert client.recv(64) == b"answer"
            client.shutdown(socket.SHUT_WR)
            assert self.frame() == Fin()
            self.say(self.wire.fin())
            assert client.recv(1) == b""


class Far:
    """Where sidecars come with their tunnels."""

    def __init__(self, server: socket.socket, context: ssl.SSLContext) -> None:
        self._server = server
        self._context = context
        self._tunnels: list[FarTunnel] = []

    def accept(self, shakes_after: float = 0.0) -> FarTunnel:
        """The next tunnel, whose handshake we answer so many seconds later. Raises TimeoutError."""
        plain, _ = self._server.accept()
        plain.settimeout(TIMEOUT)
        answers_at = time.monotonic() + shakes_after
        wait_for(lambda: time.monotonic() >= answers_at, what="the time to shake hands")
        tunnel = FarTunnel(self._context.wrap_socket(plain, server_side=True))
        self._tunnels.append(tunnel)
        return tunnel

    def close(self) -> None:
        for tunnel in self._tunnels:
            tunnel.sock.close()


@contextmanager
def serving(host: Host, mesh: Mesh) -> Iterator[Far]:
    """With the identity of that host, which has no sidecar."""
    with listen(host, TUNNEL_PORT) as server:
        far = Far(server, credentials(issue(mesh, host.name)).server)  # type: ignore[arg-type] # Python's own TLS made it
        try:
            yield far
        finally:
            far.close()
