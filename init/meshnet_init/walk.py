"""A connection's way through our rules: the one that decides, and those ahead of it that decide for some only. Pure."""

import ipaddress
from collections.abc import Sequence

import msgspec

from meshnet_init.backends import Counted
from meshnet_init.rule import CHAIN_IN, Chain, Rule, arriving


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A new connection as our chains see it. `source` and `interface` are empty where they are not known.

    `local`: it goes to an address of this host. `loopback`: it goes by lo, as what a host sends to itself does.
    """

    chain: Chain
    target: str
    port: int
    source: str = ""
    interface: str = ""
    local: bool = False
    loopback: bool = False


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """The rule that is `number` (from 1) in its chain. `whom`: for whom alone it decides; empty: for all."""

    number: int
    counted: Counted
    whom: str = ""


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """`decides` is None where no rule does: then the connection is left alone."""

    decides: Step | None
    unless: tuple[Step, ...] = ()


def walk(rules: Sequence[Counted], call: Call, *, families_apart: bool = False) -> Way:
    """The way of `call` through what the kernel holds; `families_apart`: each family has chains of its own."""
    family = f"ipv{ipaddress.ip_address(call.target).version}"
    name = chain_of(rules, call)
    chain = [counted for counted in rules if counted.rule.chain == name]
    if families_apart:
        chain = [counted for counted in chain if counted.rule.family == family]
    unless: list[Step] = []
    for number, counted in enumerate(chain, 1):
        rule = counted.rule
        if rule.family not in ("any", family) or not _may_match(rule, call):
            continue
        whom = " and ".join(_conditions(rule, call))
        step = Step(number=number, counted=counted, whom=whom)
        if not whom:
            return Way(decides=step, unless=tuple(unless))
        unless.append(step)
    return Way(decides=None, unless=tuple(unless))


def chain_of(rules: Sequence[Counted], call: Call) -> Chain:
    """The chain that decides: what comes in for this host may be given to a transparent listener before nat."""
    given = call.chain == CHAIN_IN and call.local and any(counted.rule.tproxy for counted in rules)
    return "MESHNET_MARK_IN" if given else call.chain


def _may_match(rule: Rule, call: Call) -> bool:
    return (
        not (rule.established or rule.invalid or rule.udp or rule.verdict in ("save", "restore"))
        and (not rule.loopback or call.loopback)
        and (rule.local is None or rule.local == call.local)
        and (rule.ports is None or call.port in rule.ports)
        and (not rule.destination or _is_in(call.target, rule.destination))
        and (not rule.source or not call.source or _is_in(call.source, rule.source))
        and (not rule.interface or not call.interface or _is_named(call.interface, rule.interface))
    )


def _conditions(rule: Rule, call: Call) -> list[str]:
    """What a destination alone does not tell."""
    found = []
    if rule.mark:
        found.append(f"packets with the mark {rule.mark:#x}")
    if rule.uid is not None:
        found.append(f"processes of uid {rule.uid}")
    if rule.gid is not None:
        found.append(f"processes of gid {rule.gid}")
    if rule.cgroup:
        found.append(f"processes of cgroup {rule.cgroup}")
    if rule.source and not call.source:
        found.append(f"clients in {rule.source}")
    if rule.interface and not call.interface:
        found.append(f"what {'comes in by' if arriving(rule.chain) else 'leaves by'} {rule.interface}")
    return found


def _is_in(host: str, cidr: str) -> bool:
    return ipaddress.ip_address(host) in ipaddress.ip_network(cidr)


def _is_named(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
