"""The last good mesh on disk: what a sidecar starts with when the files are bad, so that a restart loses nothing."""

from pathlib import Path

import msgspec

from meshnet.model.address import Address
from meshnet.model.service import AccessPolicy, Action, Endpoint, Mode, ServicePort
from meshnet.model.snapshot import Snapshot
from meshnet.net.files import write_files


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot as JSON can hold it: its indexes as lists of pairs, a service by its place among `services`."""

    services: tuple[ServicePort, ...]
    policies: tuple[AccessPolicy, ...]
    trust_domain: str
    mode: Mode
    default_action: Action
    by_address: tuple[tuple[Address, int], ...]
    by_endpoint: tuple[tuple[Address, int, Endpoint], ...]


def save(snapshot: Snapshot, file: str) -> None:
    """Replaces the file in one step; only its owner may read it. Raises OSError."""
    places = {service.name: place for place, service in enumerate(snapshot.services)}
    stored = Stored(
        services=snapshot.services,
        policies=snapshot.policies,
        trust_domain=snapshot.trust_domain,
        mode=snapshot.mode,
        default_action=snapshot.default_action,
        by_address=tuple((address, places[service.name]) for address, service in snapshot.by_address.items()),
        by_endpoint=tuple(
            (address, places[service.name], endpoint) for address, (service, endpoint) in snapshot.by_endpoint.items()
        ),
    )
    where = Path(file)
    write_files(where.parent, {where.name: msgspec.json.encode(stored)})


def load(file: str, version: int) -> Snapshot | None:
    """What `save` wrote, or None if there is nothing, or nothing of this version of meshnet."""
    try:
        stored = msgspec.json.decode(Path(file).read_bytes(), type=Stored)
        return Snapshot(
            version=version,
            services=stored.services,
            policies=stored.policies,
            trust_domain=stored.trust_domain,
            mode=stored.mode,
            default_action=stored.default_action,
            by_address={address: stored.services[place] for address, place in stored.by_address},
            by_endpoint={
                address: (stored.services[place], endpoint) for address, place, endpoint in stored.by_endpoint
            },
        )
    except (OSError, msgspec.DecodeError, IndexError):
        return None
