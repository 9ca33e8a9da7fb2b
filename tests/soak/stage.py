"""Three hosts in a mesh and everything that runs on them: `web` calls, `api` and `twin` serve."""

import itertools
import signal
from functools import partial
from pathlib import Path
from typing import Self

from meshnet.model.resource import (
    API_VERSION,
    AnyResource,
    BreakerSpec,
    Metadata,
    Service,
    TrafficPolicy,
    TrafficPolicySpec,
)
from meshnet_cli.demo.mesh import Mesh, Sidecar
from meshnet_cli.demo.world import Host, Process, World, wait_for
from tests.faults.causes import wrong_clock
from tests.soak.talk import Talker
from tests.soak.websocket import EchoServer
from tests.traffic import servers

WEB_SITE, CACHE, DATABASE, BULK, GREETER, ECHO, LOGIN, WEBSOCKET = 8080, 6379, 5432, 5201, 7000, 7001, 2222, 8081
ODD = 7002  # where a fault itself listens for a while
DEAD = 9999  # nobody listens
ADDRESSES = {
    WEB_SITE: "10.96.2.1",
    CACHE: "10.96.2.2",
    DATABASE: "10.96.2.3",
    BULK: "10.96.2.4",
    GREETER: "10.96.2.5",
    ECHO: "10.96.2.6",
    LOGIN: "10.96.2.7",
    WEBSOCKET: "10.96.2.8",
    DEAD: "10.96.2.9",
    ODD: "10.96.2.10",
}
CONTENT = bytes(range(256)) * 8192


class Stage:
    """Built at once; leaving it ends what `World` would not. On `disk` the sidecars keep the last good mesh."""

    def __init__(self, world: World, disk: Path) -> None:
        self.world = world
        self.web, self.api, self.twin = (world.host(name) for name in ("web", "api", "twin"))
        self.hosts = (self.web, self.api, self.twin)
        self.stranger = world.host("stranger")
        """It has no sidecar, and no identity."""
        self.mesh = Mesh(world)
        self.revision = 0
        self.write()
        self.keepers: dict[str, Process] = {}
        self.clock = wrong_clock(world.directory)
        self.disk = disk
        for host in self.hosts:
            kept = {"last_good": str(disk / f"{host.name}.json")}
            proxy, admin = {"drain_timeout": "1s"}, {"memory_mib": 1}
            self.mesh.sidecar(host, start=False, proxy=proxy, admin=admin, mesh=kept).spawn()
        for host in self.hosts:
            sidecar = self.sidecar(host)
            sidecar.wait_until_ready()
            self.keep(host)
        self.database = servers.postgres(self.api, DATABASE)
        self.site = servers.nginx(self.api, WEB_SITE, CONTENT)
        self.cache = self._cache()
        self.bulk = self._bulk()
        _, self.key = servers.sshd(self.api, LOGIN)
        self.talkers = {host.name: [Talker(host, GREETER, greets=True)] for host in (self.api, self.twin)}
        self.talkers[self.api.name].append(Talker(self.api, ECHO, greets=False))
        self.websockets = EchoServer(self.api, WEBSOCKET)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for talker in itertools.chain(*self.talkers.values()):
            talker.close()
        self.websockets.close()
        # By SIGKILL it would leave shared memory behind.
        self.database.popen.send_signal(signal.SIGINT)
        self.database.popen.wait(20)

    def sidecar(self, host: Host) -> Sidecar:
        return self.mesh.sidecars[host.name]

    def pid(self, host: Host) -> int:
        process = self.sidecar(host).process
        assert process is not None
        return process.pid

    def write(self) -> None:
        """Another state of the mesh files, which means the same for every call."""
        self.revision += 1
        resources: list[AnyResource] = [self._service(port) for port in ADDRESSES]
        resources.append(self.mesh.service(f"revision-{self.revision}", [1], [self.api]))
        quick = BreakerSpec(open_time="200ms", max_open_time="500ms")
        names = tuple(resource.metadata.name for resource in resources)
        resources.append(
            TrafficPolicy(
                api_version=API_VERSION,
                metadata=Metadata(name="quick"),
                spec=TrafficPolicySpec(services=names, breaker=quick),
            )
        )
        self.mesh.write(*resources)

    def write_nonsense(self) -> None:
        """In the place of the mesh files, until they are written again."""
        draft = self.world.directory / "nonsense"
        draft.write_text("kind: Nonsense\n")
        draft.replace(self.mesh.directory / "mesh.yaml")

    def wait_until_in_force(self) -> None:
        """Every sidecar has what was written last."""
        service = f"revision-{self.revision}"

        def has_it(sidecar: Sidecar) -> bool:
            return bool(sidecar.endpoints(service).items) and not sidecar.status().config.problem

        for name, sidecar in self.mesh.sidecars.items():
            wait_for(partial(has_it, sidecar), timeout=20.0, what=f"{service} at {name}")

    def keep(self, host: Host) -> None:
        """A keeper puts the rules in, and stays."""
        config = self.sidecar(host).config
        self.keepers[host.name] = host.spawn("meshnet", "rules", "keep", "--config", config, name="keeper")
        wait_for(lambda: self.is_captured(host), timeout=20.0, what=f"the rules of {host.name}")

    def is_captured(self, host: Host) -> bool:
        return "meshnet" in host.run("nft", "list", "tables").stdout

    def flush(self, host: Host) -> None:
        host.run("nft", "flush", "ruleset")

    def restart_cache(self) -> None:
        self.cache.kill()
        self.cache = self._cache()

    def restart_bulk(self) -> None:
        self.bulk.kill()
        self.bulk = self._bulk()

    def _cache(self) -> Process:
        return servers.start(
            self.api,
            CACHE,
            *("redis-server", "--port", str(CACHE), "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""),
        )

    def _bulk(self) -> Process:
        return servers.start(self.api, BULK, "iperf3", "-s", "-p", str(BULK))

    def _service(self, port: int) -> Service:
        hosts = [self.api, self.twin] if port == GREETER else [self.api]
        return self.mesh.service(f"port-{port}", [port], hosts, addresses=[ADDRESSES[port]])
