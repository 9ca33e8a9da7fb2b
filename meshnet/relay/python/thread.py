"""A relay thread: a loop of its own, and commands from trio."""

import os
import select
import threading
from collections import deque
from collections.abc import Callable

from meshnet.relay.python.loop import RelayLoop
from meshnet.relay.python.pair import Pair


class RelayThread(RelayLoop):
    """`start`, `post`, `stop` and `join` are for other threads; all else belongs to the thread itself."""

    def __init__(self, name: str, ended: Callable[[list[Pair]], None], silence: float) -> None:
        super().__init__(ended, silence=silence)
        self._commands: deque[tuple[Pair, Callable[[], None]]] = deque()
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.epoll.register(self._wake, select.EPOLLIN)
        # A daemon: a proxy that ends without `stop`, for want of memory, must not wait for this thread for ever.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, pair: Pair, command: Callable[[], None]) -> None:
        self._commands.append((pair, command))
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        self._stopping = True
        os.eventfd_write(self._wake, 1)

    def join(self) -> None:
        self._thread.join()
        os.close(self._wake)

    def on_wake(self, fd: int) -> None:
        if fd == self._wake:
            os.eventfd_read(fd)

    def _run(self) -> None:
        while not self._stopping:
            self.round(self.timeout())
            self._obey()
        self._obey()
        self.close()

    def _obey(self) -> None:
        while self._commands:
            pair, command = self._commands.popleft()
            self.attempt(pair, command)
        if self.ended:
            self.report()
