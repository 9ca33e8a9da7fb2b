"""The legacy tables through python-iptables: no binaries, and a host whose rules are there keeps them in one place.

What reads and writes is a program of its own for each family (legacy_child.py): libxtables may end the process it is
in, and takes one family only. python-iptables takes no lock, so the one of iptables-legacy is held here.
"""

import fcntl
import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import IO

from meshnet.errors import CommandError
from meshnet_init.backends import Lack, hung, not_permitted
from meshnet_init.backends.iptables import FAMILIES, IpFamily, IptablesBackend
from meshnet_init.host import may_change_rules
from meshnet_init.rule import Table

_PROGRAM = Path(__file__).with_name("legacy_child.py")
_LOCK = "/run/xtables.lock"
_LOCK_WAIT = 30.0  # seconds
_LOOK_AGAIN = 0.05
_PATIENCE = 60.0  # seconds for an answer


def by_python_iptables() -> IptablesBackend | None:
    """None where python-iptables is not installed, or does not work."""
    if not _is_installed() or why_it_does_not_work():
        return None
    children = {family: PythonIptables(family) for family in FAMILIES}

    @contextmanager
    def session(writes: bool) -> Iterator[None]:
        with xtables_lock() if writes else nullcontext():
            try:
                yield
            finally:
                for child in children.values():
                    child.close()

    return IptablesBackend("legacy", "legacy", dict(children), session)


def _is_installed() -> bool:
    return importlib.util.find_spec("iptc") is not None


@cache
def why_it_does_not_work() -> str:
    """Empty where it does, or is not installed. It does not without libxtables, or with a newer one than it knows."""
    if not _is_installed():
        return ""
    command = [sys.executable, str(_PROGRAM), "works"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired as error:
        return f"it had not ended after {error.timeout:g} s"
    return _last_words(done.stderr, done.returncode) if done.returncode else ""


class PythonIptables:
    """See meshnet_init.backends.iptables.Speaker. Its program runs from the first question until it is closed."""

    def __init__(self, family: IpFamily) -> None:
        self._family = family
        self._program: subprocess.Popen[str] | None = None

    def lack(self) -> Lack:
        return Lack()

    def save(self, table: Table) -> str:
        return self._ask({"save": table})

    def restore(self, text: str) -> None:
        self._ask({"restore": text})

    def close(self) -> None:
        program, self._program = self._program, None
        if program is not None:
            program.communicate()  # its input ends, and with that the program

    def _ask(self, question: dict[str, object]) -> str:
        if self._program is None:
            self._program = subprocess.Popen(
                [sys.executable, str(_PROGRAM), self._family],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        program = self._program
        assert program.stdin is not None
        assert program.stdout is not None
        try:
            program.stdin.write(json.dumps(question) + "\n")
            program.stdin.flush()
            if not _speaks(program.stdout):
                self._program = None
                program.kill()
                program.wait()
                raise hung("python-iptables", _PATIENCE)
            line = program.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._program = None
            _, said = program.communicate()
            raise self._error(question, _last_words(said, program.returncode))
        answer = json.loads(line)
        if "error" in answer:
            raise self._error(question, answer["error"])
        return str(answer["text"])

    def _error(self, question: dict[str, object], why: str) -> CommandError:
        writes = "restore" in question
        if not may_change_rules() or "Permission denied" in why:
            return not_permitted("change" if writes else "read")
        return CommandError(
            f"python-iptables could not write the {self._family} rules; what was in force still is"
            if writes
            else f"python-iptables could not read the {self._family} rules",
            why=why,
            fix="see what is there: iptables-legacy-save; or use --backend nft",
        )


@contextmanager
def xtables_lock() -> Iterator[None]:
    """That of iptables-legacy: xtables_lock() in its iptables/xshared.c. XTABLES_LOCKFILE names another file.

    Raises CommandError when it cannot be had: code 6 when somebody holds it for long.
    """
    path = os.environ.get("XTABLES_LOCKFILE", _LOCK)
    try:
        lock = os.open(path, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CommandError(
            f"cannot open the lock of the legacy tables, {path}",
            why=error.strerror or str(error),
            fix="name a file that can be written here: XTABLES_LOCKFILE=/run/meshnet/xtables.lock",
            code=5 if isinstance(error, PermissionError) else 1,
        ) from error
    try:
        deadline = time.monotonic() + _LOCK_WAIT
        while not _lock(lock):
            if time.monotonic() > deadline:
                raise CommandError(
                    f"another program has held {path} for {_LOCK_WAIT:.0f} s",
                    why="rules in the legacy tables are written by one at a time",
                    fix=f"see who it is: fuser -v {path}",
                    code=6,
                )
            time.sleep(_LOOK_AGAIN)  # noqa: TID251  # flock(2) knows no time-out
        yield
    finally:
        os.close(lock)


def _last_words(said: str, code: int) -> str:
    lines = said.strip().splitlines()
    return lines[-1] if lines else f"its process ended with code {code}"


def _speaks(source: IO[str]) -> bool:
    poll = select.poll()
    poll.register(source, select.POLLIN)
    return bool(poll.poll(_PATIENCE * 1000))


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
