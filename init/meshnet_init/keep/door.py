"""Where the keeper answers: anybody may ask how it is, root and its own user may tell it to stand down.

The name is of the network namespace, as the rules are: there is one keeper for them, whatever folders programs have.
"""

import errno
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable

import msgspec

from meshnet.errors import CommandError
from meshnet.model.capture import KEEPER, KeeperReport, KeeperRequest
from meshnet.net.keeper import peer_user

_log = logging.getLogger("meshnet.keeper")

_PATIENCE = 1.0  # seconds for a question; they are answered one after the other
_OBEYED = 30.0  # seconds until the keeper has done what it was told: it may be amid a look
_MOST = 4096


class Door:
    """A context manager. `wake` is called when there is a request to `take`. Raises CommandError if another has it."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.report: KeeperReport | None = None
        self._wake = wake
        self._request: KeeperRequest | None = None
        self._done = threading.Event()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._sock.bind(KEEPER)
        except OSError as error:
            self._sock.close()
            if error.errno != errno.EADDRINUSE:
                raise
            raise CommandError(
                "another keeper looks after the rules of this network namespace",
                why=f"{_holder() or 'somebody'} has the name {KEEPER[1:]}",
                fix="meshnet status; ss -xlp | grep meshnet/keeper",
            ) from error
        self._sock.listen(16)
        self._thread = threading.Thread(target=self._serve, name="door", daemon=True)

    def take(self) -> KeeperRequest | None:
        """The request that waits; say `done` when it has been met."""
        request, self._request = self._request, None
        return request

    def done(self) -> None:
        self._done.set()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._sock.accept()
            except OSError:
                return  # closed
            with client:
                client.settimeout(_PATIENCE)
                try:
                    self._answer(client)
                except OSError:
                    pass  # it did not ask, or did not wait
                except msgspec.DecodeError as error:
                    _log.warning("not a request to a keeper: %s", error)

    def _answer(self, client: socket.socket) -> None:
        text = b""
        while not text.endswith(b"\n") and len(text) < _MOST:
            data = client.recv(_MOST)
            if not data:
                return
            text += data
        if text.strip():
            request = msgspec.json.decode(text, type=KeeperRequest)
            if peer_user(client) not in (0, os.geteuid()):
                return
            self._done.clear()
            self._request = request
            self._wake()
            if not self._done.wait(_OBEYED):
                self._request = None  # whoever asked is told that it was not done
        if self.report is not None:
            client.sendall(msgspec.json.encode(self.report) + b"\n")

    def __enter__(self) -> "Door":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        # A close alone does not end an accept that waits.
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._thread.join(timeout=2.0)


def _holder() -> str:
    """Who has the name, as far as the kernel tells."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PATIENCE)
        try:
            probe.connect(KEEPER)
        except OSError:
            return ""
        pid, uid, _ = struct.unpack("iII", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return f"process {pid} of user {uid}"
