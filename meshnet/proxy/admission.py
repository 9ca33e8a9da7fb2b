"""Whether a call may reach an application of this host; asked before the application is dialled."""

import functools
import ipaddress
from typing import Protocol

from meshnet.decide.access import Call
from meshnet.errors import ConnectionFailed, Phase, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Direction
from meshnet.model.service import Mode
from meshnet.proxy.state import ProxyState


class Asked(Protocol):
    """Of a record, what is asked and what is noted."""

    @property
    def direction(self) -> Direction: ...

    @property
    def source(self) -> Address: ...

    phase: Phase
    service: str
    call: Call | None
    policy: str


def admit(identity: str, target: Address, record: Asked, state: ProxyState, *, tunnelled: bool) -> None:
    """Raises ConnectionFailed: loop, not_local, authn.*, authz.denied.

    The call is put on the record first: a policy change that races this check finds it there and asks again.
    """
    state.need_mesh()
    if not state.is_local(target.host):
        raise ConnectionFailed(Reason.NOT_LOCAL, f"{target.host} is not an address of this host")
    if target.port in state.own_ports:
        raise ConnectionFailed(Reason.LOOP, f"{target} is this sidecar itself")
    if record.direction is Direction.INBOUND and _is_for_this_host_alone(target.host):
        raise ConnectionFailed(Reason.NOT_LOCAL, f"{target.host} is not an address that other hosts reach")
    record.phase = Phase.AUTHZ
    service = state.service_at(target)
    if service is not None:
        record.service = service.name
    mode = state.mode_of(service)
    if mode is Mode.STRICT and not tunnelled:
        raise ConnectionFailed(Reason.AUTHN_PLAINTEXT, f"port {target.port} takes no plain text (mode strict)")
    if mode is Mode.DISABLE and tunnelled and record.direction is Direction.INBOUND:  # a hairpin is no tunnel
        raise ConnectionFailed(Reason.AUTHN_DISABLED, f"port {target.port} takes no tunnels (mode disable)")
    record.call = Call(
        identity=identity,
        address=record.source.host,
        port=target.port,
        service=service.service if service else "",
        namespace=service.namespace if service else "",
    )
    record.policy = state.check(record.call)


@functools.lru_cache(maxsize=1024)  # asked for every connection, of few addresses
def _is_for_this_host_alone(host: str) -> bool:
    """What listens on the loopback is no endpoint, though a peer may ask for it; nor is "any address"."""
    address = ipaddress.ip_address(host)
    return address.is_loopback or address.is_unspecified
