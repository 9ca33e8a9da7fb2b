"""From resources to a snapshot: what they say together, with every default filled in, or why they cannot hold.

A service's or policy's full name is `namespace/name`; in namespace `default` just `name`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from msgspec import structs

from meshnet.codec.fields import Fields
from meshnet.codec.policies import access_policy, traffic
from meshnet.codec.problem import Path, did_you_mean, in_one, in_words, quoted
from meshnet.codec.resources import Document, parse_documents
from meshnet.errors import ConfigError
from meshnet.model.address import Address, is_dns_name
from meshnet.model.identity import is_spiffe_id
from meshnet.model.resource import (
    AccessPolicy,
    AnyResource,
    EndpointSpec,
    Located,
    MeshConfig,
    MeshConfigSpec,
    Resource,
    Service,
    TrafficPolicy,
)
from meshnet.model.service import NOWHERE, Endpoint, Locality, NamedEndpoint, ServicePort, Traffic, TunnelKind
from meshnet.model.snapshot import Snapshot

R = TypeVar("R", bound=Resource)
Key = tuple[str, str]
"""Namespace and name."""


def read_mesh(files: Iterable[tuple[str, str]], version: int) -> Snapshot:
    """The mesh that files (name, text) of YAML describe. Raises ConfigError: every problem, with its own line."""
    documents: list[Document] = []
    errors: list[ConfigError] = []
    for file, text in files:
        try:
            documents += parse_documents(text, file)
        except ConfigError as error:
            errors.append(error)
    if errors:
        raise in_one(errors)
    return _build([_Entry(each.resource, each.file, each.line) for each in documents], version)


def build_snapshot(resources: Sequence[Located], version: int) -> Snapshot:
    """The mesh that resources describe. Raises ConfigError: every problem, with the line its resource begins at.

    Services are sorted by namespace, name and port; of two that share an endpoint the first has it in `by_endpoint`.
    An endpoint of weight 0 is drained: it stays known and takes no new connections. `services` of an access policy
    comes out as `namespace/name`, whatever it was written as.
    """
    return _build([_Entry(resource, file, partial(_same_line, line)) for resource, file, line in resources], version)


@dataclass(slots=True)
class _Entry(Generic[R]):
    resource: R
    file: str
    line: Callable[[Path], int]
    fields: Fields = field(default_factory=Fields)

    @property
    def key(self) -> Key:
        return self.resource.metadata.namespace, self.resource.metadata.name

    def __str__(self) -> str:
        return f"{type(self.resource).__name__} {_full_name(self.key)}"

    def at(self, path: Path = ()) -> str:
        """What and where it is, for the problems of others."""
        line = self.line(path)
        return f"{self} ({self.file}:{line})" if line else f"{self} ({self.file})"

    def errors(self) -> list[ConfigError]:
        return [
            ConfigError(
                f"{self}{', ' * bool(problem.path)}{in_words(problem.path)}: {problem.text}",
                file=self.file,
                line=self.line(problem.path),
                suggestion=problem.suggestion,
            )
            for problem in self.fields.problems
        ]


def _build(entries: list[_Entry[AnyResource]], version: int) -> Snapshot:
    _check_names(entries)
    config = _mesh_config(entries)
    services = {entry.key: entry for entry in _of(entries, Service)}
    treatment = _treatment(entries, services)
    ports = [port for key, entry in services.items() for port in _ports(entry, config, treatment.get(key, Traffic()))]
    by_address = _by_address(services, ports)
    policies = [
        access_policy(
            _full_name(entry.key),
            entry.resource.spec,
            [f"{namespace}/{name}" for _, (namespace, name) in _resolved(entry, services)],
            entry.fields,
        )
        for entry in _of(entries, AccessPolicy)
    ]
    errors = [error for entry in entries for error in entry.errors()]
    if errors:
        raise in_one(errors)
    by_endpoint: dict[Address, tuple[ServicePort, Endpoint]] = {}
    for port in ports:
        for endpoint in port.endpoints:
            by_endpoint.setdefault(endpoint.address, (port, endpoint))
    return Snapshot(
        version=version,
        services=tuple(ports),
        policies=tuple(policies),
        trust_domain=config.trust_domain,
        mode=config.mode,
        default_action=config.default_action,
        by_address=by_address,
        by_endpoint=by_endpoint,
    )


def _check_names(entries: list[_Entry[AnyResource]]) -> None:
    seen: dict[tuple[type, Key], _Entry[AnyResource]] = {}
    for entry in entries:
        namespace, name = entry.key
        entry.fields.name(("metadata", "name"), name)
        entry.fields.name(("metadata", "namespace"), namespace)
        first = seen.setdefault((type(entry.resource), entry.key), entry)
        if first is not entry:
            entry.fields.wrong((), f"there is already a {first.at()}", "rename or remove one of them")


def _mesh_config(entries: list[_Entry[AnyResource]]) -> MeshConfigSpec:
    configs = _of(entries, MeshConfig)
    for entry in configs[1:]:
        if entry.key != configs[0].key:
            entry.fields.wrong((), f"there is already a {configs[0].at()}", "a mesh has one MeshConfig")
    spec = configs[0].resource.spec if configs else MeshConfigSpec()
    if spec.trust_domain and not is_spiffe_id(f"spiffe://{spec.trust_domain}/x"):
        text = f"{quoted(spec.trust_domain)} is not a trust domain: use a-z, 0-9, ., _ and -"
        configs[0].fields.wrong(("spec", "trustDomain"), text)
    return spec


def _treatment(entries: list[_Entry[AnyResource]], services: dict[Key, _Entry[Service]]) -> dict[Key, Traffic]:
    """What the traffic policies say of each service they name; a service has one policy at most."""
    treatment: dict[Key, Traffic] = {}
    owners: dict[Key, _Entry[TrafficPolicy]] = {}
    for entry in _of(entries, TrafficPolicy):
        said = traffic(entry.resource.spec, entry.fields)
        if not entry.resource.spec.services:
            entry.fields.wrong(("spec", "services"), "a traffic policy names at least one service")
        for index, key in _resolved(entry, services):
            owner = owners.setdefault(key, entry)
            if owner is not entry:
                text = f"{services[key]} is already treated by {owner.at()}"
                entry.fields.wrong(("spec", "services", index), text, "name it in one policy only")
            treatment[key] = said
    return treatment


def _resolved(
    entry: _Entry[TrafficPolicy] | _Entry[AccessPolicy], services: dict[Key, _Entry[Service]]
) -> list[tuple[int, Key]]:
    """The services a policy names, with their places in its list; a bare name is of the policy's own namespace."""
    found: list[tuple[int, Key]] = []
    own, _ = entry.key
    for index, text in enumerate(entry.resource.spec.services):
        namespace, slash, name = text.partition("/")
        key = (namespace, name) if slash else (own, text)
        if key in services:
            found.append((index, key))
        else:
            known = [other if where == own and not slash else f"{where}/{other}" for where, other in services]
            elsewhere = next((f"{where}/{other}" for where, other in services if other == text), "")
            hint = f"did you mean {quoted(elsewhere)}?" if elsewhere else did_you_mean(text, known)
            where = "" if slash else f" in namespace {own}"
            entry.fields.wrong(("spec", "services", index), f"there is no service {quoted(text)}{where}", hint)
    return found


