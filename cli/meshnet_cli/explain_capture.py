"""`meshnet explain HOST:PORT`: whether a connection would be captured, by which rule, or why not.

The kernel's own rules are asked, not the plan: those that are there, ours and others'.
"""

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import msgspec

from meshnet.errors import CommandError
from meshnet.model.address import Address, canonical_host
from meshnet.model.admin import AdmissionView, ExplainAdmission, ExplainRoute, RouteView
from meshnet_cli.client import ask

if TYPE_CHECKING:  # these reach for the kernel: --help must not wait for that
    from meshnet_init.foreign import Foreign
    from meshnet_init.rule import Rule
    from meshnet_init.walk import Call, Step


class RuleStep(msgspec.Struct, frozen=True, rename="camel"):
    """`number` counts from 1 in the chain; `whom`: for whom alone the rule decides, empty: for all."""

    chain: str
    number: int
    match: str
    action: str
    why: str
    hits: int
    whom: str = ""


class CaptureExplanation(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """`rule` decides, but for those of `unless`, which are ahead of it. `others` are rules of other programs.

    `perhaps captured`: one of those is asked before ours, and may take the connection away.
    """

    target: str
    source: str
    direction: Literal["outbound", "inbound"]
    verdict: Literal["captured", "perhaps captured", "left alone", "no rules"]
    backend: str = ""
    rule: RuleStep | None = None
    unless: tuple[RuleStep, ...] = ()
    others: "tuple[Foreign, ...]" = ()
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    route: RouteView | None = None  # where it would go, if a sidecar runs and it leaves this host
    admission: AdmissionView | None = None  # whether it would be let in, if a sidecar runs and it comes here
    api_version: str = "meshnet.dev/v1"
    kind: str = "CaptureExplanation"


def explain_capture(source: str, target: str, socket_path: str, timeout: float) -> CaptureExplanation:
    """Raises CommandError: code 2 for what is no address, 5 without the right to read rules.

    `target` may be a service of the mesh with its port, as the sidecar's tables name it.
    """
    named = _service_route(target, socket_path, timeout)
    found = _explained(source, named.target if named else target)
    if found.direction == "outbound":
        return _to(target, named, found) if named else _routed(found, socket_path, timeout)
    return _admitted(found, socket_path, timeout) if found.source else found


def capturing_rule(source: str, target: str) -> RuleStep | None:
    """The rule that captures such a connection now. None: none does, or who asks may not read rules."""
    try:
        found = _explained(source, target)
    except CommandError:
        return None
    return found.rule if found.verdict in {"captured", "perhaps captured"} else None


def is_address(text: str) -> bool:
    try:
        return bool(canonical_host(text.strip("[]")))
    except ValueError:
        return False


def _explained(source: str, target: str) -> CaptureExplanation:
    from meshnet_cli.rules import reasons_of
    from meshnet_init.apply import installed_rules
    from meshnet_init.foreign import foreign_rules
    from meshnet_init.rule import CHAIN_IN
    from meshnet_init.walk import chain_of, walk

    address = _address(target)
    call, notes = _call(address, _host(source) if source else "")
    direction: Literal["outbound", "inbound"] = "inbound" if call.chain == CHAIN_IN else "outbound"
    installed = installed_rules()
    in_force = next((each for each in installed if not each.draining()), None)
    chain = chain_of(in_force.rules, call) if in_force else call.chain
    others, unread = foreign_rules(in_force.backend if in_force else "nft", chain, address.host, address.port)
    found = CaptureExplanation(
        target=str(address),
        source=call.source,
        direction=direction,
        verdict="no rules",
        others=others,
        unread=unread,
        notes=tuple(notes),
    )
    if in_force is None:
        why = "a drain set is in force: nothing new is captured" if installed else "sudo meshnet up puts them in"
        return msgspec.structs.replace(found, notes=(*notes, f"no rules of meshnet are in force; {why}"))
    for older in installed:
        if older.backend != in_force.backend and not older.draining():
            notes.append(f"rules of backend {older.backend} are in force as well: sudo meshnet init leaves one")
    way = walk(in_force.rules, call, families_apart=in_force.backend != "nft")
    reasons = reasons_of(None)
    taken = way.decides.counted.rule if way.decides is not None else None
    verdict: Literal["captured", "perhaps captured", "left alone"] = "left alone"
    if taken is not None and (taken.redirect or taken.tproxy):
        verdict = "perhaps captured" if any(other.ahead for other in others) else "captured"
    return msgspec.structs.replace(
        found,
        verdict=verdict,
        backend=in_force.backend,
        rule=_step(way.decides, reasons) if way.decides is not None else None,
        unless=tuple(_step(step, reasons) for step in way.unless),
        notes=tuple(notes),
    )


def _service_route(target: str, socket_path: str, timeout: float) -> RouteView | None:
    """To the address of the service that `target` names, if it names one. Raises CommandError if that has none."""
    if is_address(target.rpartition(":")[0]):
        return None
    try:
        route = ask(socket_path, ExplainRoute(target=target), RouteView, timeout=timeout)
    except CommandError:
        return None  # no sidecar runs, or it knows no such service: it may be a name in DNS
    if not is_address(route.target.rpartition(":")[0]):
        why = "its endpoints are reached by their own addresses alone"
        raise CommandError(f"{target} has no address", why=why, fix="meshnet endpoints lists them", code=2)
    return route


def _routed(found: CaptureExplanation, socket_path: str, timeout: float) -> CaptureExplanation:
    try:
        route = ask(socket_path, ExplainRoute(target=found.target), RouteView, timeout=timeout)
    except CommandError as error:
        return _noted(found, f"the sidecar does not say where it would go: {error.what}")
    return _to(found.target, route, found)


def _to(target: str, route: RouteView, found: CaptureExplanation) -> CaptureExplanation:
    return _noted(msgspec.structs.replace(found, route=route), f"whether it is let in there: meshnet ping {target}")


def _admitted(found: CaptureExplanation, socket_path: str, timeout: float) -> CaptureExplanation:
    try:
        asked = ExplainAdmission(source=found.source, target=found.target)
        return msgspec.structs.replace(found, admission=ask(socket_path, asked, AdmissionView, timeout=timeout))
    except CommandError as error:
        return _noted(found, f"the sidecar does not say whether it would be let in: {error.what}")


def _noted(found: CaptureExplanation, note: str) -> CaptureExplanation:
    return msgspec.structs.replace(found, notes=(*found.notes, note))


def _call(target: Address, source: str) -> "tuple[Call, list[str]]":
    """What the kernel would see of it, and what is to be said of that."""
    from meshnet.net.addresses import LocalAddresses
    from meshnet_init.rule import CHAIN_IN, CHAIN_OUT
    from meshnet_init.walk import Call

    host, port = target.host, target.port
    with LocalAddresses() as addresses:
        to_here, from_here = host in addresses, not source or source in addresses
    if to_here and source and from_here:
        return Call(chain=CHAIN_OUT, target=host, port=port, source=source, local=True, loopback=True), []
    if to_here:
        note = "called by this host itself it stays on lo, and is left alone unless capture.loopback_ports names it"
        return Call(chain=CHAIN_IN, target=host, port=port, source=source, local=True), [] if source else [note]
    if not from_here:
        note = "neither end is this host: it would only pass through"
        return Call(chain=CHAIN_IN, target=host, port=port, source=source), [note]
    interface = _leaves_by(host)
    notes = [] if interface else ["this host has no route there: nothing would leave"]
    return Call(chain=CHAIN_OUT, target=host, port=port, source=source, interface=interface), notes


def _leaves_by(host: str) -> str:
    """The interface, by the routing of a process without marks; empty without a route."""
    from pyroute2.iproute.linux import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    with IPRoute() as netlink:  # type: ignore[no-untyped-call]  # pyroute2 has types in part
        try:
            (route, *_) = netlink.route("get", dst=host)
            (link, *_) = netlink.get_links(route.get_attr("RTA_OIF"))
        except NetlinkError:
            return ""
        return str(link.get_attr("IFLA_IFNAME"))


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise CommandError(f"{text!r} is not HOST:PORT", fix="meshnet explain 10.0.0.1:80, or [fd00::1]:80", code=2)
    return Address(_host(host), int(port))


def _host(text: str) -> str:
    """An address, or the first that a name stands for."""
    if is_address(text):
        return canonical_host(text.strip("[]"))
    try:
        return canonical_host(str(socket.getaddrinfo(text, None, type=socket.SOCK_STREAM)[0][4][0]))
    except (OSError, ValueError, IndexError, UnicodeError) as error:
        why = getattr(error, "strerror", "") or "no name like that is known"
        fix = "write an IP address, a name, or a service with its port: meshnet endpoints lists them"
        raise CommandError(f"{text!r} is no address", why=why, fix=fix, code=2) from error


def _step(step: "Step", reasons: "Mapping[Rule, str]") -> RuleStep:
    from meshnet_init.backends import plain
    from meshnet_init.render import action, matches

    rule = step.counted.rule
    why = rule.why or reasons.get(plain(rule), "")
    return RuleStep(
        rule.chain, step.number, matches(rule) or "everything", action(rule), why, step.counted.packets, step.whom
    )
