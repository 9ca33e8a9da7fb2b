"""Whether rules and the sidecar that runs fit together: settings may have changed under one of them. Pure."""

import ipaddress
import re
from collections.abc import Collection, Iterator

from meshnet.model.admin import Status
from meshnet.model.canary import FAMILIES, INBOUND_CANARY
from meshnet_init.rule import CHAIN_IN, CHAIN_OUT, Chain, Routing, Rule, is_for_canary

ARRIVING: tuple[Chain, ...] = ("MESHNET_MARK_IN", CHAIN_IN)
"""Where a connection from elsewhere is turned to the inbound proxy."""


def misfits(rules: Collection[Rule], routing: Routing | None, sidecar: Status) -> tuple[str, ...]:
    """What does not fit, in words; empty when all does. Rules that turn nothing to a sidecar fit any."""
    return (
        *_redirects(rules, sidecar),
        *_ways_in(rules, routing, sidecar),
        *_own_ports(rules, sidecar),
        *_readiness(rules, sidecar),
        *_own_connections(rules, sidecar),
    )


def _ways_in(rules: Collection[Rule], routing: Routing | None, sidecar: Status) -> Iterator[str]:
    """What a sidecar decides when it opens its listeners, or for each connection."""
    given = any(rule.tproxy for rule in rules)
    turned = any(turns_inbound(rule) for rule in rules)
    if turned and sidecar.inbound_mode and given != (sidecar.inbound_mode == "tproxy"):
        how = "by TPROXY" if given else "by a redirect"
        yield f"the rules bring inbound connections {how}, the sidecar takes them as {sidecar.inbound_mode}"
    if any(turned_to(rule) for rule in rules) and sidecar.original_source not in (None, routing is not None):
        does = "dials" if sidecar.original_source else "does not dial"
        there = "there" if routing else "not there"
        yield f"the sidecar {does} in its clients' names, and routes for the answers are {there}"
    outbound = sidecar.listeners.get("outbound", "")
    passing = any(_passes_through(rule) for rule in rules)
    if passing and outbound and not re.search(r"(^|, )(0\.0\.0\.0|\[::\]):", outbound):
        yield f"the rules turn what passes through to the outbound proxy, which listens at {outbound} only"


def turned_to(rule: Rule) -> int:
    """The port of a proxy that the rule turns connections to, the sidecar's own canaries aside; else 0."""
    return 0 if is_for_canary(rule) else rule.redirect or rule.tproxy


def _redirects(rules: Collection[Rule], sidecar: Status) -> Iterator[str]:
    outbound = {rule.redirect for rule in rules if rule.chain == CHAIN_OUT or _passes_through(rule)}
    inbound = {turns_inbound(rule) for rule in rules}
    for name, ports in (("outbound", outbound), ("inbound", inbound)):
        taken = sidecar.listeners.get(name, "")
        for port in sorted(ports - {0} - _ports(taken)):
            yield f"the rules turn {name} connections to port {port}, the sidecar takes them at {taken or 'no port'}"


def _own_ports(rules: Collection[Rule], sidecar: Status) -> Iterator[str]:
    for name in ("tunnel", "health", "probes"):
        for port in sorted(_ports(sidecar.listeners.get(name, ""))):
            if any(captured_inbound(rules, port, source) for source in INBOUND_CANARY.values()):
                yield f"the rules capture what comes in for port {port}, which is the sidecar's own ({name})"


def _readiness(rules: Collection[Rule], sidecar: Status) -> Iterator[str]:
    """Who comes by a rule for what goes to this host itself asks for readiness: of all others it is known."""
    answered = sidecar.readiness_port
    if answered is None or not any(turned_to(rule) for rule in rules):
        return
    asked = {rule.ports.first for rule in rules if rule.local and rule.ports and turns_inbound(rule)}
    for port in sorted(asked - {answered}):
        yield f"by the rules readiness is asked for at port {port}, the sidecar answers at {answered or 'no port'}"
    if answered and not captured_from_anywhere(rules, answered):
        yield f"the sidecar answers for readiness at port {answered}, from where the rules bring nobody"


def _own_connections(rules: Collection[Rule], sidecar: Status) -> Iterator[str]:
    """A sidecar that the rules do not know captures each connection it makes, which makes it connect again."""
    outbound = [rule for rule in rules if rule.chain == CHAIN_OUT]
    if sidecar.mark is None or not any(rule.redirect for rule in outbound if not is_for_canary(rule)):
        return
    marks = {rule.mark for rule in outbound if rule.mark}
    by_group = sidecar.gid is not None and sidecar.gid in {rule.gid for rule in outbound}
    if sidecar.mark in marks or (not sidecar.mark and by_group):
        return
    passing = ", ".join(f"{mark:#x}" for mark in sorted(marks)) or "none"
    marked = f"marks its own connections {sidecar.mark:#x}" if sidecar.mark else "may not mark its own connections"
    so = (
        f"only its group {sidecar.gid} keeps them from being captured"
        if by_group
        else "it captures them itself, again and again, until it runs out of descriptors"
    )
    yield f"the rules let connections with mark {passing} pass, but the sidecar {marked}: {so}"


def captured_inbound(rules: Collection[Rule], port: int, source: str) -> bool:
    """Whether one from the IP address `source` to this host's `port` would be, by an interface that no rule names."""
    return any(_taken([rule for rule in rules if rule.chain == chain], port, source) for chain in ARRIVING)


def captured_from_anywhere(rules: Collection[Rule], port: int) -> bool:
    """Whether somebody's connection to this host's `port` would be, whoever calls and by whatever interface."""
    return any(
        _taken_of_somebody([rule for rule in rules if rule.chain == chain and rule.family in ("any", family)], port)
        for chain in ARRIVING
        for family in FAMILIES
    )


def turns_inbound(rule: Rule) -> int:
    """The port of the inbound proxy, where the rule turns arriving connections to it; else 0."""
    return (rule.redirect or rule.tproxy) if rule.chain in ARRIVING and rule.local is not False else 0


def _passes_through(rule: Rule) -> bool:
    """Whether it turns connections that are for others to the outbound proxy."""
    return bool(rule.redirect) and rule.chain == CHAIN_IN and rule.local is False


def _taken(chain: Collection[Rule], port: int, source: str) -> bool:
    address = ipaddress.ip_address(source)
    for rule in chain:
        if rule.family not in ("any", f"ipv{address.version}"):
            continue
        if rule.loopback or rule.interface or rule.mark or rule.local is False or rule.established or rule.invalid:
            continue
        if rule.source and address not in ipaddress.ip_network(rule.source):
            continue
        if rule.ports is None or port in rule.ports:
            return bool(rule.redirect or rule.tproxy)
    return False


def _taken_of_somebody(chain: Collection[Rule], port: int) -> bool:
    for rule in chain:
        if rule.loopback or rule.mark or rule.local is False or rule.established or rule.invalid:
            continue
        if rule.ports is not None and port not in rule.ports:
            continue
        if rule.redirect or rule.tproxy:
            return True
        if not (rule.source or rule.interface):  # which would let pass only some
            return False
    return False


def _ports(addresses: str) -> set[int]:
    """Of a status's listeners: `127.0.0.1:15101, [::1]:15101`."""
    return {int(address.rpartition(":")[2]) for address in addresses.split(", ") if address}
