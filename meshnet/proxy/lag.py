"""How late trio's loop is, and where it stood when it was very late."""

import logging
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable

import trio

_log = logging.getLogger("meshnet.proxy")

_STALL = 0.25  # seconds without an end of a turn of the loop, from which on it is told where it stood
_SELDOM = 2.0  # seconds between looks at a loop that has nothing to do


class LoopLag(trio.abc.Instrument):
    """`note` is called with each lag, in seconds.

    The lag of a turn of the loop is how long it took, as whoever became ready meanwhile had to wait for its end, or how
    late it began, where it was due at a time. That is known without waking anybody: a byte has to wait for whoever
    wakes only to look at a clock.

    A thread of its own looks for a turn that does not end: what stalls the loop does not stall the thread. A stall is
    logged when it is seen, with the stack of the loop's thread, for it may never end; and with its length when it is
    over.
    """

    def __init__(self, stall: float = _STALL, *, note: Callable[[float], None] = lambda late: None) -> None:
        self._stall = stall
        self._note = note
        self._turn = 0
        self._began: float | None = None  # None: it waits
        self._waits_since = time.monotonic()
        self._told: int | None = None  # the turn whose stall was
        self._over = threading.Event()

    async def run(self) -> None:
        """Runs until cancelled."""
        threading.Thread(target=self._watch, args=(threading.get_ident(),), name="watchdog", daemon=True).start()
        trio.lowlevel.add_instrument(self)
        try:
            await trio.sleep_forever()
        finally:
            trio.lowlevel.remove_instrument(self)
            self._over.set()

    def before_io_wait(self, timeout: float) -> None:
        now = time.monotonic()
        if self._began is not None:
            self._lasted(now - self._began)
        self._began = None
        self._waits_since = now

    def after_io_wait(self, timeout: float) -> None:
        now = time.monotonic()
        if timeout and (late := now - self._waits_since - timeout) > 0:
            self._lasted(late)
        self._turn += 1
        self._began = now

    def _lasted(self, seconds: float) -> None:
        self._note(seconds)
        if seconds >= self._stall:
            unseen = "" if self._told == self._turn else _UNSEEN
            _log.warning("the event loop stood still for %.2f s%s", seconds, unseen)

    def _watch(self, loop: int) -> None:
        """In the thread. `loop` is the ident of the loop's."""
        seen, every = -1, self._stall
        while not self._over.wait(every):
            turn, began = self._turn, self._began
            every = self._stall if turn != seen else min(2 * every, max(self._stall, _SELDOM))
            seen = turn
            late = time.monotonic() - (math.inf if began is None else began)
            if late < self._stall:
                continue
            every = self._stall
            stack = "".join(traceback.format_stack(sys._current_frames().get(loop))).rstrip()
            if turn == self._turn != self._told:  # or it is not of the stall
                self._told = turn
                _log.warning("the event loop has been standing still for %.2f s\n%s", late, stack)


_UNSEEN = "\n  (where is not known: it was over too soon, Python's lock was held all the time, or nothing ran)"
