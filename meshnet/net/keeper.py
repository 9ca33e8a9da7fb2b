"""How one reaches whoever keeps the rules of this network namespace. Takes no rights: it is a question."""

import os
import pwd
import socket
import struct
import time
from typing import TYPE_CHECKING

import msgspec

from meshnet.errors import CommandError
from meshnet.model.capture import KEEPER, KEEPER_USER, KeeperReport, KeeperRequest

if TYPE_CHECKING:
    import trio

_MOST = 1 << 20
_AGAIN = 0.05  # seconds
_PATIENCE = 35.0  # seconds until it has done what it was told: more than it takes for that
_CREDENTIALS = struct.Struct("iII")  # struct ucred


def ask_keeper(timeout: float = 1.0) -> KeeperReport | None:
    """How it is; None if there is none, none that can be believed, or none that has time."""
    try:
        return _told(None, timeout)
    except (OSError, msgspec.DecodeError):
        return None


def tell_keeper(request: KeeperRequest) -> KeeperReport | None:
    """How it is after it has done that; None if there is no keeper. Raises CommandError where it does not answer."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return _told(request, max(0.1, deadline - time.monotonic()))
        except ConnectionRefusedError:  # nobody has that name
            return None
        except (OSError, msgspec.DecodeError) as error:
            if time.monotonic() > deadline:
                raise CommandError(
                    "the keeper of the rules does not answer",
                    why=getattr(error, "strerror", None) or str(error),
                    fix="try again, or see who it is: ss -xlp | grep meshnet/keeper",
                ) from error
            time.sleep(_AGAIN)  # noqa: TID251 - its queue is full: nothing tells us when there is room


def _told(request: KeeperRequest | None, timeout: float) -> KeeperReport | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        sock.connect(KEEPER)
        if peer_user(sock) not in _believed():  # any program may take a name
            return None
        sock.sendall((b"" if request is None else msgspec.json.encode(request)) + b"\n")
        answer = b""
        while len(answer) < _MOST and (data := sock.recv(1 << 16)):
            answer += data
        return msgspec.json.decode(answer, type=KeeperReport)


def _believed() -> set[int]:
    """Root, our own user, and the keeper's where there is one: only root can have made that."""
    try:
        return {0, os.geteuid(), pwd.getpwnam(KEEPER_USER).pw_uid}
    except KeyError:
        return {0, os.geteuid()}


def peer_user(sock: "socket.socket | trio.socket.SocketType") -> int:
    """SO_PEERCRED (unix(7)): who the other side was when it connected or began to listen."""
    _, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(user)
