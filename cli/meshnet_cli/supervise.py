"""The sidecar in the background, where no init system looks after it: started again when it dies, its output kept.

One that hangs is killed after the time that systemd would give it. So is the keeper of the rules (`keeper_process.py`).

`meshnet up` starts this module as a process of its own; it ends when the sidecar ends in order. It never gives up: the
rules stay where they are, so without a sidecar nothing of the host works, and a mistake in meshnet.toml can be mended.
"""

import grp
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

from meshnet.decide.pauses import Pauses
from meshnet.errors import CommandError, ConfigError
from meshnet.model.admin import GROUP, Accepted, Drain, GetStatus, Status
from meshnet.model.settings import Settings
from meshnet.net.files import make_folders
from meshnet.net.keeper import ask_keeper
from meshnet_cli import lock
from meshnet_cli.client import EXIT_UNREACHABLE, ask
from meshnet_cli.configuration import DEFAULT_CONFIG, read_settings
from meshnet_cli.keeper_process import KeeperProcess
from meshnet_cli.main import EXIT_CONFIG
from meshnet_cli.vm import account
from meshnet_cli.vm.units import START_TIMEOUT, WATCHDOG
from meshnet_cli.watchdog import Watchdog

LOG_SIZE, LOG_FILES = 10_000_000, 3
_LOOK_EVERY = 0.5  # seconds between looks at meshnet.toml meanwhile
_KEEPER_TIMEOUT = 15.0  # seconds until the keeper answers
_END_TIMEOUT = 10.0  # seconds beyond the drain
_LAST_WORDS = 0.5  # seconds; what a sidecar that has ended had printed is there, unless its workers live on
_CANNOT_RUN = 127  # what a shell says of a program that is not there

_ENDED = "supervise: the sidecar ended with "


def log_file(settings: Settings) -> Path:
    return lock.folder_of(settings.admin.socket) / "sidecar.log"


def running(settings: Settings) -> Status | None:
    """What the sidecar here says of itself; None if there is none. Raises CommandError for one that cannot be asked."""
    try:
        return ask(settings.admin.socket, GetStatus(), Status)
    except CommandError as error:
        if error.code != EXIT_UNREACHABLE:
            raise
        return None


def heard(settings: Settings) -> Status | None:
    """The same; None also for one that cannot be asked now."""
    try:
        return running(settings)
    except CommandError:
        return None


def start(settings: Settings, config: str | None) -> None:
    """Starts it detached from this terminal. Raises CommandError if one already runs for this admin socket."""
    folder, own = Path(settings.admin.socket).parent, lock.folder_of(settings.admin.socket)
    try:
        make_folders(folder)
        own.mkdir(mode=0o700, exist_ok=True)
        if account.user_id() is not None:
            account.give_folder(folder, settings.capture.gid)
        held = lock.take(own)
    except OSError as error:
        raise CommandError(
            f"cannot write to {folder}, where the admin socket and the sidecar's log are to be",
            why=error.strerror or str(error),
            fix="name another folder: admin.socket in meshnet.toml",
        ) from error
    if held is None:
        raise CommandError(
            "a sidecar is already being looked after here",
            why=f"{own}/{lock.NAME} is held",
            fix="meshnet status, or: sudo meshnet down",
        )
    with held:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "meshnet_cli.supervise", *([config] if config else [])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[held.fileno()],  # it holds the lock from its first moment to its last
            start_new_session=True,
        )
        held.truncate(0)
        held.write(b"%d\n" % supervisor.pid)


def is_supervised(settings: Settings) -> bool:
    """Whether somebody looks after a sidecar here."""
    return lock.is_held(lock.folder_of(settings.admin.socket))


def try_again(settings: Settings) -> None:
    """Has the supervisor start a sidecar now that it would start after a pause."""
    _signal_supervisor(settings, signal.SIGUSR1)


