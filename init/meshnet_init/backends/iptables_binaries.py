"""iptables-save and iptables-restore, of either kind: so that `iptables -S` shows the rules."""

import os
import re
import shutil
import subprocess

from meshnet.errors import CommandError
from meshnet_init.backends import Lack, hung, not_permitted
from meshnet_init.backends.iptables import FAMILIES, IpFamily, IptablesBackend, Kind, Speaker
from meshnet_init.host import may_change_rules
from meshnet_init.rule import Table

_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
_VERSION = re.compile(r"v(\d+)\.(\d+)(?:\.(\d+))?(?: \((nf_tables|legacy)\))?")
_WAIT_SINCE = (1, 6, 2)  # the first iptables-legacy-restore that knows --wait
_LOCK_WAIT = "30"  # seconds
_PATIENCE = 60.0  # seconds for a program, with what it waits for


def by_binaries(name: str, kind: Kind) -> IptablesBackend | None:
    """Whoever of `iptables` and its variants in PATH writes that kind of tables; None when nobody does."""
    for command in ("iptables", f"iptables-{kind}"):
        version = _version(command)
        if version is not None and version[0] == kind:
            speakers: dict[IpFamily, Speaker] = {
                family: Binaries(
                    family, command.replace("iptables", f"ip{'6' if family == 'ipv6' else ''}tables"), version[1]
                )
                for family in FAMILIES
            }
            return IptablesBackend(name, kind, speakers)
    return None


class Binaries:
    """See meshnet_init.backends.iptables.Speaker."""

    def __init__(self, family: IpFamily, command: str, wait: bool) -> None:
        self._family = family
        self._command = command
        self._wait = ["--wait", _LOCK_WAIT] if wait else []

    def lack(self) -> Lack:
        try:
            for verb in ("restore", "save"):
                self._path(f"{self._command}-{verb}")
        except CommandError as error:
            return Lack(error.what, error.fix)
        return Lack()

    def save(self, table: Table) -> str:
        return self._run(f"{self._command}-save", ["-c", "-t", table])

    def restore(self, text: str) -> None:
        self._run(f"{self._command}-restore", ["--noflush", *self._wait], text)

    def _run(self, program: str, arguments: list[str], text: str = "") -> str:
        path = self._path(program)
        try:
            done = subprocess.run(
                [path, *arguments],
                input=text,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                env={**os.environ, "LC_ALL": "C"},
                timeout=_PATIENCE,
            )
        except subprocess.TimeoutExpired as error:
            raise hung(program, error.timeout) from error
        if done.returncode == 0:
            return done.stdout
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        if "xtables lock" in said:
            raise CommandError(
                f"another program has held the lock of the legacy tables for {_LOCK_WAIT} s",
                why=said,
                fix=f"see who it is: fuser -v {os.environ.get('XTABLES_LOCKFILE', '/run/xtables.lock')}",
                code=6,
            )
        # iptables-legacy says the same of a missing right as of a missing kernel module.
        if not may_change_rules() or "Permission denied" in said or "Operation not permitted" in said:
            raise not_permitted("change" if text else "read")
        raise CommandError(
            f"{program} refused the {self._family} rules; what was in force still is" if text else f"{program} failed",
            why=said,
            fix="see what is there: iptables-save; or use --backend nft",
        )

    def _path(self, program: str) -> str:
        path = shutil.which(program, path=_PATH)
        if path is None:
            raise CommandError(
                f"{program} is not installed",
                why=f"{self._family} rules are part of the plan" if self._family == "ipv6" else "PATH does not have it",
                fix="install iptables, or use --backend nft" + (", or --ipv6 off" if self._family == "ipv6" else ""),
            )
        return path


def _version(command: str) -> tuple[Kind, bool] | None:
    """Which kernel interface a command writes to, and whether it has a lock to wait for."""
    path = shutil.which(command, path=_PATH)
    if path is None or shutil.which(f"{command}-restore", path=_PATH) is None:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    match = _VERSION.search(said)
    if match is None:
        return None
    if match[4] == "nf_tables":
        return "nft", False  # netlink transactions need no lock
    return "legacy", tuple(int(part or 0) for part in match.groups()[:3]) >= _WAIT_SINCE
