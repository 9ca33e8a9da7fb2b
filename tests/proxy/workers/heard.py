"""What a sidecar tells those who follow it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from meshnet.model.admin import ConnectionEvent, FollowConnections
from meshnet_cli.client import stream
from tests.proxy.conftest import API, Hosts
from tests.proxy.programs import is_reset


class Heard:
    """The events of a sidecar, heard by a thread."""

    def __init__(self, events: Iterator[ConnectionEvent]) -> None:
        self._kinds: dict[str, set[str]] = {}
        self._events = events
        self._done = threading.Event()
        self.thread = threading.Thread(target=self._listen)
        self.thread.start()

    def ids(self, kind: str) -> set[str]:
        return set(self._kinds.get(kind, ()))

    def stop_after_the_next(self) -> None:
        self._done.set()

    def _listen(self) -> None:
        for event in self._events:
            if event.connection is not None:
                self._kinds.setdefault(event.event, set()).add(event.connection.id)
            if self._done.is_set():
                return


@contextmanager
def following(hosts: Hosts) -> Iterator[Heard]:
    path = hosts.sidecar(hosts.web).settings.admin.socket
    heard = Heard(stream(path, FollowConnections(), ConnectionEvent))
    yield heard
    heard.stop_after_the_next()
    assert is_reset(hosts.web, API, 8080)
    heard.thread.join(10)
    assert not heard.thread.is_alive()
