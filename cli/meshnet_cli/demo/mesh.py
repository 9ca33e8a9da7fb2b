"""meshnet on the hosts of a world: identities, resources, and a sidecar per host, run as users run them.

mesh = Mesh(world)
mesh.write(mesh.service("api", 8080, [api], address="10.96.0.10"))
sidecar = mesh.sidecar(api)      # started and ready; open connections do not notice
sidecar.capture()                # the redirect rules: from here on new connections go through it
"""

import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import yaml

import meshnet
import meshnet_cli
import meshnet_init
from meshnet.control.authority import BUNDLE, CERTIFICATE, KEY, Authority, save_issued
from meshnet.errors import CommandError
from meshnet.model.admin import EndpointList, GetStatus, ListConnections, ListEndpoints, Status
from meshnet.model.connection import Connection
from meshnet.model.identity import spiffe_id
from meshnet.model.resource import API_VERSION, AnyResource, EndpointSpec, Metadata, PortSpec, Service, ServiceSpec
from meshnet.model.service import TunnelKind
from meshnet.model.settings import Settings
from meshnet_cli.client import ask
from meshnet_cli.configuration import read_settings
from meshnet_cli.demo.world import Host, Process, ProgramFailed, World, wait_for
from meshnet_cli.listing import listing
from meshnet_init.apply import apply

READY_TIMEOUT = 20.0


class Mesh:
    """One trust domain and one directory of resources, shared by the sidecars of a world."""

    def __init__(self, world: World, trust_domain: str = "mesh.example") -> None:
        self.world = world
        self.trust_domain = trust_domain
        self.directory = world.directory / "mesh.d"
        self.directory.mkdir()
        self.authority = Authority.create(trust_domain, now=datetime.now(UTC))
        self.sidecars: dict[str, Sidecar] = {}

    def identity(self, name: str) -> str:
        return spiffe_id(self.trust_domain, "default", name)

    def write(self, *resources: AnyResource) -> None:
        """Put exactly these resources in force: one file, replaced in one step, as a careful user would."""
        text = yaml.safe_dump_all([msgspec.to_builtins(resource) for resource in resources], sort_keys=False)
        draft = self.world.directory / "mesh.yaml.new"
        draft.write_text(text)
        draft.replace(self.directory / "mesh.yaml")

    def service(
        self,
        name: str,
        ports: Sequence[int],
        hosts: Sequence[Host],
        *,
        addresses: Sequence[str] = (),
        meshed: bool = True,
        tunnel_port: int = 15108,
    ) -> Service:
        """A Service whose endpoints are the IPv4 addresses of `hosts`, behind their sidecars unless not `meshed`."""
        tunnel = TunnelKind.MESHNET if meshed else TunnelKind.NONE
        return Service(
            api_version=API_VERSION,
            metadata=Metadata(name=name),
            spec=ServiceSpec(
                addresses=tuple(addresses),
                ports=tuple(PortSpec(port=port) for port in ports),
                endpoints=tuple(
                    EndpointSpec(
                        address=host.address,
                        tunnel=tunnel,
                        tunnel_port=tunnel_port,
                        identity=self.identity(host.name) if meshed else "",
                    )
                    for host in hosts
                ),
            ),
        )

    def sidecar(self, host: Host, *, identity: str = "", start: bool = True, **sections: dict[str, Any]) -> "Sidecar":
        """A sidecar on `host`, started and ready; `sections` are those of meshnet.toml, added to what a world needs."""
        home = host.directory / "meshnet"
        home.mkdir()
        issued = self.authority.issue(identity or self.identity(host.name), now=datetime.now(UTC))
        save_issued(issued, home)
        needed: dict[str, dict[str, Any]] = {
            "admin": {"socket": str(home / "admin.sock")},
            "mesh": {"directory": str(self.directory), "last_good": str(home / "last-good.json")},
            "identity": {"certificate": str(home / CERTIFICATE), "key": str(home / KEY), "bundle": str(home / BUNDLE)},
            "log": {"access": "json"},
        }
        for section, values in sections.items():
            needed[section] = needed.get(section, {}) | values
        sidecar = Sidecar(host, home, msgspec.convert(needed, Settings))
        sidecar.config.write_text(_toml(needed))
        self.sidecars[host.name] = sidecar
        if start:
            sidecar.start()
        return sidecar


