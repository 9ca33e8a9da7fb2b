"""How one reaches whoever keeps the rules of this network namespace. Takes no rights: it is a question."""

import os
import socket
import struct

import msgspec

from meshnet.model.capture import KEEPER, KeeperReport, KeeperRequest

_MOST = 1 << 20
_PATIENCE = 35.0  # seconds until it has done what it was told: more than it takes for that
_CREDENTIALS = struct.Struct("iII")  # struct ucred


def ask_keeper(request: KeeperRequest | None = None, timeout: float = 1.0) -> KeeperReport | None:
    """How it is, after it has done what it was told to; None if there is none, or none that can be believed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(KEEPER)
            if peer_user(sock) not in (0, os.geteuid()):  # any program may take a name
                return None
            sock.sendall((b"" if request is None else msgspec.json.encode(request)) + b"\n")
            answer = b""
            while len(answer) < _MOST and (data := sock.recv(1 << 16)):
                answer += data
            return msgspec.json.decode(answer, type=KeeperReport)
        except (OSError, msgspec.DecodeError):
            return None


def tell_keeper(request: KeeperRequest) -> KeeperReport | None:
    """How it is now; None if there is no keeper."""
    return ask_keeper(request, _PATIENCE)


def peer_user(sock: socket.socket) -> int:
    """SO_PEERCRED (unix(7)): who the other side was when it connected or began to listen."""
    _, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(user)
