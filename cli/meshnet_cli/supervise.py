"""The sidecar in the background, where no init system looks after it: started again when it dies, its output kept.

`meshnet up` starts this module as a process of its own; it ends when the sidecar ends in order.
"""

import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import FrameType
from typing import IO

from meshnet.errors import CommandError, ConfigError
from meshnet.model.admin import Accepted, Drain
from meshnet.model.settings import Settings
from meshnet_cli.client import EXIT_UNREACHABLE, ask
from meshnet_cli.main import EXIT_CONFIG

LOG_SIZE, LOG_FILES = 10_000_000, 3
LOCK = "supervise.lock"  # held by the supervisor, whose pid is in it
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 30.0  # seconds before a sidecar that died is started again
_END_TIMEOUT = 10.0  # seconds beyond the drain
_STEADY = 60.0  # seconds alive after which the next death is the first again


def log_file(settings: Settings) -> Path:
    return Path(settings.admin.socket).parent / "sidecar.log"


def start(settings: Settings, config: str | None) -> None:
    """Starts it detached from this terminal. Raises CommandError if one already runs for this admin socket."""
    folder = Path(settings.admin.socket).parent
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    if lock is None:
        raise CommandError(
            "a sidecar is already being looked after here",
            why=f"{folder}/{LOCK} is held",
            fix="meshnet status, or: sudo meshnet down",
        )
    with lock:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "meshnet_cli.supervise", *([config] if config else [])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[lock.fileno()],  # it holds the lock from its first moment to its last
            start_new_session=True,
        )
        lock.truncate(0)
        lock.write(b"%d\n" % supervisor.pid)


def is_supervised(settings: Settings) -> bool:
    """Whether somebody looks after a sidecar here."""
    folder = Path(settings.admin.socket).parent
    if not folder.is_dir():
        return False
    lock = _lock(folder)
    if lock is None:
        return True
    lock.close()
    return False


def stop(settings: Settings, *, drain: float) -> bool:
    """Asks the sidecar to drain and end, and waits for it. Whether there was one. Raises CommandError if it stays."""
    try:
        ask(settings.admin.socket, Drain(timeout=drain), Accepted)
    except CommandError as error:
        if error.code != EXIT_UNREACHABLE:
            raise
        return _stop_supervisor(settings)
    deadline = time.monotonic() + drain + _END_TIMEOUT
    while Path(settings.admin.socket).exists() or is_supervised(settings):
        if time.monotonic() > deadline:
            raise CommandError("the sidecar did not end", why="it still drains", fix="meshnet conns, meshnet status")
        time.sleep(0.05)  # noqa: TID251 - the end of a process that is not our child is polled; nothing tells us
    return True


def _stop_supervisor(settings: Settings) -> bool:
    """Between two lives of a sidecar that does not stay up there is only its supervisor, about to start it again."""
    if not is_supervised(settings):
        return False
    pid = int((Path(settings.admin.socket).parent / LOCK).read_text())
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        pass  # it has just ended
    deadline = time.monotonic() + _END_TIMEOUT
    while is_supervised(settings):
        if time.monotonic() > deadline:
            raise CommandError("the sidecar's supervisor did not end", why=f"it is process {pid}", fix=f"kill {pid}")
        time.sleep(0.05)  # noqa: TID251 - the end of a process that is not our child is polled; nothing tells us
    return True


def sidecar_command(settings: Settings, config: str | None) -> list[str]:
    """The sidecar with the proxy's group, which the rules let pass, and no right but NET_ADMIN (for SO_MARK)."""
    command = [sys.executable, "-m", "meshnet_cli.main", "proxy", *(["--config", config] if config else [])]
    from meshnet_init.host import host_facts

    group = [f"--regid={settings.capture.gid}", "--clear-groups"]
    if not any(settings.capture.gid in gids for gids in host_facts().gids):
        group = []  # a user namespace without that group: the mark alone keeps us out
    limits = ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all,+net_admin"]
    return ["setpriv", *group, *limits, "--", *command]


class Supervisor:
    def __init__(self, settings: Settings, config: str | None) -> None:
        self._command = sidecar_command(settings, config)
        handler = RotatingFileHandler(log_file(settings), maxBytes=LOG_SIZE, backupCount=LOG_FILES)
        handler.setFormatter(logging.Formatter("%(message)s"))
        self._log = logging.getLogger("sidecar")
        self._log.addHandler(handler)
        self._log.setLevel(logging.INFO)
        self._child: subprocess.Popen[bytes] | None = None
        self._ending = threading.Event()

    def run(self) -> int:
        """Until the sidecar ends in order, has a config that cannot work, or a signal says so."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._pass_on)
        pause = _FIRST_PAUSE
        while True:
            started = time.monotonic()
            code = self._run_once()
            if code in (0, EXIT_CONFIG) or self._ending.is_set():
                return code
            if time.monotonic() - started > _STEADY:
                pause = _FIRST_PAUSE
            self._log.error("supervise: the sidecar ended with %d; again in %.1f s", code, pause)
            if self._ending.wait(pause):
                return code
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _run_once(self) -> int:
        self._child = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if self._ending.is_set():  # the signal came while there was nobody to pass it on to
            self._child.terminate()
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._log.info("%s", line.decode("utf-8", "backslashreplace").rstrip("\n"))
        return self._child.wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGHUP:
            self._ending.set()
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)


def _lock(folder: Path) -> IO[bytes] | None:
    """The lock of one supervisor per folder, or None if another holds it. It is held until the last copy is closed."""
    file = (folder / LOCK).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def main() -> int:
    from meshnet_cli.configuration import read_settings

    config = sys.argv[1] if len(sys.argv) > 1 else None
    try:
        settings = read_settings(config)
    except ConfigError:
        return EXIT_CONFIG
    return Supervisor(settings, config).run()


if __name__ == "__main__":
    sys.exit(main())