class Supervised:
    """A sidecar that is looked after by this module's own process, where no systemd is."""

    def __init__(self, settings: Settings, config: str | None) -> None:
        self._settings, self._config = settings, config

    def is_kept(self) -> bool:
        return is_supervised(self._settings)

    def start(self) -> None:
        start(self._settings, self._config)

    def try_again(self) -> None:
        try_again(self._settings)

    def keep_rules(self) -> None:
        """Has the supervisor look after a keeper of the rules, too, unless it does already. Raises CommandError."""
        if not _knows(lock.holder(lock.folder_of(self._settings.admin.socket)), signal.SIGUSR2):
            return  # an older version's: the signal would end it
        _signal_supervisor(self._settings, signal.SIGUSR2)
        deadline = time.monotonic() + _KEEPER_TIMEOUT
        while ask_keeper() is None:
            if time.monotonic() > deadline or not self.is_kept():
                raise CommandError(
                    "the keeper of the rules does not come up",
                    why=f"it has not answered within {_KEEPER_TIMEOUT:g} s",
                    fix=self.log(),
                )
            time.sleep(0.05)  # noqa: TID251 - another process's start is polled; nothing tells us

    def stop(self, drain: float) -> bool:
        return stop(self._settings, drain=drain)

    def output(self) -> "Output":
        return Output(self._settings)

    def log(self) -> str:
        return f"less {log_file(self._settings)}"


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
        stopped = _stop_supervisor(settings)
        _remove_what_is_left(settings)
        return stopped
    deadline = time.monotonic() + drain + _END_TIMEOUT
    while Path(settings.admin.socket).exists() or is_supervised(settings):
        if time.monotonic() > deadline:
            raise CommandError("the sidecar did not end", why="it still drains", fix="meshnet conns, meshnet status")
        time.sleep(0.05)  # noqa: TID251 - the end of a process that is not our child is polled; nothing tells us
    _remove_what_is_left(settings)
    return True


def cut(settings: Settings) -> bool:
    """Has the sidecar reset what is open, and end, while the rules still translate its packets. Whether there was one.

    What goes wrong does not keep the rules in: a `stop` afterwards says it.
    """
    try:
        return stop(settings, drain=0.0)
    except CommandError:
        return False


def _stop_supervisor(settings: Settings) -> bool:
    """Between two lives of a sidecar that does not stay up there is only its supervisor, about to start it again."""
    if not is_supervised(settings):
        return False
    pid = 0
    deadline = time.monotonic() + _END_TIMEOUT
    while is_supervised(settings):
        pid = pid or _signal_supervisor(
            settings, signal.SIGTERM
        )  # one that has just been started writes its number soon
        if time.monotonic() > deadline:
            raise CommandError("the sidecar's supervisor did not end", why=f"it is process {pid}", fix=f"kill {pid}")
        time.sleep(0.05)  # noqa: TID251 - the end of a process that is not our child is polled; nothing tells us
    return True


def _signal_supervisor(settings: Settings, number: signal.Signals) -> int:
    """Its process id; 0 if it is just about to end."""
    pid = lock.holder(lock.folder_of(settings.admin.socket))
    if pid:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # it has just ended
    return pid


