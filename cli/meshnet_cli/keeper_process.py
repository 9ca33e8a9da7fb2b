"""The keeper of the rules beside a sidecar that a supervisor looks after: started again when it dies."""

import logging
import subprocess
import threading
import time

from meshnet.decide.pauses import Pauses
from meshnet_cli.keep import keeper_command

# It ends with the supervisor, however that ends: rules that nobody can be told to leave alone are nobody's.
_TIED = ("setpriv", "--pdeathsig", "TERM", "--")


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
            self._thread.join()

    def _run(self) -> None:
        # The signal of --pdeathsig comes when the thread that has started a process ends: this one waits for it.
        pauses = Pauses()
        while not self._ending.is_set():
            started = time.monotonic()
            try:
                self._process = subprocess.Popen(
                    self._command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="backslashreplace",
                )
            except OSError as error:
                self._log.error("cannot run %s: %s", self._command[0], error.strerror)
                return
            if self._ending.is_set():
                self._process.terminate()
            assert self._process.stdout is not None
            for line in self._process.stdout:
                self._log.info("%s", line.rstrip("\n"))
            code = self._process.wait()
            if not self._ending.is_set():
                pause = pauses.after(time.monotonic() - started)
                self._log.error("supervise: the keeper of the rules ended with %d; again in %.1f s", code, pause)
                self._ending.wait(pause)