def _ports(entry: _Entry[Service], config: MeshConfigSpec, treated: Traffic) -> list[ServicePort]:
    """The ports of a service, each with all of its endpoints."""
    spec, fields = entry.resource.spec, entry.fields
    endpoints = _endpoints(entry)
    if not spec.ports:
        fields.wrong(("spec", "ports"), "a service has at least one port")
    ports: dict[int, ServicePort] = {}
    for index, each in enumerate(spec.ports):
        at = ("spec", "ports", index)
        fields.port((*at, "port"), each.port)
        if each.target_port:
            fields.port((*at, "targetPort"), each.target_port)
        if each.port in ports:
            fields.wrong((*at, "port"), f"the port {each.port} is given twice")
        ports[each.port] = ServicePort(
            service=entry.resource.metadata.name,
            namespace=entry.resource.metadata.namespace,
            port=each.port,
            mode=each.mode or config.mode,
            endpoints=tuple(
                Endpoint(address=Address(host, each.target_port or each.port), **_treated(endpoint))
                for host, endpoint in endpoints.items()
                if not is_dns_name(host)
            ),
            traffic=treated,
            named=tuple(
                NamedEndpoint(dns_name=host, port=each.target_port or each.port, **_treated(endpoint))
                for host, endpoint in endpoints.items()
                if is_dns_name(host)
            ),
        )
    return [ports[port] for port in sorted(ports)]


