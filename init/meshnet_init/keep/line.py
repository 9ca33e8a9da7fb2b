"""A line to the sidecar, that the kernel hangs up when the sidecar dies, however that happens.

It is a connection to its admin socket, which a sidecar never closes while it lives. It needs no process id, which in
a pod is another container's, and nobody else can end it.
"""

import select
import socket

import msgspec

from meshnet.model.admin import GetStatus, Status

_PATIENCE = 2.0  # seconds for an answer
_MOST = 1 << 24


class SidecarLine:
    """A context manager. Raises OSError where no sidecar answers."""

    def __init__(self, path: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._sock.settimeout(_PATIENCE)
            self._sock.connect(path)
        except OSError:
            self._sock.close()
            raise

    def fileno(self) -> int:
        return self._sock.fileno()

    def is_up(self) -> bool:
        """Whether the sidecar lives."""
        if not select.select([self._sock], [], [], 0)[0]:
            return True
        try:
            return bool(self._sock.recv(1 << 16, socket.MSG_DONTWAIT))  # an answer that came late
        except BlockingIOError:
            return True
        except OSError:
            return False

    def status(self) -> Status | None:
        """What the sidecar says of itself; None if it is busy, or gone."""
        try:
            self._sock.sendall(msgspec.json.encode(GetStatus()) + b"\n")
            answer = b""
            while not answer.endswith(b"\n") and len(answer) < _MOST:
                data = self._sock.recv(1 << 16)
                if not data:
                    return None
                answer += data
            return msgspec.json.decode(answer.splitlines()[-1], type=Status)
        except (OSError, msgspec.DecodeError):
            return None

    def close(self) -> None:
        self._sock.close()