class Sidecar:
    """The proxy of one host, its admin socket and its rules."""

    def __init__(self, host: Host, home: Path, settings: Settings) -> None:
        self.host = host
        self.settings = settings
        self.config = home / "meshnet.toml"
        self.process: Process | None = None
        self._proxy = (*_MESHNET, "proxy", "--config", self.config)

    def start(self) -> None:
        """Start it and wait until it is ready; raises as `wait_until_ready`."""
        self.spawn()
        self.wait_until_ready()

    def spawn(self, *, by: tuple[str, ...] = (), pass_fds: Sequence[int] = (), **environment: str) -> None:
        """Start it, through the command `by`. Several that start at once are ready sooner than one after the other."""
        self.process = self.host.spawn(
            *by, *self._proxy, name="sidecar", pass_fds=pass_fds, **_PYTHONPATH, **environment
        )

    def wait_until_ready(self, timeout: float = READY_TIMEOUT) -> None:
        """Raises ProgramFailed with its log when it ends instead, or TimeoutError."""
        process = self.process
        assert process is not None

        def ready() -> bool:
            if not process.alive:
                raise ProgramFailed(self.host.name, self._proxy, process.popen.returncode, process.output)
            try:
                return self.status().ready
            except CommandError:
                return False

        wait_for(ready, timeout=timeout, what=f"the sidecar of {self.host.name} ready (log: {process.log})")

    def stop(self, timeout: float = 40.0) -> int:
        """SIGTERM, drain, and the exit status."""
        assert self.process is not None
        return self.process.terminate(timeout)

    def capture(self) -> None:
        """Put the redirect rules into the host's kernel, as `meshnet init` does."""
        settings = read_settings(str(self.config))
        with self.host.entered():  # a process for each host would take longer to import what it needs than to do it
            apply(settings)

    def release(self, drain: str = "30s") -> None:
        """Take the redirect rules out: new connections go direct, captured ones are waited for."""
        self.meshnet("init", "remove", "--drain", drain, timeout=60.0)

    def meshnet(self, *arguments: str | Path, check: bool = True, timeout: float = 30.0) -> str:
        """What a `meshnet` command prints on this host. Raises ProgramFailed unless `check` is off."""
        # The second only because whoever runs us may have set it to another.
        environment = _PYTHONPATH | {"MESHNET_CONFIG": str(self.config), "MESHNET_SOCKET": self.settings.admin.socket}
        return self.host.run(*_MESHNET, *arguments, check=check, timeout=timeout, **environment).stdout

    def status(self) -> Status:
        return ask(self.settings.admin.socket, GetStatus(), Status)

    def connections(self, *, ended: bool = True) -> tuple[Connection, ...]:
        """Its records, those that have ended included; without `ended` only those open or failed of late."""
        return listing(self.settings.admin.socket, ListConnections(all=ended), timeout=5.0).items

    def endpoints(self, service: str = "") -> EndpointList:
        return ask(self.settings.admin.socket, ListEndpoints(service=service), EndpointList)


_MESHNET = (sys.executable, "-m", "meshnet_cli.main")
# Where this code was found is the code to run, installed or not.
_ROOTS = (Path(package.__path__[0]).parent for package in (meshnet, meshnet_cli, meshnet_init))
_PYTHONPATH = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(map(str, _ROOTS)))}


def _toml(sections: dict[str, dict[str, Any]]) -> str:
    # A JSON string, number, boolean or list is TOML as it stands.
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        for name, values in sections.items()
    )
