"""A snapshot as lines of JSON, none of them long: who writes or reads one never holds Python's lock for long."""

import itertools
from collections.abc import Iterable, Iterator

import msgspec
from msgspec import structs

from meshnet.model.address import Address
from meshnet.model.service import AccessPolicy, Action, Endpoint, Mode, ServicePort
from meshnet.model.snapshot import Snapshot

_ENDPOINTS_A_LINE = 256


class _Head(msgspec.Struct, frozen=True, gc=False, tag="mesh"):
    trust_domain: str
    mode: Mode
    default_action: Action


class _Policy(msgspec.Struct, frozen=True, gc=False, tag="policy"):
    policy: AccessPolicy


class _Port(msgspec.Struct, frozen=True, gc=False, tag="port"):
    """`service` has its first endpoints only; `addresses` are those at which it is called."""

    service: ServicePort
    addresses: tuple[Address, ...]


class _More(msgspec.Struct, frozen=True, gc=False, tag="endpoints"):
    """Of the service port before."""

    endpoints: tuple[Endpoint, ...]


def encode_snapshot(snapshot: Snapshot) -> Iterator[bytes]:
    """Its lines, without its version: the same for two that say the same."""
    encode = msgspec.json.Encoder().encode
    yield encode(_Head(snapshot.trust_domain, snapshot.mode, snapshot.default_action)) + b"\n"
    for policy in snapshot.policies:
        yield encode(_Policy(policy)) + b"\n"
    addresses: dict[str, list[Address]] = {}
    for address, service in snapshot.by_address.items():
        addresses.setdefault(service.name, []).append(address)
    for service in snapshot.services:
        rest = service.endpoints
        first = structs.replace(service, endpoints=rest[:_ENDPOINTS_A_LINE])
        yield encode(_Port(first, tuple(addresses.get(service.name, ())))) + b"\n"
        for start in range(_ENDPOINTS_A_LINE, len(rest), _ENDPOINTS_A_LINE):
            yield encode(_More(rest[start : start + _ENDPOINTS_A_LINE])) + b"\n"


def decode_snapshot(lines: Iterable[bytes], version: int) -> Snapshot:
    """Raises ValueError (msgspec.DecodeError among them) if they are not those of a snapshot."""
    read = map(msgspec.json.Decoder(_Head | _Policy | _Port | _More).decode, lines)
    head = next(read, None)
    if not isinstance(head, _Head):
        raise ValueError("does not begin like a snapshot")
    policies: list[AccessPolicy] = []
    services: list[ServicePort] = []
    by_address: dict[Address, ServicePort] = {}
    by_endpoint: dict[Address, tuple[ServicePort, Endpoint]] = {}
    for port, more in _with_what_follows(read, policies):
        service = structs.replace(port.service, endpoints=more) if more else port.service
        services.append(service)
        for address in port.addresses:
            by_address[address] = service
        for endpoint in service.endpoints:
            by_endpoint.setdefault(endpoint.address, (service, endpoint))
    return Snapshot(
        version=version,
        services=tuple(services),
        policies=tuple(policies),
        trust_domain=head.trust_domain,
        mode=head.mode,
        default_action=head.default_action,
        by_address=by_address,
        by_endpoint=by_endpoint,
    )


def _with_what_follows(
    read: Iterable[_Head | _Policy | _Port | _More], policies: list[AccessPolicy]
) -> Iterator[tuple[_Port, tuple[Endpoint, ...]]]:
    """Each port, with all of its endpoints if they are more than a line has. Policies go to `policies`."""
    port: _Port | None = None
    lines: list[tuple[Endpoint, ...]] = []
    for each in read:
        match each:
            case _Policy(policy=policy):
                policies.append(policy)
            case _Port():
                if port is not None:
                    yield port, tuple(itertools.chain(*lines)) if len(lines) > 1 else ()
                port, lines = each, [each.service.endpoints]
            case _More(endpoints=endpoints) if port is not None:
                lines.append(endpoints)
            case _:
                raise ValueError("not the order of a snapshot")
    if port is not None:
        yield port, tuple(itertools.chain(*lines)) if len(lines) > 1 else ()
