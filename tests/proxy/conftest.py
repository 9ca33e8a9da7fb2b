"""One small mesh per test file: `web` calls; `api` and `twin` answer; `outside` has no sidecar."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest

from meshnet.model.resource import (
    API_VERSION,
    AnyResource,
    BreakerSpec,
    Metadata,
    TrafficPolicy,
    TrafficPolicySpec,
)
from tests.proxy.peer import Peer, credentials, issue
from tests.world import Host, Mesh, Sidecar, World, into_the_mesh, still_alive, wait_for

API, API6, PAIR, SELF, PLAIN = "10.96.0.10", "fd96::10", "10.96.0.20", "10.96.0.30", "10.96.0.40"


@dataclass
class Hosts:
    """`resources` are in force when a test begins, whatever the one before it wrote."""

    world: World
    mesh: Mesh
    web: Host
    api: Host
    twin: Host
    outside: Host
    writes: int = 0

    @property
    def resources(self) -> list[AnyResource]:
        service = self.mesh.service
        return [
            service("api", [8080], [self.api], addresses=[API, API6]),
            service("pair", [7000], [self.api, self.twin], addresses=[PAIR]),
            service("self", [9000], [self.web], addresses=[SELF]),
            service("plain", [6000], [self.outside], addresses=[PLAIN], meshed=False),
            # What one test does to an endpoint shall not open its breaker for the next.
            TrafficPolicy(
                api_version=API_VERSION,
                metadata=Metadata(name="patient"),
                spec=TrafficPolicySpec(services=("api", "pair"), breaker=BreakerSpec(failures=1_000_000)),
            ),
        ]

    def sidecar(self, host: Host) -> Sidecar:
        return self.mesh.sidecars[host.name]

    def log(self, host: Host) -> str:
        """What its sidecar has printed, the access log included."""
        process = self.sidecar(host).process
        assert process is not None
        return process.output

    def write(self, *changed: AnyResource) -> None:
        """Puts the usual resources in force, with these added or in place of those of the same kind and name.

        Returns when every sidecar that runs has them.
        """
        # A state that means the same as the one before is not applied, so each has a service of its own.
        self.writes += 1
        revision = self.mesh.service(f"revision-{self.writes}", [1], [])
        named = {(type(each), each.metadata.name): each for each in (*self.resources, revision, *changed)}
        running = [each for each in self.mesh.sidecars.values() if each.process and each.process.alive]
        versions = [sidecar.status().config.version for sidecar in running]
        self.mesh.write(*named.values())
        for sidecar, version in zip(running, versions, strict=True):
            wait_for(partial(_is_newer, sidecar, version), what=f"the new resources in force at {sidecar.host.name}")


def _is_newer(sidecar: Sidecar, version: int) -> bool:
    return sidecar.status().config.version > version


@pytest.fixture(scope="module")
def _hosts() -> Iterator[Hosts]:
    with World() as world:
        web, api, twin, outside = (world.host(name) for name in ("web", "api", "twin", "outside"))
        hosts = Hosts(world, Mesh(world), web, api, twin, outside)
        hosts.mesh.write(*hosts.resources)
        into_the_mesh(hosts.mesh, (web, api, twin))
        yield hosts


@pytest.fixture
def hosts(_hosts: Hosts, request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """The mesh of this test file. When the test fails, its report shows the end of the sidecars' logs."""
    if _hosts.writes:
        _hosts.write()
        _hosts.writes = 0
    yield _hosts
    still_alive(_hosts.mesh, request)


@pytest.fixture
def peer(hosts: Hosts) -> Iterator[Peer]:
    """A tunnel from `web` to `api`, with the certificate of `web`."""
    with Peer(hosts.web, hosts.api, credentials(issue(hosts.mesh, "web")).client) as tunnel:
        yield tunnel
