"""A download that goes on for as long as a test likes, and of which every byte counts."""

import hashlib
import random
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tests.world import wait_for

_BLOCK = 1 << 16


class Stream:
    """From `app` to `client`, both of which it closes. When the block is left, what arrived must be what was sent."""

    def __init__(self, client: socket.socket, app: socket.socket) -> None:
        self.received = 0
        self._client, self._app = client, app
        self._enough = threading.Event()
        self._sent, self._heard = hashlib.sha256(), hashlib.sha256()
        self._failures: list[OSError] = []
        self._threads = [threading.Thread(target=self._guarded, args=(part,)) for part in (self._send, self._hear)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.moves()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._enough.set()
        if error is not None:
            for sock in (self._client, self._app):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._client.close()
        self._app.close()
        if error is None:
            assert self._failures == []
            assert self._heard.digest() == self._sent.digest()

    def moves(self) -> None:
        """Returns when some more has come."""
        before = self.received
        wait_for(lambda: self.received > before or self._failures, what="that the stream goes on")

    def stands_still(self, seconds: float = 0.3) -> None:
        """Returns when nothing has come for so long."""
        seen, since = self.received, time.monotonic()

        def still() -> bool:
            nonlocal seen, since
            if self.received != seen:
                seen, since = self.received, time.monotonic()
            return time.monotonic() - since > seconds

        wait_for(still, what="that the stream stands still")

    def _guarded(self, part: Callable[[], None]) -> None:
        try:
            part()
        except OSError as error:
            self._failures.append(error)

    def _send(self) -> None:
        dice = random.Random(1)
        while not self._enough.is_set():
            block = dice.randbytes(_BLOCK)
            self._sent.update(block)
            self._app.sendall(block)
        self._app.shutdown(socket.SHUT_WR)

    def _hear(self) -> None:
        while piece := self._client.recv(_BLOCK):
            self._heard.update(piece)
            self.received += len(piece)
