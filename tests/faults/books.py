"""A sidecar's books before and after a test: what it holds, what it has counted, what it has told."""

import os
from collections import Counter
from pathlib import Path

import msgspec

from meshnet.model.connection import Connection, Direction
from tests.proxy.peer import TUNNEL_PORT
from tests.world import Sidecar, wait_for

_PATIENCE = 15.0  # seconds; tunnels whose peer has died are found by the pool's next look
_LISTEN = "0A"  # of /proc/net/tcp


class Books:
    """Opened when a test begins. `balance` raises when it leaves anything behind, or tells a connection twice or not.

    A sidecar that the test has started again begins from nothing.
    """

    def __init__(self, sidecar: Sidecar) -> None:
        self._sidecar = sidecar
        status = sidecar.status()
        self._pid = status.pid
        self._opened = status.opened_total
        self._from = len(self._log())
        self._held = held(status.pid)

    def balance(self) -> None:
        name, pid = self._sidecar.host.name, self._sidecar.status().pid
        again = pid != self._pid
        wait_for(lambda: self._sidecar.status().open_connections == 0, timeout=_PATIENCE, what=f"{name}: all ended")
        opened = 0 if again else self._opened
        wait_for(
            lambda: len(self.told(again)) == self._sidecar.status().opened_total - opened,
            what=f"{name}: a line in the log for each connection",
        )
        ids = Counter(line.id for line in self.told(again) if line.direction is Direction.OUTBOUND)
        assert [each for each, count in ids.items() if count > 1] == []
        assert "Traceback" not in self._log()[self._from :]
        if not again:
            wait_for(lambda: held(pid) <= self._held, timeout=_PATIENCE, what=f"{name}: no more than {self._held}")

    def told(self, again: bool = False) -> list[Connection]:
        """The lines of the access log since then, or since it was started again."""
        said = self._log()[self._from :]
        if again:
            said = said.rpartition("listening: ")[2]
        return access_lines(said)

    def _log(self) -> str:
        assert self._sidecar.process is not None
        return self._sidecar.process.output


def access_lines(said: str) -> list[Connection]:
    """What a sidecar has said of connections, among other things; the last line may be half written still."""
    lines = [line for line in said.splitlines(keepends=True) if line.startswith('{"id"') and line.endswith("\n")]
    return [msgspec.json.decode(line, type=Connection) for line in lines]


def held(pid: int) -> Counter[str]:
    """Descriptors and threads of a sidecar, without what it keeps for later on purpose: tunnels, the native core's
    pipes, and trio's threads, which end when nothing has been asked of them for a while.
    """
    tunnels = _tunnels(pid)
    counted: Counter[str] = Counter()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except FileNotFoundError:
            continue  # it was closed just now
        kind, _, inode = target.rstrip("]").partition(":[")
        if kind != "pipe" and inode not in tunnels:
            counted[kind if inode else "file"] += 1
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if not name.startswith("Trio"):
            counted["thread"] += 1
    return counted


def _tunnels(pid: int) -> set[str]:
    """Inodes of the sockets to and from other sidecars' tunnel ports."""
    found = set()
    for family in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{family}").read_text().splitlines()[1:]:
            _, local, remote, state, *rest = line.split()
            ports = {int(end.rpartition(":")[2], 16) for end in (local, remote)}
            if TUNNEL_PORT in ports and state != _LISTEN:
                found.add(rest[5])
    return found
