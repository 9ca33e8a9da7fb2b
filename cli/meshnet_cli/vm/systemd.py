"""The sidecar as a service of systemd's, by way of systemctl."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from meshnet.errors import CommandError
from meshnet.model.admin import Accepted, Drain, GetStatus, Status
from meshnet.model.duration import parse_duration
from meshnet.model.settings import Settings
from meshnet.net.files import write_files
from meshnet_cli.client import ask
from meshnet_cli.configuration import DEFAULT_CONFIG, read_text
from meshnet_cli.vm.account import make_keeper
from meshnet_cli.vm.ledger import Ledger
from meshnet_cli.vm.units import RULES, SIDECAR, rules_unit, sidecar_unit

UNITS = Path("/etc/systemd/system")
_RUNTIME = Path("/run/systemd/system")
_UP = ("active", "activating", "reloading", "deactivating")
MESHNET = (sys.executable, "-m", "meshnet_cli.main")


def is_here() -> bool:
    """Whether systemd runs this host, and a service of its would be in this network namespace."""
    if not _RUNTIME.is_dir():  # sd_booted(3)
        return False
    try:
        return os.path.samestat(os.stat("/proc/1/ns/net"), os.stat("/proc/thread-self/ns/net"))
    except OSError:
        return False


def is_installed() -> bool:
    """Whether the sidecar is, or was, a service here."""
    return (UNITS / SIDECAR).exists()


def need_settings_kept(config: str | None) -> None:
    """Raises CommandError for a setting that only this command sees, by a variable, and not a service of systemd's."""
    from meshnet.codec.settings import settings_with_origin

    file = config or DEFAULT_CONFIG
    text = read_text(file) if config or Path(file).exists() else ""
    for name, origin in settings_with_origin(text, os.environ, file)[1].items():
        if origin.kind == "env":
            raise CommandError(
                f"{origin.place} is set here, but a service of systemd's does not see it",
                why="rules and sidecar have to be of the same settings",
                fix=f"unset {origin.place}; sudo meshnet set {name}={os.environ[origin.place]}",
            )


def is_ending(unit: str) -> bool:
    """Whether `unit` is being stopped for good: neither to be started again, nor because the machine goes down."""
    return removes_rules(_job(unit), systemctl("is-system-running", check=False).strip())


def removes_rules(job: str, system: str) -> bool:
    """Of the job that a unit has, and the state of the system. Pure."""
    return job == "stop" and system != "stopping"


def systemctl(*arguments: str, check: bool = True) -> str:
    """What it prints. Raises CommandError."""
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise CommandError(
            f"systemctl {' '.join(arguments)} failed", why=done.stderr.strip(), fix=f"journalctl -eu {arguments[-1]}"
        )
    return done.stdout


def is_up(unit: str) -> bool:
    """Whether it runs, or is on its way there or back."""
    return _property(unit, "ActiveState") in _UP


