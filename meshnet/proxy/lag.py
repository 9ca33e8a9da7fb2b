"""How late trio's loop is, and where it stood when it was very late."""

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable

import trio

_log = logging.getLogger("meshnet.proxy")

_STALL = 0.25  # seconds without a turn of the loop, from which on it is told where it stood


class LoopLag:
    """`last` is by how many seconds the loop was late lately, and `note` is called with each such figure.

    The loop beats, and a thread of its own looks at that: what stalls the loop does not stall the thread. A stall is
    logged when it becomes one, with the stack of the loop's thread, for it may never end; and with its length when it
    is over.
    """

    def __init__(self, stall: float = _STALL, *, note: Callable[[float], None] = lambda late: None) -> None:
        self._stall = stall
        self._note = note
        self._beat = (0.0, 0.0)  # when, and how late
        self._over = threading.Event()

    @property
    def last(self) -> float:
        return self._beat[1]

    async def run(self) -> None:
        """Runs until cancelled."""
        every = self._stall / 2
        self._beat = (time.monotonic(), 0.0)
        threading.Thread(target=self._watch, args=(threading.get_ident(), every), name="watchdog", daemon=True).start()
        try:
            while True:
                due = trio.current_time() + every
                await trio.sleep_until(due)
                self._beat = (time.monotonic(), max(0.0, trio.current_time() - due))
                self._note(self._beat[1])
        finally:
            self._over.set()

    def _watch(self, loop: int, every: float) -> None:
        """In the thread. `loop` is the ident of the loop's."""
        seen, is_told = self._beat, False
        while not self._over.wait(every):  # seldom: each look is a wake-up, and may delay a byte
            beat = self._beat
            if beat is not seen:
                if is_told or beat[1] >= self._stall:
                    _log.warning("the event loop stood still for %.2f s%s", beat[1], "" if is_told else _UNSEEN)
                seen, is_told = beat, False
            elif not is_told and (late := time.monotonic() - beat[0] - every) >= self._stall:
                stack = "".join(traceback.format_stack(sys._current_frames().get(loop))).rstrip()
                if beat is self._beat:  # or it is not of the stall
                    _log.warning("the event loop has been standing still for %.2f s\n%s", late, stack)
                    is_told = True


_UNSEEN = "\n  (where is not known: Python's lock was held all the time, or the process did not run)"
