"""The whole mesh as one proxy sees it."""

import msgspec

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
