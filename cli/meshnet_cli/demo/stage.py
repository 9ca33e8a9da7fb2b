"""What the demonstration plays on: five hosts, their programs, their sidecars."""

import socket
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from meshnet.model.resource import API_VERSION, AccessPolicy, AccessPolicySpec, Metadata
from meshnet.model.service import Action, Rule, Source
from meshnet_cli.demo import programs
from meshnet_cli.demo.mesh import Mesh, Sidecar
from meshnet_cli.demo.programs import HTTP_PORT, LINE_PORT
from meshnet_cli.demo.world import Host, Process, World, wait_for

API_ADDRESS, API_ADDRESS6 = "10.96.0.10", "fd96::10"  # of the service: no host has them
POLICY = "cron-stays-out"


class Stage:
    """`web` and `cron` are clients, `apis` the three servers of the service `api`; `cron` may not call it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.web = world.host("web")
        self.cron = world.host("cron")
        self.apis = [world.host(f"api-{number}") for number in (1, 2, 3)]
        self.servers = {host.name: self.serve(host) for host in (*self.apis, self.web)}
        self.mesh = Mesh(world)
        self.mesh.write(
            self.mesh.service("api", [HTTP_PORT, LINE_PORT], self.apis, addresses=[API_ADDRESS, API_ADDRESS6]),
            AccessPolicy(
                api_version=API_VERSION,
                metadata=Metadata(name=POLICY),
                spec=AccessPolicySpec(
                    action=Action.DENY,
                    services=("api",),
                    rules=(Rule(source=Source(principals=(self.mesh.identity("cron"),))),),
                ),
            ),
        )
        for host in world.hosts.values():
            self.mesh.sidecar(host, start=False)

    def up(self) -> None:
        """Every host into the mesh: its sidecar first, then the rules."""
        for sidecar in self.mesh.sidecars.values():
            sidecar.spawn()
        for sidecar in self.mesh.sidecars.values():
            sidecar.wait_until_ready()
            sidecar.capture()

    def down(self) -> None:
        """Every host out of it again: the rules first, then the sidecar."""
        for sidecar in self.mesh.sidecars.values():
            sidecar.release()
        for sidecar in self.mesh.sidecars.values():
            sidecar.stop()

    def sidecar(self, host: Host) -> Sidecar:
        return self.mesh.sidecars[host.name]

    def serve(self, host: Host) -> Process:
        """The ordinary server, on `host`, listening."""
        process = self.program(host, "serve", host.name)
        wait_for(lambda: host.listens(HTTP_PORT) and host.listens(LINE_PORT), what=f"the server on {host.name}")
        return process

    def program(self, host: Host, *arguments: str) -> Process:
        return host.spawn(sys.executable, "-I", _PROGRAMS, *arguments, name="app")

    def ask(self, host: Host, *arguments: str) -> str:
        """What one of the ordinary clients prints on `host`."""
        return host.run(sys.executable, "-I", _PROGRAMS, *arguments, timeout=60.0).stdout


class Call:
    """A connection from `host` to a server that speaks first: `hello` is what it said."""

    def __init__(self, host: Host, address: str, port: int = LINE_PORT) -> None:
        self._socket = host.connect(address, port)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = self._socket.makefile("rb")
        try:
            self.hello = self._line()
        except BaseException:
            self.close()
            raise

    @property
    def server(self) -> str:
        return self.hello.removeprefix("hello from ")

    def say(self, text: str) -> str:
        """What comes back; the server repeats every line. Raises OSError."""
        self._socket.sendall(text.encode() + b"\n")
        return self._line()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _line(self) -> str:
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("the connection ended in the middle of a line")
        return line.decode().rstrip("\n")


_PROGRAMS = Path(programs.__file__)