class Service:
    """The two units of this host."""

    def __init__(self, settings: Settings, config: str | None) -> None:
        self._settings = settings
        self._units = {
            SIDECAR: sidecar_unit(settings, MESHNET, config, _version()),
            RULES: rules_unit(settings, MESHNET, config),
        }

    def differing_units(self) -> list[str]:
        """The units that are not as these settings want them."""
        return [name for name, text in self._units.items() if _text(UNITS / name) != text]

    def install(self, ledger: Ledger) -> list[str]:
        """Writes what differs; the names of that. Raises CommandError."""
        make_keeper(ledger)  # the rules' unit names it; that of an older version was root's
        changed = self.differing_units()
        for name in changed:
            if not (UNITS / name).exists():
                ledger.note("unit", UNITS / name)
            try:
                write_files(UNITS, {name: self._units[name].encode()}, mode=0o644)
            except OSError as error:
                raise CommandError(
                    f"cannot write {UNITS / name}", why=error.strerror or str(error), fix=f"df -h {UNITS}"
                ) from error
        if changed:
            systemctl("daemon-reload")
        return changed

    def is_kept(self) -> bool:
        """Whether systemd looks after a sidecar here, be it between two lives of it."""
        return is_up(SIDECAR)

    def start(self) -> None:
        """Starts the sidecar alone; the rules' unit, once enabled, comes with it. Does not wait until it is ready."""
        systemctl("start", "--no-block", SIDECAR)

    def try_again(self) -> None:
        self.start()

    def start_rules(self) -> None:
        systemctl("start", RULES)

    def leave_rules(self) -> bool:
        """Ends what looks after the rules, and leaves them in the kernel for the caller. Whether there was somebody."""
        looked_after = is_up(RULES)
        drop_in = _RUNTIME / f"{RULES}.d" / "leave.conf"
        try:
            drop_in.parent.mkdir(parents=True, exist_ok=True)
            drop_in.write_text("[Service]\nExecStopPost=\n")
            systemctl("daemon-reload")
            systemctl("stop", RULES, check=False)  # it may not be there
        except OSError as error:
            raise CommandError(
                f"cannot write {drop_in}", why=error.strerror or str(error), fix=f"df -h {_RUNTIME}"
            ) from error
        finally:
            drop_in.unlink(missing_ok=True)
            if drop_in.parent.exists():
                drop_in.parent.rmdir()
            systemctl("daemon-reload")
        return looked_after

    def enable(self) -> bool:
        """Has both started at boot. Whether that is new."""
        if self.is_enabled():
            return False
        systemctl("enable", "--quiet", SIDECAR, RULES)
        return True

    def is_enabled(self) -> bool:
        return all(systemctl("is-enabled", unit, check=False).strip() == "enabled" for unit in (SIDECAR, RULES))

    def disable(self) -> None:
        systemctl("disable", "--quiet", SIDECAR, RULES, check=False)

    def stop(self, drain: float) -> bool:
        """Stops the sidecar; what is open gets `drain` seconds. Whether there was one. Raises CommandError."""
        if not self.is_kept():
            systemctl("reset-failed", SIDECAR, RULES, check=False)
            return False
        # Its own drain, after SIGTERM, is as long as the settings say: before it there is time for more, and asked
        # again it ends sooner.
        deadline = time.monotonic() + drain
        last = deadline - parse_duration(self._settings.proxy.drain_timeout)
        while time.monotonic() < last and self._open_connections():
            time.sleep(0.2)  # noqa: TID251 - the sidecar tells nobody when a connection ends
        systemctl("stop", "--no-block", SIDECAR)
        while self.is_kept():
            if time.monotonic() >= deadline:
                try:
                    ask(self._settings.admin.socket, Drain(timeout=0.0), Accepted)
                except CommandError:
                    pass  # it is ending, or cannot hear: systemd kills it in its time
                systemctl("stop", SIDECAR)
                break
            time.sleep(0.05)  # noqa: TID251 - `systemctl stop` would wait for longer than we may
        systemctl("reset-failed", SIDECAR, RULES, check=False)
        return True

    def clean(self) -> None:
        """Takes away what systemd keeps for the units; they are stopped."""
        systemctl("clean", "--what=runtime", SIDECAR, check=False)

    def _open_connections(self) -> int:
        try:
            return ask(self._settings.admin.socket, GetStatus(), Status).open_connections
        except CommandError:
            return 0

    def output(self) -> "Output":
        return Output()

    def log(self) -> str:
        return f"journalctl -eu {SIDECAR}"


class Output:
    """What the sidecars of the unit have said since this was made, and how they ended."""

    def __init__(self) -> None:
        self._since = f"@{time.time():.6f}"

    def exit_codes(self) -> list[int]:
        """One for each time that systemd says the process ended."""
        text = self._journal("-u", SIDECAR)
        codes = []
        for how, status in re.findall(r"Main process exited, code=(\w+), status=(\d+)", text):
            codes.append(int(status) if how == "exited" else -int(status))
        return codes

    def last_words(self) -> list[str]:
        lines = self._journal(f"_SYSTEMD_UNIT={SIDECAR}").splitlines()
        errors = [at for at, line in enumerate(lines) if line.startswith("error: ")]
        return lines[errors[-1] :] if errors else lines[-3:]

    def _journal(self, *which: str) -> str:
        done = subprocess.run(
            ["journalctl", "-q", "-o", "cat", "--no-pager", "--since", self._since, *which],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout


def _version() -> int:
    found = re.match(r"systemd (\d+)", systemctl("--version", check=False))
    return int(found[1]) if found else 0


def _job(unit: str) -> str:
    """`start`, `stop`, `restart` and so on; empty where nothing is to be done to it."""
    for line in systemctl("list-jobs", "--no-legend", "--plain", "--full", check=False).splitlines():
        fields = line.split()
        if len(fields) >= 3 and fields[1] == unit:
            return fields[2]
    return ""


def _property(unit: str, name: str) -> str:
    return systemctl("show", "--property", name, "--value", unit, check=False).strip()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
