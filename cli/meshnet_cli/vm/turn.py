"""One command at a time changes a host: `up`, `down` and `set` have a lock to their end.

So has the dead-man switch of one that is gone, while it puts back. The lock is on the network namespace, whose rules
they change: it is there on every host, whatever folder is missing or cannot be written, `down --purge` does not take
it away, and it is free when its holder is gone.
"""

import fcntl
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import click

from meshnet.errors import CommandError
from meshnet_cli.output import printable, warn

_LOCKED = "/proc/thread-self/ns/net"
_PROGRAMS = ("meshnet", "meshnet_cli.main")


def take() -> IO[bytes]:
    """The lock, held until it is closed. Raises CommandError where another command has it."""
    file = open(_LOCKED, "rb")  # noqa: SIM115 - it is the caller's to close
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holders = list(_holders(os.fstat(file.fileno()).st_ino))
        ours = [pid for pid in holders if not _is_anybodys(pid)]
        if holders and not ours:  # anybody may lock it, and shall not keep root from `meshnet down`
            warn(f"process {holders[0]} has the lock of meshnet's commands and is none of them: ps -p {holders[0]}")
            return file
        file.close()
        raise taken_by(ours[0] if ours else 0) from error
    return file


def hold() -> None:
    """To the end of the command that runs. Raises CommandError."""
    click.get_current_context().with_resource(take())


def taken_by(pid: int) -> CommandError:
    """What to say where another command is in the middle of its work; `pid` is 0 where it cannot be seen."""
    command = f" ({typed})" if (typed := _command(pid)) else ""
    return CommandError(
        "another meshnet command is changing this host",
        why=f"process {pid}{command} has not reached its end yet" if pid else "which one cannot be seen here",
        fix="the same again, in a minute" + (f"; if it does not end: ps -p {pid}, kill {pid}" if pid else ""),
    )


def _holders(inode: int) -> Iterator[int]:
    """Who has locked that file: proc(5), /proc/locks. Nobody where that cannot be seen."""
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):
            yield int(fields[4])


def _is_anybodys(pid: int) -> bool:
    """Whether it is neither root's nor of the user who asks. Not so where that cannot be seen."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    user = next(int(line.split()[2]) for line in lines if line.startswith("Uid:"))
    return user not in (0, os.geteuid())


def _command(pid: int) -> str:
    """As it was typed."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return ""
    if "meshnet_cli.vm.deadman" in words:
        return "it puts back what a command had done that is gone"
    started = next((at for at, word in enumerate(words) if word.rpartition("/")[2] in _PROGRAMS), None)
    return printable(shlex.join(words if started is None else ["meshnet", *words[started + 1 :]]))