def _endpoints(entry: _Entry[Service]) -> dict[str, EndpointSpec]:
    """By canonical address or DNS name; the same endpoint given twice is one endpoint."""
    fields = entry.fields
    endpoints: dict[str, EndpointSpec] = {}
    for index, each in enumerate(entry.resource.spec.endpoints):
        at = ("spec", "endpoints", index)
        host = fields.host_or_name((*at, "address"), each.address)
        fields.port((*at, "tunnelPort"), each.tunnel_port)
        fields.number((*at, "weight"), each.weight, 0, 1_000_000)
        meshed = each.tunnel is not TunnelKind.NONE
        if each.identity:
            fields.identity((*at, "identity"), each.identity)
        if meshed and not each.identity:
            fields.wrong(at, "a meshed endpoint needs an identity", "add identity: spiffe://...")
        if each.identity and not meshed:
            text = "a plain endpoint proves no identity"
            fields.wrong((*at, "identity"), text, "add tunnel: meshnet, or remove the identity")
        first = endpoints.setdefault(host, each)
        if structs.replace(first, address="") != structs.replace(each, address=""):
            fields.wrong(at, f"the endpoint {quoted(host)} is given twice, and not the same")
    return endpoints


def _treated(endpoint: EndpointSpec) -> dict[str, Any]:
    """What holds for an endpoint, wherever it is."""
    same = {name: getattr(endpoint, name) for name in ("tunnel", "tunnel_port", "identity", "weight")}
    placed = Locality(zone=endpoint.zone, region=endpoint.region) if endpoint.zone or endpoint.region else NOWHERE
    return same | {"locality": placed}


def _by_address(services: dict[Key, _Entry[Service]], ports: list[ServicePort]) -> dict[Address, ServicePort]:
    by_address: dict[Address, ServicePort] = {}
    owners: dict[Address, tuple[_Entry[Service], Path]] = {}
    hosts = {
        key: [
            (("spec", "addresses", index), entry.fields.host(("spec", "addresses", index), text))
            for index, text in enumerate(entry.resource.spec.addresses)
        ]
        for key, entry in services.items()
    }
    for port in ports:
        entry = services[port.namespace, port.service]
        for at, host in hosts[entry.key]:
            address = Address(host, port.port)
            by_address[address] = port
            owner, owner_at = owners.setdefault(address, (entry, at))
            if owner is not entry:
                text = f"{address} is already an address of {owner.at(owner_at)}"
                entry.fields.wrong(at, text, "give one of them another address or port")
    return by_address


def _of(entries: list[_Entry[AnyResource]], kind: type[R]) -> list[_Entry[R]]:
    """The entries of one kind, sorted by namespace and name."""
    found: list[_Entry[R]] = [
        _Entry(entry.resource, entry.file, entry.line, entry.fields)
        for entry in entries
        if isinstance(entry.resource, kind)
    ]
    return sorted(found, key=lambda each: each.key)


def _same_line(line: int, _: Path) -> int:
    return line


def _full_name(key: Key) -> str:
    namespace, name = key
    return name if namespace == "default" else f"{namespace}/{name}"
