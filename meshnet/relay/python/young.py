"""Where links begin: a loop in trio's own thread, so that a short connection costs no switch of threads.

A link that lives on moves to a relay thread: one wake-up of trio for each of its messages would be dear. Most
connections of a busy client are a request and its answer, and are over before that.
"""

import time
from collections.abc import Callable

import outcome
import trio

from meshnet.relay.python.loop import LOOKS_PER_SILENCE, RelayLoop
from meshnet.relay.python.pair import Pair
from meshnet.relay.python.side import Side
from meshnet.relay.python.thread import RelayThread

YOUNG_EVENTS = 16  # a request, its answer and both ends are four to eight


class YoungLoop(RelayLoop):
    """All of it belongs to the trio thread. `choose_thread` says where a link goes after `most` events."""

    def __init__(self, choose_thread: Callable[[], RelayThread], most: int, silence: float) -> None:
        super().__init__(wake_tasks, most_pipes=0, silence=silence)  # a link in bulk does not stay
        self._choose_thread = choose_thread
        self._most = most
        self._leaving: set[Pair] = set()

    async def run(self) -> None:
        """Until `close`."""
        try:
            while True:
                await trio.lowlevel.wait_readable(self.epoll.fileno())
                self.round(0)
                self._send_on()
        except (trio.ClosedResourceError, ValueError):
            if not self.epoll.closed:
                raise

    async def look_forever(self) -> None:
        """Until a while after `close`."""
        while not self.epoll.closed:
            self.round(0)
            self._send_on()
            await trio.sleep(self.silence / LOOKS_PER_SILENCE)

    def close(self) -> None:
        trio.lowlevel.notify_closing(self.epoll.fileno())
        super().close()

    def begin(self, pair: Pair) -> bool:
        """Whether it goes on after what was to be done at once."""
        self.now = time.monotonic()
        self.attempt(pair, pair.begin)
        if self.unread:
            self.read_unread()
        if not self._most:
            self._leaving.add(pair)
        if pair.over:
            self.ended.remove(pair)
            return False
        self._send_on()
        return True

    def cancel(self, pair: Pair) -> None:
        """Wherever it is by now; a thread waits for its tunnel's peer."""
        if pair.loop is self:
            if pair.over:
                return  # its task has been told already, though it may not have run yet
            pair.leave(self._choose_thread())
            self._post(pair, pair.arrive)
        self._post(pair, pair.cancel)

    def linger(self, pair: Pair) -> None:
        self._leaving.add(pair)  # a thread waits for it; trio would have to set an alarm

    def dispatch(self, side: Side, mask: int) -> None:
        side.on_event(mask)
        pair = side.pair
        pair.events += 1
        if pair.events >= self._most:
            self._leaving.add(pair)

    def _send_on(self) -> None:
        """Moves links to relay threads: here, where no step of theirs is half done."""
        self._leaving.update(side.pair for side in self.unread)  # there is more of it than one read
        while self._leaving:
            pair = self._leaving.pop()
            if not pair.over:
                pair.leave(self._choose_thread())
                self._post(pair, pair.arrive)

    @staticmethod
    def _post(pair: Pair, command: Callable[[], None]) -> None:
        thread = pair.loop
        assert isinstance(thread, RelayThread)
        thread.post(pair, command)


def wake_tasks(pairs: list[Pair]) -> None:
    """Tells the tasks that wait in PythonRelay.run; in trio's thread."""
    for pair in pairs:
        if pair.cancelled and pair.raise_cancel is not None:
            trio.lowlevel.reschedule(pair.task, outcome.capture(pair.raise_cancel))
        else:
            trio.lowlevel.reschedule(pair.task, outcome.Value(pair.link.outcome))
