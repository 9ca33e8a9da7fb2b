"""The sidecar in the background, where no init system looks after it: started again when it dies, its output kept.

`meshnet up` starts this module as a process of its own; it ends when the sidecar ends in order. It never gives up: the
rules stay where they are, so without a sidecar nothing of the host works, and a mistake in meshnet.toml can be mended.
"""

import fcntl
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import FrameType
from typing import IO

from meshnet.errors import CommandError, ConfigError
from meshnet.model.admin import Accepted, Drain, GetStatus, Status
from meshnet.model.settings import Settings
from meshnet_cli.client import EXIT_UNREACHABLE, ask
from meshnet_cli.configuration import DEFAULT_CONFIG, read_settings
from meshnet_cli.main import EXIT_CONFIG

LOG_SIZE, LOG_FILES = 10_000_000, 3
LOCK = "supervise.lock"  # held by the supervisor, whose pid is in it
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 30.0  # seconds before a sidecar that died is started again
_LOOK_EVERY = 0.5  # seconds between looks at meshnet.toml meanwhile
_END_TIMEOUT = 10.0  # seconds beyond the drain
_STEADY = 60.0  # seconds alive after which the next death is the first again
_CANNOT_RUN = 127  # what a shell says of a program that is not there

_ENDED = "supervise: the sidecar ended with "


def log_file(settings: Settings) -> Path:
    return Path(settings.admin.socket).parent / "sidecar.log"


def running(settings: Settings) -> Status | None:
    """What the sidecar here says of itself; None if there is none. Raises CommandError for one that cannot be asked."""
    try:
        return ask(settings.admin.socket, GetStatus(), Status)
    except CommandError as error:
        if error.code != EXIT_UNREACHABLE:
            raise
        return None


def start(settings: Settings, config: str | None) -> None:
    """Starts it detached from this terminal. Raises CommandError if one already runs for this admin socket."""
    folder = Path(settings.admin.socket).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
    except OSError as error:
        raise CommandError(
            f"cannot write to {folder}, where the admin socket and the sidecar's log are to be",
            why=error.strerror or str(error),
            fix="name another folder: admin.socket in meshnet.toml",
        ) from error
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
    if not (folder / LOCK).exists():
        return False
    lock = _lock(folder)
    if lock is None:
        return True
    lock.close()
    return False


def try_again(settings: Settings) -> None:
    """Has the supervisor start a sidecar now that it would start after a pause."""
    _signal(_supervisor_pid(settings), signal.SIGUSR1)


class Output:
    """What the sidecars of one supervisor have said since this was made, and how they ended."""

    def __init__(self, settings: Settings) -> None:
        self._file = log_file(settings)
        self._start = self._file.stat().st_size if self._file.exists() else 0

    def exit_codes(self) -> list[int]:
        return [int(code) for code in re.findall(rf"^{_ENDED}(-?\d+)", self._text(), re.MULTILINE)]

    def last_words(self) -> list[str]:
        """What the last one that said anything said last: the lines of its error, or three."""
        lives: list[list[str]] = [[]]
        for line in self._text().splitlines():
            if not line.startswith("supervise: "):
                lives[-1].append(line)
            elif lives[-1]:
                lives.append([])
        life = next((life for life in reversed(lives) if life), [])
        errors = [at for at, line in enumerate(life) if line.startswith("error: ")]
        return life[errors[-1] :] if errors else life[-3:]

    def _text(self) -> str:
        try:
            data = self._file.read_bytes()
        except FileNotFoundError:
            return ""
        # A shorter file is a new one.
        return (data[self._start :] if len(data) >= self._start else data).decode("utf-8", "replace")


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
    pid = _supervisor_pid(settings)
    _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + _END_TIMEOUT
    while is_supervised(settings):
        if time.monotonic() > deadline:
            raise CommandError("the sidecar's supervisor did not end", why=f"it is process {pid}", fix=f"kill {pid}")
        time.sleep(0.05)  # noqa: TID251 - the end of a process that is not our child is polled; nothing tells us
    return True


def _supervisor_pid(settings: Settings) -> int:
    return int((Path(settings.admin.socket).parent / LOCK).read_text())


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has just ended


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
        self._config = Path(config or DEFAULT_CONFIG)
        handler = RotatingFileHandler(log_file(settings), maxBytes=LOG_SIZE, backupCount=LOG_FILES)
        handler.setFormatter(logging.Formatter("%(message)s"))
        self._log = logging.getLogger("sidecar")
        self._log.addHandler(handler)
        self._log.setLevel(logging.INFO)
        self._child: subprocess.Popen[bytes] | None = None
        self._ending = threading.Event()  # only a flag: a handler that interrupts a wait() for it would hang
        self._signalled, wake = socket.socketpair()
        self._signalled.setblocking(False)
        wake.setblocking(False)
        self._wake = wake

    def run(self) -> int:
        """Until the sidecar ends in order or a signal says so. Returns its last exit code."""
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        pause = _FIRST_PAUSE
        while True:
            read, started = _version(self._config), time.monotonic()
            code = self._run_once()
            if code == 0 or self._ending.is_set():
                return code
            if time.monotonic() - started > _STEADY:
                pause = _FIRST_PAUSE
            # A configuration that cannot work does not get better by being tried often.
            wait = _LONGEST_PAUSE if code == EXIT_CONFIG else pause
            self._log.error("%s%d; again in %.1f s", _ENDED, code, wait)
            if code == EXIT_CONFIG:
                self._log.error(
                    "supervise: sooner if %s changes. Until then captured connections are refused;"
                    " to let them go direct: sudo meshnet down",
                    self._config,
                )
            self._wait(wait, read)
            if self._ending.is_set():
                return code
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _run_once(self) -> int:
        try:
            self._child = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except OSError as error:
            self._log.error("cannot run %s: %s", self._command[0], error.strerror)
            return _CANNOT_RUN
        if self._ending.is_set():  # the signal came while there was nobody to pass it on to
            self._child.terminate()
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._log.info("%s", line.decode("utf-8", "backslashreplace").rstrip("\n"))
        return self._child.wait()

    def _wait(self, seconds: float, read: object) -> None:
        """Until the time is over, a signal comes, or meshnet.toml is no longer what it was when the sidecar read it."""
        try:
            self._signalled.recv(4096)  # those that came while the sidecar lived
        except BlockingIOError:
            pass
        deadline = time.monotonic() + seconds
        while not self._ending.is_set() and (left := deadline - time.monotonic()) > 0:
            if select.select([self._signalled], [], [], min(left, _LOOK_EVERY))[0] or _version(self._config) != read:
                return

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self._ending.set()
        if number != signal.SIGUSR1 and self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)


def _version(file: Path) -> object:
    """What is another after every change of the file, one of its rights or of a link to it included."""
    try:
        found = file.stat()
    except OSError as error:
        return error.errno
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


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
    config = sys.argv[1] if len(sys.argv) > 1 else None
    try:
        settings = read_settings(config)
    except ConfigError:
        return EXIT_CONFIG
    return Supervisor(settings, config).run()


if __name__ == "__main__":
    sys.exit(main())
