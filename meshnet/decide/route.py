"""Where a captured connection goes, told by nothing but the address it was meant for."""

from dataclasses import dataclass

from meshnet.errors import Reason
from meshnet.model.address import Address
from meshnet.model.service import Endpoint, ServicePort
from meshnet.model.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class ToService:
    """To an endpoint of `service`. `pinned`: the client named this endpoint itself and must not get another."""

    service: ServicePort
    pinned: Endpoint | None = None


@dataclass(frozen=True, slots=True)
class Passthrough:
    """Not in the mesh: dial the original destination, in plain text."""


@dataclass(frozen=True, slots=True)
class Refuse:
    reason: Reason
    detail: str


Route = ToService | Passthrough | Refuse


def route(snapshot: Snapshot, destination: Address, own_ports: frozenset[int], is_local: bool) -> Route:
    """`is_local`: `destination` is an address of this host. A service's address wins over an endpoint's own."""
    if is_local and destination.port in own_ports:
        return Refuse(Reason.LOOP, f"{destination} is this sidecar itself")
    if (service := snapshot.by_address.get(destination)) is not None:
        return ToService(service)
    if (found := snapshot.by_endpoint.get(destination)) is not None:
        return ToService(*found)
    return _PASSTHROUGH


_PASSTHROUGH = Passthrough()
