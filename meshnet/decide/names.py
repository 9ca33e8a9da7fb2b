"""Endpoints by DNS name: what a mesh is with the addresses that its names have, and when to ask for them again.

What was known stays, whatever goes wrong: a server that does not answer, and also one that says there is no such name,
which a broken one says as well. Only other addresses take the place of addresses.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from msgspec import structs

from meshnet.decide import Dice
from meshnet.model.address import Address, canonical_host
from meshnet.model.service import Endpoint, NamedEndpoint, ServicePort, TunnelKind
from meshnet.model.snapshot import Snapshot

Hosts = tuple[str, ...]
"""IP addresses in canonical text, sorted: servers give theirs in another order each time."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """What came of asking once. `ttl`: for how many seconds it holds. `problem`: why all or some of it is missing."""

    hosts: Hosts = ()
    ttl: float = 0.0
    problem: str = ""


def usable(found: Iterable[str]) -> Hosts:
    """Those that a connection can go to: 0.0.0.0 is how some servers say no, and a link-local one lacks its link."""
    hosts = {canonical_host(text.partition("%")[0]) for text in found}
    addresses = [(ipaddress.ip_address(host), host) for host in hosts]
    return tuple(
        sorted(
            host
            for address, host in addresses
            if not (address.is_unspecified or address.is_multicast or (address.version == 6 and address.is_link_local))
        )
    )


class KnownName:
    """What is known of one name. `problem` is why it could not be asked for the last time; empty if it could."""

    SHORTEST, LONGEST = 2.0, 300.0  # seconds between questions, whatever the TTL
    FIRST_RETRY, LONGEST_RETRY = 1.0, 60.0  # after a failure; each pause is twice as long as the one before
    JITTER = 0.1  # up to this share later, so that sidecars do not all ask at once

    __slots__ = ("_pause", "hosts", "problem")

    def __init__(self, hosts: Hosts = ()) -> None:
        """`hosts`: what was known of it before a restart."""
        self.hosts = hosts
        self.problem = ""
        self._pause = self.FIRST_RETRY

    def learned(self, lookup: Lookup, dice: Dice) -> float:
        """Takes it up. The seconds until the next question."""
        self.problem = lookup.problem
        if lookup.hosts and not (lookup.problem and self.hosts):
            self.hosts = lookup.hosts
        if lookup.problem:
            seconds, self._pause = self._pause, min(self._pause * 2, self.LONGEST_RETRY)
        else:
            seconds, self._pause = min(max(lookup.ttl, self.SHORTEST), self.LONGEST), self.FIRST_RETRY
        return seconds * (1 + self.JITTER * dice.random())


class NamedMesh:
    """A mesh as it was written. `names` are all that its endpoints are given by."""

    def __init__(self, snapshot: Snapshot) -> None:
        """`snapshot` may be one that `with_addresses` has made."""
        self._written = _without_addresses(snapshot)
        self._made: dict[int, ServicePort] = {}  # by id() of the service port as written
        self.names = frozenset(each.dns_name for port in snapshot.services for each in port.named)

    def with_addresses(self, known: Mapping[str, Hosts]) -> Snapshot:
        """The mesh with an endpoint for each address of its names; what stays the same is the same object."""
        if not self.names:
            return self._written
        for port in self._written.services:
            if port.named:
                endpoints = _endpoints(port, known)
                before = self._made.get(id(port))
                if before is None or before.endpoints != endpoints:
                    self._made[id(port)] = structs.replace(port, endpoints=endpoints)
        return self._written.with_ports(self._made)


def addresses_in(snapshot: Snapshot) -> dict[str, Hosts]:
    """What was known of its names when it was made."""
    found: dict[str, set[str]] = {}
    for port in snapshot.services:
        for endpoint in port.endpoints:
            if endpoint.dns_name:
                found.setdefault(endpoint.dns_name, set()).add(endpoint.address.host)
    return {name: tuple(sorted(hosts)) for name, hosts in found.items()}


def nameless(service: ServicePort) -> tuple[str, ...]:
    """The names of its endpoints of which no address is known."""
    if not service.named:
        return ()
    known = {endpoint.dns_name for endpoint in service.endpoints}
    return tuple(each.dns_name for each in service.named if each.dns_name not in known)


def _without_addresses(snapshot: Snapshot) -> Snapshot:
    made = {
        id(port): structs.replace(port, endpoints=tuple(each for each in port.endpoints if not each.dns_name))
        for port in snapshot.services
        if any(each.dns_name for each in port.endpoints)
    }
    return snapshot.with_ports(made) if made else snapshot


def _endpoints(port: ServicePort, known: Mapping[str, Hosts]) -> tuple[Endpoint, ...]:
    """Those that were written, and one for each address. Of two at one address the one that is in the mesh stays."""
    found = {endpoint.address: endpoint for endpoint in port.endpoints}
    for named in port.named:
        for host in known.get(named.dns_name, ()):
            endpoint = _endpoint(named, host)
            first = found.setdefault(endpoint.address, endpoint)
            if first.tunnel is TunnelKind.NONE and endpoint.tunnel is not TunnelKind.NONE:
                found[endpoint.address] = endpoint
    return tuple(found.values())


def _endpoint(named: NamedEndpoint, host: str) -> Endpoint:
    return Endpoint(
        address=Address(host, named.port),
        tunnel=named.tunnel,
        tunnel_port=named.tunnel_port,
        identity=named.identity,
        weight=named.weight,
        locality=named.locality,
        dns_name=named.dns_name,
    )
