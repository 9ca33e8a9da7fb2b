"""Whether a program still says that it lives, heard as systemd does: sd_notify(3), WatchdogSec=, TimeoutStartSec=.

What a word says is not looked at, nor who says it: any program may speak to the name, and shall at worst make us more
patient.
"""

import os
import select
import signal
import socket
import threading
from collections.abc import Callable
from time import monotonic
from typing import Self

_LOOKS = 6  # in the shortest time that it may be silent


class Patience:
    """How long there may be silence: `first` seconds until the first word, then `later` between two. Pure."""

    def __init__(self, first: float, later: float, now: float) -> None:
        self.step = min(first, later) / _LOOKS
        """In seconds; `is_over` wants to be asked so often."""
        self._most, self._later = first, later
        self._since = self._looked = now

    def heard(self, now: float) -> None:
        self._most, self._since = self._later, now

    def is_over(self, now: float) -> bool:
        if now - self._looked > 2 * self.step:  # we stood still ourselves, as on a machine that was paused: it may have
            self._since = now
        self._looked = now
        return now - self._since > self._most


class Watchdog:
    """A context manager for one life of a program. `first` and `later` as in Patience."""

    def __init__(self, first: float, later: float) -> None:
        self._first, self._later = first, later
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._sock.bind("")  # unix(7), autobind: a name in this network namespace, no file

    def environment(self) -> dict[str, str]:
        """What tells the program whom to speak to."""
        name = self._sock.getsockname().decode().replace("\0", "@")
        return {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": str(round(self._later * 1e6))}

    def is_silent(self, process: int) -> bool:
        """Waits until it is, or the process behind that pidfd has ended."""
        patience = Patience(self._first, self._later, monotonic())
        while not patience.is_over(monotonic()):
            ready, _, _ = select.select([self._sock.fileno(), process], [], [], patience.step)
            if process in ready:
                return False
            if ready:
                self._sock.recv(4096)  # descriptors that come with it are closed by the kernel
                patience.heard(monotonic())
        return True

    def guard(self, pid: int, hangs: Callable[[], object]) -> threading.Thread:
        """Kills that child if it hangs, after a call of `hangs`. The thread ends with the child: join it then."""
        thread = threading.Thread(target=self._guard, args=(os.pidfd_open(pid), hangs), name="watchdog", daemon=True)
        thread.start()
        return thread

    def _guard(self, process: int, hangs: Callable[[], object]) -> None:
        try:
            if self.is_silent(process):
                hangs()
                signal.pidfd_send_signal(process, signal.SIGKILL)  # nothing less ends one that is stopped
        except ProcessLookupError:
            pass  # it has just ended
        finally:
            os.close(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._sock.close()
