"""The keeper of the rules beside a sidecar that a supervisor looks after: started again when it dies or hangs."""

import logging
import os
import subprocess
import threading
import time

from meshnet.decide.pauses import Pauses
from meshnet_cli.keep import keeper_command
from meshnet_cli.vm.units import START_TIMEOUT, WATCHDOG
from meshnet_cli.watchdog import Watchdog

# It ends with the supervisor, however that ends: rules that nobody can be told to leave alone are nobody's.
_TIED = ("setpriv", "--pdeathsig", "TERM", "--")
_END_TIMEOUT = 5.0  # seconds to end in order: one that is stopped hears no signal


class KeeperProcess:
    """Used by one thread; what it says goes to `log`."""

    def __init__(self, config: str | None, log: logging.Logger) -> None:
        self._command = [*_TIED, *keeper_command(config)]
        self._log = log
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._ending = threading.Event()

    def start(self) -> None:
        """Nothing if it has been started already."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends it, and returns when it has ended; the rules stay as they are."""
        self._ending.set()
        if self._process is not None:
            self._process.terminate()
        if self._thread is not None:
            self._thread.join(_END_TIMEOUT)
            if self._thread.is_alive() and self._process is not None:
                self._process.kill()
            self._thread.join()

    def _run(self) -> None:
        # The signal of --pdeathsig comes when the thread that has started a process ends: this one waits for it.
        pauses = Pauses()
        while not self._ending.is_set():
            started = time.monotonic()
            try:
                code = self._run_once()
            except OSError as error:
                self._log.error("cannot run %s: %s", self._command[0], error.strerror)
                return
            if not self._ending.is_set():
                pause = pauses.after(time.monotonic() - started)
                self._log.error("supervise: the keeper of the rules ended with %d; again in %.1f s", code, pause)
                self._ending.wait(pause)

    def _run_once(self) -> int:
        """Raises OSError where it cannot be started."""
        with Watchdog(START_TIMEOUT, WATCHDOG) as watchdog:
            self._process = subprocess.Popen(
                self._command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="backslashreplace",
                env=os.environ | watchdog.environment(),
            )
            guard = watchdog.guard(self._process.pid, self._say_that_it_hangs)
            if self._ending.is_set():
                self._process.terminate()
            assert self._process.stdout is not None
            for line in self._process.stdout:
                self._log.info("%s", line.rstrip("\n"))
            code = self._process.wait()
            guard.join()
        return code

    def _say_that_it_hangs(self) -> None:
        self._log.error("supervise: the keeper of the rules hangs: it is killed")