def _knows(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for that signal: proc(5), SigCgt."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def _remove_what_is_left(settings: Settings) -> None:
    """Of those that were killed: a socket at which nobody listens. And the lock, which nobody holds any more."""
    path, own = Path(settings.admin.socket), lock.folder_of(settings.admin.socket)
    if not (path.is_socket() or (own / lock.NAME).exists()):
        return
    try:
        own.mkdir(mode=0o700, exist_ok=True)
        held = lock.take(own)
        if held is None:  # another sidecar is being started
            return
        with held:
            if path.is_socket() and _is_dead(path):
                path.unlink()
            (own / lock.NAME).unlink()
    except OSError:
        pass  # it is in nobody's way: a new sidecar takes both over


def remove_output(settings: Settings) -> None:
    """The logs of sidecars that have ended, and their folder if nothing else is in it."""
    log = log_file(settings)
    for file in (log, *(log.with_name(f"{log.name}.{number}") for number in range(1, LOG_FILES + 1))):
        file.unlink(missing_ok=True)
    try:
        log.parent.rmdir()
        log.parent.parent.rmdir()
    except OSError:
        pass  # others use it


def _is_dead(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
    return False


def sidecar_command(settings: Settings, config: str | None) -> list[str]:
    """The sidecar as its user, with the proxy's group, which the rules let pass, and no right but NET_ADMIN (SO_MARK).

    In the group that may look at it, too, where there is one: a process without rights gives files to its own groups.
    """
    command = [sys.executable, "-m", "meshnet_cli.main", "proxy", *(["--config", config] if config else [])]
    from meshnet_init.host import host_facts

    mapped = host_facts().gids
    try:
        looking = grp.getgrnam(GROUP).gr_gid
        groups = f"--groups={looking}" if any(looking in gids for gids in mapped) else "--clear-groups"
    except KeyError:
        groups = "--clear-groups"
    group = [f"--regid={settings.capture.gid}", groups]
    if not any(settings.capture.gid in gids for gids in mapped):
        group = []  # a user namespace without that group: the mark alone keeps us out
    user = account.user_id()
    kept = "-all" if user is None else "-all,+net_admin"  # a user that is not root keeps what is ambient
    rights = [f"--inh-caps={kept}", f"--ambient-caps={kept}", "--bounding-set=-all,+net_admin"]
    who = [] if user is None else [f"--reuid={user}"]
    return ["setpriv", *who, *group, "--no-new-privs", *rights, "--", *command]


class Supervisor:
    def __init__(self, settings: Settings, config: str | None) -> None:
        self._command = sidecar_command(settings, config)
        self._config = Path(config or DEFAULT_CONFIG)
        self._umask = os.umask(0o077)  # who connects to whom is told to those who may ask; the sidecar has its own
        handler = RotatingFileHandler(log_file(settings), maxBytes=LOG_SIZE, backupCount=LOG_FILES)
        log_file(settings).chmod(0o600)
        handler.setFormatter(logging.Formatter("%(message)s"))
        self._log = logging.getLogger("sidecar")
        self._log.addHandler(handler)
        self._log.setLevel(logging.INFO)
        self._child: subprocess.Popen[bytes] | None = None
        self._keeper = KeeperProcess(config, self._log)
        self._ending = threading.Event()  # only a flag: a handler that interrupts a wait() for it would hang
        self._signalled, wake = socket.socketpair()
        self._signalled.setblocking(False)
        wake.setblocking(False)
        self._wake = wake

    def run(self) -> int:
        """Until the sidecar ends in order or a signal says so. Returns its last exit code."""
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._on_signal)
        try:
            return self._run()
        finally:
            self._keeper.stop()

    def _run(self) -> int:
        pauses = Pauses()
        while True:
            read, started = _version(self._config), time.monotonic()
            code = self._run_once()
            if code == 0 or self._ending.is_set():
                return code
            pause = pauses.after(time.monotonic() - started)
            # A configuration that cannot work does not get better by being tried often.
            wait = Pauses.LONGEST if code == EXIT_CONFIG else pause
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

    def _run_once(self) -> int:
        with Watchdog(START_TIMEOUT, WATCHDOG) as watchdog:
            try:
                self._child = subprocess.Popen(
                    self._command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    umask=self._umask,
                    env=os.environ | watchdog.environment(),
                )
            except OSError as error:
                self._log.error("cannot run %s: %s", self._command[0], error.strerror)
                return _CANNOT_RUN
            guard = watchdog.guard(self._child.pid, self._say_that_it_hangs)
            if self._ending.is_set():  # the signal came while there was nobody to pass it on to
                self._child.terminate()
            assert self._child.stdout is not None
            keeper = threading.Thread(target=self._keep, args=(self._child.stdout,), daemon=True)
            keeper.start()
            code = self._child.wait()
            guard.join()
        # The workers of one that was killed have its output as long as they drain; nobody waits for that.
        keeper.join(_LAST_WORDS)
        return code

    def _say_that_it_hangs(self) -> None:
        self._log.error("supervise: the sidecar hangs, or its loop stands still: it is killed")

    def _keep(self, output: IO[bytes]) -> None:
        with output:
            for line in output:
                self._log.info("%s", line.decode("utf-8", "backslashreplace").rstrip("\n"))

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
        if number == signal.SIGUSR2:
            self._keeper.start()
        elif number != signal.SIGUSR1 and self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)


def _version(file: Path) -> object:
    """What is another after every change of the file, one of its rights or of a link to it included."""
    try:
        found = file.stat()
    except OSError as error:
        return error.errno
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def main() -> int:
    config = sys.argv[1] if len(sys.argv) > 1 else None
    try:
        settings = read_settings(config)
    except ConfigError:
        return EXIT_CONFIG
    lock.own(lock.folder_of(settings.admin.socket))
    code = Supervisor(settings, config).run()
    lock.disown(lock.folder_of(settings.admin.socket))
    return code


if __name__ == "__main__":
    sys.exit(main())
