"""Who may call: access policies, compiled once per snapshot and asked once per connection.

Any DENY that matches wins. Else, if ALLOW policies are in force for the port, one of them must match. Else the default
of the mesh holds.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import msgspec

from meshnet.model.address import parse_network
from meshnet.model.service import AccessPolicy, Action, Rule, Source, Target

DEFAULT_ALLOW = "default-allow"
DEFAULT_DENY = "default-deny"
NO_ALLOW_MATCHED = "no ALLOW policy matched"


@dataclass(frozen=True, slots=True)
class Call:
    """What is known of a call before any byte of it: `identity` is "" for plain text, `service` "" if unknown.

    `address` is the source IP, `port` the application's.
    """

    identity: str
    address: str
    port: int
    service: str = ""
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class Allow:
    """`by` names the policy, or is DEFAULT_ALLOW."""

    by: str


@dataclass(frozen=True, slots=True)
class Deny:
    """`by` names the policy, or is DEFAULT_DENY or NO_ALLOW_MATCHED."""

    by: str


class AccessRules:
    """The policies of one snapshot. Raises ValueError at once if an IP block is not one."""

    def __init__(self, policies: Sequence[AccessPolicy], default: Action) -> None:
        self._without_allow: Allow | Deny = Allow(DEFAULT_ALLOW) if default is Action.ALLOW else Deny(DEFAULT_DENY)
        compiled = [(policy, _compile(policy)) for policy in policies]
        everywhere = [place for place, policy in enumerate(policies) if not policy.services]
        naming: dict[str, list[int]] = {}
        for place, policy in enumerate(policies):
            for name in policy.services:
                naming.setdefault(name, []).append(place)
        self._everywhere = _InForce.of([compiled[place] for place in everywhere])
        self._by_service: dict[str, _InForce] = {}
        for name, places in naming.items():
            by_bare_name = naming.get(name.rpartition("/")[2], [])
            self._by_service[name] = _InForce.of(
                [compiled[place] for place in sorted({*everywhere, *places, *by_bare_name})]
            )

    def decide(self, call: Call) -> Allow | Deny:
        """Raises ValueError if `call.address` is not an IP address and a policy asks for it."""
        in_force = (
            self._by_service.get(f"{call.namespace}/{call.service}")
            or self._by_service.get(call.service)
            or self._everywhere
        )
        caller = _number(ipaddress.ip_address(call.address)) if in_force.asks_for_ip else 0
        for denied, rules in in_force.deny:
            for rule in rules:
                if rule.matches(call, caller):
                    return denied
        for allowed, rules in in_force.allow:
            for rule in rules:
                if rule.matches(call, caller):
                    return allowed
        return _NO_ALLOW if in_force.allow else self._without_allow


_NO_ALLOW = Deny(NO_ALLOW_MATCHED)


@dataclass(frozen=True, slots=True)
class _InForce:
    """The policies that hold for one service, or for every port that no policy names; in the order given."""

    deny: tuple[tuple[Deny, tuple["_Rule", ...]], ...]
    allow: tuple[tuple[Allow, tuple["_Rule", ...]], ...]
    asks_for_ip: bool

    @classmethod
    def of(cls, compiled: Sequence[tuple[AccessPolicy, tuple["_Rule", ...]]]) -> Self:
        return cls(
            tuple((Deny(policy.name), rules) for policy, rules in compiled if policy.action is Action.DENY),
            tuple((Allow(policy.name), rules) for policy, rules in compiled if policy.action is Action.ALLOW),
            any(rule.ip_blocks or rule.not_ip_blocks for _, rules in compiled for rule in rules),
        )


@dataclass(frozen=True, slots=True)
class _Rule:
    """A rule that asks for something. None or empty: does not ask for that."""

    ports: frozenset[int]
    not_ports: frozenset[int]
    principals: "_Principals | None"
    not_principals: "_Principals | None"
    ip_blocks: "_IpBlocks | None"
    not_ip_blocks: "_IpBlocks | None"

    def matches(self, call: Call, caller: int) -> bool:
        """`caller` is the source address as `_number` writes it."""
        return (
            (not self.ports or call.port in self.ports)
            and call.port not in self.not_ports
            and (self.principals is None or self.principals.include(call.identity))
            and (self.not_principals is None or not self.not_principals.include(call.identity))
            and (self.ip_blocks is None or self.ip_blocks.include(caller))
            and (self.not_ip_blocks is None or not self.not_ip_blocks.include(caller))
        )


def _compile(policy: AccessPolicy) -> tuple[_Rule, ...]:
    return tuple(_rule(rule) for rule in policy.rules if not _matches_nobody(rule))


def _matches_nobody(rule: Rule) -> bool:
    """A rule with nothing in it, or with a `from` or a `to` with nothing in it: more likely a slip than "anybody"."""
    return rule == Rule() or rule.source == Source() or rule.target == Target()


def _rule(rule: Rule) -> _Rule:
    source = Source() if rule.source is msgspec.UNSET else rule.source
    target = Target() if rule.target is msgspec.UNSET else rule.target
    return _Rule(
        ports=frozenset(target.ports),
        not_ports=frozenset(target.not_ports),
        principals=_Principals.of(source.principals) if source.principals else None,
        not_principals=_Principals.of(source.not_principals) if source.not_principals else None,
        ip_blocks=_IpBlocks.of(source.ip_blocks) if source.ip_blocks else None,
        not_ip_blocks=_IpBlocks.of(source.not_ip_blocks) if source.not_ip_blocks else None,
    )


@dataclass(frozen=True, slots=True)
class _Principals:
    """Exact, `start*`, `*end`, or `*` for any identity at all. No identity is among none of them."""

    exact: frozenset[str]
    starts: tuple[str, ...]
    ends: tuple[str, ...]

    @classmethod
    def of(cls, patterns: Iterable[str]) -> Self:
        return cls(
            frozenset(pattern for pattern in patterns if "*" not in (pattern[:1], pattern[-1:])),
            tuple(pattern[:-1] for pattern in patterns if pattern.endswith("*")),
            tuple(pattern[1:] for pattern in patterns if pattern.startswith("*") and pattern != "*"),
        )

    def include(self, identity: str) -> bool:
        return identity != "" and (
            identity in self.exact or identity.startswith(self.starts) or identity.endswith(self.ends)
        )


@dataclass(frozen=True, slots=True)
class _IpBlocks:
    """Per length of the host part, the network parts: a look-up per length, however many blocks."""

    by_host_bits: tuple[tuple[int, frozenset[int]], ...]

    @classmethod
    def of(cls, blocks: Iterable[str]) -> Self:
        networks: dict[int, set[int]] = {}
        for network in map(parse_network, blocks):
            host_bits = network.max_prefixlen - network.prefixlen
            networks.setdefault(host_bits, set()).add(_number(network.network_address) >> host_bits)
        return cls(tuple((host_bits, frozenset(parts)) for host_bits, parts in networks.items()))

    def include(self, address: int) -> bool:
        for host_bits, networks in self.by_host_bits:  # noqa: SIM110 -- any() costs three times as much here
            if address >> host_bits in networks:
                return True
        return False


def _number(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> int:
    """Both families in one space of numbers: bit 128 says IPv4, so that `::/0` does not take in 10.0.0.1."""
    return int(address) | (1 << 128 if address.version == 4 else 0)
