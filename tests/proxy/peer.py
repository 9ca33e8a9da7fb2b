"""A peer sidecar in the test's own hands: TLS and meshnet/1, frame by frame, on a blocking socket."""

import ssl
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from meshnet.codec.frames import Data, Frame, Open
from meshnet.control.authority import BUNDLE, CERTIFICATE, KEY, Issued, save_issued
from meshnet.net import tls
from meshnet.net.python_tls import PythonTls
from meshnet.tunnel.protocol import Role, Tunnel
from tests.proxy.programs import TIMEOUT
from tests.world import Host, Mesh

TUNNEL_PORT = 15108


def issue(mesh: Mesh, name: str) -> Issued:
    return mesh.authority.issue(mesh.identity(name), now=datetime.now(UTC))


def credentials(issued: Issued, bundle: bytes = b"") -> tls.Credentials:
    """As a sidecar holds them; `bundle` instead of the one that was issued along."""
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        save_issued(Issued(issued.certificate, issued.key, bundle or issued.bundle), home)
        return tls.load_credentials(str(home / CERTIFICATE), str(home / KEY), str(home / BUNDLE), PythonTls())


class End:
    """One end of a tunnel in the test's own hands."""

    def __init__(self, sock: ssl.SSLSocket, role: Role) -> None:
        self.sock = sock
        self.wire = Tunnel(role)
        self._frames: list[Frame] = []

    def send(self, data: bytes) -> None:
        self.sock.sendall(self.wire.data(len(data)) + data)

    def frame(self) -> Frame:
        """The next one; DATA with its payload copied. Raises EOFError when the tunnel was closed."""
        while not self._frames:
            if not (data := self.sock.recv(32768)):
                raise EOFError
            self._frames += self.wire.receive(data)
        frame = self._frames.pop(0)
        return Data(memoryview(bytes(frame.payload))) if isinstance(frame, Data) else frame


class Peer(End):
    """The client end of a tunnel from `source` to the sidecar of `target`. Raises OSError if there is no handshake.

    In TLS 1.3 a server that refuses the client's certificate says so only after the handshake: at the first read.
    """

    def __init__(self, source: Host, target: Host, context: ssl.SSLContext) -> None:
        plain = source.connect(target.address, TUNNEL_PORT, TIMEOUT)
        try:
            super().__init__(context.wrap_socket(plain), Role.CLIENT)
        except BaseException:
            plain.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sock.close()

    def open(self, host: str, port: int, *, source: str = "", id: str = "") -> Frame:
        """The answer to OPEN."""
        self.sock.sendall(self.wire.open(Open(host=host, port=port, source=source, id=id)))
        return self.frame()

    def is_closed(self) -> bool:
        """Whether the sidecar closes the tunnel now."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True
