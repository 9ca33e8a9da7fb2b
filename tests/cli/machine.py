"""A host on which `meshnet up` and `meshnet down` are run as its administrator would."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

from meshnet.errors import CommandError
from meshnet.model.admin import GetStatus, ListConnections, Status
from meshnet.model.connection import Connection
from meshnet.net.keeper import ask_keeper
from meshnet_cli.client import ask
from meshnet_cli.listing import listing
from tests.cli.sidecar import ROOT
from tests.world import Host, Process, World, wait_for

MESHNET = (sys.executable, "-m", "meshnet_cli.main")

_KEEPER = b"rules\0keep"
# Somebody's own table: whatever meshnet does, it is there afterwards.
OWN_RULES = "table inet own { chain c { type filter hook input priority 0; tcp dport 9 counter drop; }; }"


class Machine:
    """All of meshnet lies in `home`, so that `home` shows what was changed. Close it: supervisors are detached."""

    def __init__(self, world: World, name: str) -> None:
        self.host: Host = world.host(name)
        self.home = self.host.directory / "home"
        self.config = self.home / "meshnet.toml"
        self.admin = self.home / "run" / "admin.sock"
        self.log = self.admin.parent / "supervisor" / "sidecar.log"
        self.identity = self.home / "identity"
        self.mesh = self.home / "mesh.d"
        self.environment = {
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "cli", "init")),
            "MESHNET_SOCKET": str(self.admin),
        }
        self.home.mkdir()
        self.configure()
        self.host.run("nft", "-f", "-", stdin=OWN_RULES)

    def configure(self, more: str = "") -> None:
        self.config.write_text(
            f"[admin]\nsocket = '{self.admin}'\n[mesh]\ndirectory = '{self.mesh}'\n"
            f"last_good = '{self.home}/last-good.json'\n[identity]\n"
            f"certificate = '{self.identity}/cert.pem'\nkey = '{self.identity}/key.pem'\n"
            f"bundle = '{self.identity}/bundle.pem'\n{more}"
        )

    def meshnet(
        self, *arguments: str, by: tuple[str, ...] = (), on: Host | None = None
    ) -> subprocess.CompletedProcess[str]:
        """What a `meshnet` command does here, or `on` another host; it is started through the command `by`."""
        return (on or self.host).run(*by, *self._line(*arguments), check=False, **self.environment)

    def start(self, *arguments: str, **environment: str) -> Process:
        """The same, while the test goes on."""
        return self.host.spawn(*self._line(*arguments), name=arguments[0], **self.environment, **environment)

    def up(self) -> Status:
        done = self.meshnet("up")
        assert done.returncode == 0, done.stdout + done.stderr
        return self.status()

    def cut_off_up(self) -> None:
        """As by a power cut: command and dead-man switch are both gone when the rules are in, before the end."""
        up = self.start("up")
        wait_for(lambda: re.search(r"^. rules ", up.output, re.MULTILINE), timeout=30.0, what="the rules")
        os.kill(self.switch(), signal.SIGKILL)
        up.popen.kill()
        up.popen.wait()

    def status(self) -> Status:
        return ask(str(self.admin), GetStatus(), Status)

    def ready(self) -> Status | None:
        try:
            status = self.status()
        except CommandError:
            return None
        return status if status.ready else None

    def connections(self) -> tuple[Connection, ...]:
        """Its records, but for the canaries."""
        items = listing(str(self.admin), ListConnections(all=True), timeout=5.0).items
        return tuple(item for item in items if not item.original_destination.endswith(":15122"))

    def rules(self) -> str:
        """The kernel's rules, each with its handle, without hit counts: the same text is the same rules, untouched."""
        return self.host.run("nft", "-a", "-s", "list", "ruleset").stdout

    def files(self) -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in self.home.rglob("*") if file.is_file()}

    def run_files(self) -> set[str]:
        """What sidecar and supervisor have in the folder of the admin socket."""
        return {file.name for file in self.admin.parent.rglob("*") if not file.is_dir()}

    def programs(self) -> list[int]:
        """The process ids of meshnet's here, workers included, the keeper of the rules left out."""
        ours = (b"meshnet_cli", b"meshnet.proxy.workers")
        lines = {pid: _command_line(pid) for pid in self._processes()}
        return [pid for pid, line in lines.items() if any(name in line for name in ours) and _KEEPER not in line]

    def keepers(self) -> list[int]:
        return [pid for pid in self._processes() if _KEEPER in _command_line(pid)]

    def is_kept(self) -> bool:
        """Whether the keeper says that it keeps the rules."""
        with self.host.entered():
            report = ask_keeper()
        return report is not None and report.state == "keeping"

    def switch(self) -> int:
        """The dead-man switch of a command that has not reached its end."""
        (pid,) = (pid for pid in self.programs() if b"meshnet_cli.vm.deadman" in _command_line(pid))
        return pid

    def close(self) -> None:
        while processes := self._processes():
            for pid in processes:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            wait_for(lambda pids=processes: not any(_lives(pid) for pid in pids))

    def _line(self, *arguments: str) -> tuple[str, ...]:
        verb = arguments[0]
        return (*MESHNET, *arguments, *(("--config", str(self.config)) if verb in ("up", "down", "rules") else ()))

    def _processes(self) -> list[int]:
        """Whatever lives in the host's network namespace, which the test has made and nobody else is in."""
        here = os.fstat(self.host.namespace)
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.path.samestat(os.stat(entry / "ns" / "net"), here):
                    found.append(int(entry.name))
            except OSError:
                continue
        return [pid for pid in found if _lives(pid)]


def talk(client: socket.socket, app: socket.socket) -> bool:
    """Whether bytes pass both ways. Raises OSError."""
    for near, far in ((client, app), (app, client)):
        near.sendall(b"hello")
        if far.recv(5, socket.MSG_WAITALL) != b"hello":
            return False
    return True


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
