"""One mesh for every file here: `web` and `cron` call, the three `apis` answer; `outside` has no sidecar.

A test gives its services a name, an address and a port of its own, so that what sidecars have learned of one endpoint
(its breaker, its place in the round) never meets another test.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from meshnet.model.admin import EndpointView
from meshnet.model.connection import Connection
from meshnet.model.resource import (
    API_VERSION,
    AccessPolicy,
    AccessPolicySpec,
    AnyResource,
    Metadata,
    Service,
    TrafficPolicy,
    TrafficPolicySpec,
)
from meshnet.model.service import Action, Rule, Source, Target
from tests.traffic.app import App
from tests.world import Host, Mesh, Sidecar, World, into_the_mesh, still_alive, wait_for


@dataclass(frozen=True)
class Name:
    """A service of one test."""

    name: str
    address: str
    address6: str
    port: int


@dataclass
class Hosts:
    world: World
    mesh: Mesh
    web: Host
    cron: Host
    outside: Host
    apis: list[Host]
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def sidecar(self, host: Host) -> Sidecar:
        return self.mesh.sidecars[host.name]

    def new_name(self) -> Name:
        number = next(self._numbers)
        return Name(f"s{number}", f"10.96.1.{number}", f"fd96::1:{number:x}", 7000 + number)

    def service(self, name: Name, hosts: Sequence[Host], *, weights: Sequence[int] = ()) -> Service:
        service = self.mesh.service(name.name, [name.port], hosts, addresses=[name.address, name.address6])
        endpoints = tuple(
            msgspec.structs.replace(endpoint, weight=weight)
            for endpoint, weight in itertools.zip_longest(service.spec.endpoints, weights, fillvalue=1)
        )
        return msgspec.structs.replace(service, spec=msgspec.structs.replace(service.spec, endpoints=endpoints))

    def write(self, *resources: AnyResource) -> None:
        """Puts exactly these in force; returns when every sidecar has them."""
        file = self.mesh.directory / "mesh.yaml"
        before = file.read_text() if file.exists() else ""
        versions = {name: sidecar.status().config.version for name, sidecar in self.mesh.sidecars.items()}
        self.mesh.write(*resources)
        if file.read_text() != before:
            for name, sidecar in self.mesh.sidecars.items():
                wait_for(lambda n=name, s=sidecar: s.status().config.version > versions[n], what=f"new mesh at {name}")

    def endpoints(self, name: Name, caller: Host | None = None) -> dict[str, EndpointView]:
        """What the caller's sidecar (of `web`, if not said) knows of the service's endpoints, by host."""
        by_address = {host.address: host.name for host in self.apis}
        listed = self.sidecar(caller or self.web).endpoints(name.name).items
        return {by_address[view.endpoint.rpartition(":")[0]]: view for view in listed}

    def logged(self, host: Host, connection_id: str) -> Connection:
        """The one line of the host's access log about a connection that has ended."""
        process = self.sidecar(host).process
        assert process is not None

        def lines() -> list[str]:
            return [line for line in process.output.splitlines() if line.startswith(f'{{"id":"{connection_id}"')]

        (line,) = wait_for(lines, what=f"{connection_id} in the access log of {host.name}")
        return msgspec.json.decode(line, type=Connection)

    @contextmanager
    def apps(self, port: int, hosts: Sequence[Host]) -> Iterator[Mapping[str, App]]:
        """The same program on several hosts, by host."""
        with ExitStack() as stack:
            yield {host.name: stack.enter_context(App(host, port)) for host in hosts}


def traffic(name: Name, **spec: Any) -> TrafficPolicy:
    """A TrafficPolicy for one service; `spec` as in YAML."""
    return TrafficPolicy(
        api_version=API_VERSION,
        metadata=Metadata(name=name.name),
        spec=msgspec.convert({"services": [name.name], **spec}, TrafficPolicySpec),
    )


def access(
    policy: str, action: str, *services: Name, source: Mapping[str, Any] = {}, target: Mapping[str, Any] = {}
) -> AccessPolicy:
    """An AccessPolicy with one rule; `source` and `target` as `from` and `to` in YAML."""
    rule = Rule(
        source=msgspec.convert(source, Source) if source else msgspec.UNSET,
        target=msgspec.convert(target, Target) if target else msgspec.UNSET,
    )
    names = tuple(service.name for service in services)
    return AccessPolicy(
        api_version=API_VERSION,
        metadata=Metadata(name=policy),
        spec=AccessPolicySpec(action=Action(action), services=names, rules=(rule,)),
    )


@pytest.fixture(scope="package")
def _hosts() -> Iterator[Hosts]:
    with World() as world:
        web, cron, outside, *apis = (world.host(name) for name in ("web", "cron", "outside", "api-1", "api-2", "api-3"))
        hosts = Hosts(world, Mesh(world), web, cron, outside, apis)
        hosts.mesh.write()
        into_the_mesh(hosts.mesh, (web, cron, *apis))
        yield hosts


@pytest.fixture
def hosts(_hosts: Hosts, request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """When the test fails, its report shows the end of the sidecars' logs."""
    yield _hosts
    still_alive(_hosts.mesh, request)


@pytest.fixture
def name(hosts: Hosts) -> Name:
    return hosts.new_name()
