"""Callers in the test's own hands of the program in app.py."""

import socket
from types import TracebackType
from typing import Self

from tests.proxy.programs import read
from tests.traffic.conftest import Name
from tests.world import Host


class Call:
    """An open connection: `server` is the host that answered."""

    def __init__(self, host: Host, target: Name | str, port: int = 0) -> None:
        address, port = (target, port) if isinstance(target, str) else (target.address, target.port)
        self.socket = host.connect(address, port)
        try:
            self.server = self._line()
        except BaseException:
            self.socket.close()
            raise

    def say(self, text: str) -> str:
        """What comes back. Raises OSError or EOFError."""
        self.socket.sendall(text.encode() + b"\n")
        return self._line()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _line(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            line += read(self.socket, 1)
        return line.decode().rstrip("\n")


def who(host: Host, target: Name | str, port: int = 0) -> str:
    """Who answers one short connection."""
    with Call(host, target, port) as call:
        return call.server


def is_reset(host: Host, target: Name | str, port: int = 0) -> bool:
    """Whether a connection ends with a reset before a byte comes back."""
    try:
        Call(host, target, port).close()
    except ConnectionResetError:  # it can come as early as at the end of connect()
        return True
    return False


def waiting(host: Host, name: Name) -> socket.socket:
    """A connection to a service that may be let in later, or never."""
    return host.connect(name.address, name.port)
