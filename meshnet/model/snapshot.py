"""The whole mesh as one proxy sees it."""

from collections.abc import Iterable, Mapping

import msgspec
from msgspec import structs

from meshnet.model.address import Address
from meshnet.model.service import AccessPolicy, Action, Endpoint, Mode, ServicePort


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Immutable; a change makes a new one with a higher `version`.

    `by_address` maps a service address and port to its service; `by_endpoint` maps an endpoint's own address to
    the service port it serves, for clients that name an endpoint directly.
    """

    version: int
    services: tuple[ServicePort, ...] = ()
    policies: tuple[AccessPolicy, ...] = ()
    trust_domain: str = ""
    mode: Mode = Mode.PERMISSIVE
    default_action: Action = Action.ALLOW
    by_address: dict[Address, ServicePort] = {}
    by_endpoint: dict[Address, tuple[ServicePort, Endpoint]] = {}

    def with_ports(self, others: Mapping[int, ServicePort]) -> "Snapshot":
        """`others`: by id() of the port whose place each takes; a port is one object wherever a snapshot has it."""
        services = tuple(others.get(id(port), port) for port in self.services)
        by_address = {address: others.get(id(port), port) for address, port in self.by_address.items()}
        return structs.replace(self, services=services, by_address=by_address, by_endpoint=_by_endpoint(services))


def _by_endpoint(services: Iterable[ServicePort]) -> dict[Address, tuple[ServicePort, Endpoint]]:
    """What was written wins over what a name server says."""
    found: dict[Address, tuple[ServicePort, Endpoint]] = {}
    pairs = [(port, endpoint) for port in services for endpoint in port.endpoints]
    for port, endpoint in sorted(pairs, key=lambda pair: bool(pair[1].dns_name)):  # stable
        found.setdefault(endpoint.address, (port, endpoint))
    return found
