"""The loop that every link's sides live in: waits for sockets, lets their sides act, reports what has ended.

It runs in a relay thread (thread.py), or, for links that have just begun, in trio's own (young.py).
"""

import logging
import select
import time
from collections import deque
from collections.abc import Callable

from meshnet.codec.frames import HEADER_SIZE, MAX_DATA
from meshnet.relay import SILENCE
from meshnet.relay.python.pair import Pair
from meshnet.relay.python.side import Side
from meshnet.relay.python.splice import MAX_PIPES, Pipes

log = logging.getLogger("meshnet.relay")

LINGER = 1.0  # seconds a lease may still wait for the end the tunnel's peer owes
EVENTS_PER_ROUND = 64
LOOKS_PER_SILENCE = 6


class RelayLoop:
    """Belongs to one thread at a time.

    `payload` is where sockets are read into, shared by all of them. `frame` begins one tunnel header before it, so
    that a frame is made without moving the bytes.
    """

    def __init__(
        self, ended: Callable[[list[Pair]], None], *, most_pipes: int = MAX_PIPES, silence: float = SILENCE
    ) -> None:
        self.pairs: set[Pair] = set()
        self.sides: dict[int, Side] = {}
        self.unread: list[Side] = []  # sides with bytes that epoll does not see
        self.ended: list[Pair] = []
        self.epoll = select.epoll()
        self.pipes = Pipes(most_pipes)
        self.frame = memoryview(bytearray(HEADER_SIZE + 4 * MAX_DATA))
        self.payload = self.frame[HEADER_SIZE:]
        self.now = time.monotonic()
        self.silence = silence
        self._look_due = self.now
        self._tell_ended = ended
        self._lingering: deque[tuple[float, Pair]] = deque()

    def linger(self, pair: Pair) -> None:
        """Cuts `pair` after LINGER seconds."""
        self._lingering.append((self.now + LINGER, pair))

    def round(self, timeout: float | None) -> None:
        """Waits at most `timeout` seconds (None: for ever) for something to happen, and deals with it."""
        sides = self.sides
        events = self.epoll.poll(timeout, EVENTS_PER_ROUND)
        self.now = time.monotonic()
        for fd, mask in events:
            side = sides.get(fd)
            if side is None:  # not a leg, or a leg that an earlier event of this round has closed
                self.on_wake(fd)
                continue
            try:
                self.dispatch(side, mask)
            except Exception:
                self.crash(side.pair)
        if self.unread:
            self.read_unread()
        if self._lingering:
            self._expire()
        if self.pairs and self.now >= self._look_due:
            self.look()
        if self.ended:
            self.report()

    def look(self) -> None:
        """For peers that are gone: nothing else tells of those for which bytes wait."""
        self._look_due = self.now + self.silence / LOOKS_PER_SILENCE
        for pair in list(self.pairs):
            if not pair.over:
                self.attempt(pair, pair.look)

    def dispatch(self, side: Side, mask: int) -> None:
        side.on_event(mask)

    def on_wake(self, fd: int) -> None:
        """Something is ready that is no leg."""

    def timeout(self) -> float | None:
        if self.unread:
            return 0
        due = [self._lingering[0][0]] if self._lingering else []
        if self.pairs:
            due.append(self._look_due)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def read_unread(self) -> None:
        unread, self.unread = self.unread, []
        for side in unread:
            if side.reading and not side.pair.over:
                self.attempt(side.pair, side.pull)

    def attempt(self, pair: Pair, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception:
            self.crash(pair)

    def crash(self, pair: Pair) -> None:
        """One link's bug must not take the others along, nor go unseen."""
        log.exception("relay: a link failed for a reason of our own")
        pair.crash()

    def report(self) -> None:
        ended, self.ended = self.ended, []
        self._tell_ended(ended)

    def close(self) -> None:
        """Cuts every link."""
        for pair in list(self.pairs):
            self.attempt(pair, pair.cut)
        self.report()
        self.pipes.close()
        self.epoll.close()

    def _expire(self) -> None:
        while self._lingering and (self._lingering[0][0] <= self.now or self._lingering[0][1].over):
            _, pair = self._lingering.popleft()
            self.attempt(pair, pair.cut)
