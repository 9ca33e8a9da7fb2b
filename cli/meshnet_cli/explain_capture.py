"""`meshnet explain HOST:PORT`: whether a connection would be captured, by which rule, or why not.

The kernel's own rules are asked, not the plan: those that are there, ours and others'.
"""

import socket
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import click
import msgspec

from meshnet.errors import CommandError
from meshnet.model.address import Address, canonical_host
from meshnet.model.admin import Candidate, ExplainRoute, RouteView
from meshnet_cli.client import ask
from meshnet_cli.output import print_json, print_json_line, printable

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
    api_version: str = "meshnet.dev/v1"
    kind: str = "CaptureExplanation"


def explain_capture(source: str, target: str, output: str, socket_path: str, timeout: float) -> None:
    """Prints it. Raises CommandError: code 2 for what is no address, 5 without the right to read rules."""
    found = _explained(source, target)
    if found.direction == "outbound":
        found = _routed(found, socket_path, timeout)
    if output in {"json", "jsonl"}:
        (print_json if output == "json" else print_json_line)(found)
        return
    click.echo("\n".join(map(printable, _lines(found))))


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


def _routed(found: CaptureExplanation, socket_path: str, timeout: float) -> CaptureExplanation:
    try:
        route = ask(socket_path, ExplainRoute(target=found.target), RouteView, timeout=timeout)
    except CommandError as error:
        note = f"the sidecar does not say where it would go: {error.what}"
        return msgspec.structs.replace(found, notes=(*found.notes, note))
    return msgspec.structs.replace(found, route=route)


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
    try:
        return canonical_host(text.strip("[]"))
    except ValueError:
        pass
    try:
        return canonical_host(str(socket.getaddrinfo(text, None, type=socket.SOCK_STREAM)[0][4][0]))
    except (OSError, ValueError, IndexError, UnicodeError) as error:
        why = getattr(error, "strerror", "") or "no name like that is known"
        raise CommandError(f"{text!r} is no address", why=why, fix="write an IP address, or a name", code=2) from error


def _step(step: "Step", reasons: "Mapping[Rule, str]") -> RuleStep:
    from meshnet_init.backends import plain
    from meshnet_init.render import action, matches

    rule = step.counted.rule
    why = rule.why or reasons.get(plain(rule), "")
    return RuleStep(
        rule.chain, step.number, matches(rule) or "everything", action(rule), why, step.counted.packets, step.whom
    )


def _lines(it: CaptureExplanation) -> Iterator[str]:
    source = it.source or ("a program here" if it.direction == "outbound" else "elsewhere")
    yield f"{source} -> {it.target}  {it.direction}  {it.verdict}"
    yield ""
    for other in it.others:
        if other.ahead:
            yield f"first asked {_other(other)}"
    for step in it.unless:
        yield f"unless      {step.whom}: {_verdict(step)} by {_rule(step)}"
    if it.rule is not None:
        yield f"decides     {_rule(it.rule)}: {_verdict(it.rule)}, {it.rule.hits} hits"
    elif it.backend:
        yield "decides     no rule of ours is about it: left alone"
    for other in it.others:
        if not other.ahead:
            yield f"asked later {_other(other)}"
    if it.route is not None:
        yield from route_lines(it.route)
    for text in it.notes:
        yield f"note        {text}"
    for text in it.unread:
        yield f"not read    {text}"


def route_lines(route: RouteView) -> Iterator[str]:
    """Where a connection would go, and its endpoints, the best first."""
    count = len(route.candidates) + route.more
    among = f"{route.balance} among {count} endpoints" if route.route == "service" else route.route
    yield f"route       {': '.join(filter(None, (route.service and f'{route.service}, {among}', route.detail)))}"
    for place, each in enumerate(route.candidates):
        label = "endpoints" if not place else ""
        yield f"{label:<11} {each.endpoint}  {_candidate(each)}"
    if route.more:
        yield f"{'':<11} and {route.more} more"


def _candidate(each: Candidate) -> str:
    if each.why_not:
        return f"passed over: {each.why_not}"
    warming = f", {each.warmth:.0%} of it while it is warming" if each.warmth < 1 else ""
    parts = [
        "in plain TCP" if each.tunnel == "none" else f"by tunnel ({each.tunnel})",
        each.near and {"zone": "same zone", "region": "same region", "any": "far"}[each.near],
        f"weight {each.weight}{warming}",
        f"{each.connections} connections",
        "" if each.connect_ms is None else f"connects in {each.connect_ms:.1f} ms",
        f"score {each.score:.3g}",
    ]
    return ", ".join(filter(None, parts))


def _verdict(step: RuleStep) -> str:
    return "left alone" if step.action == "return" else f"captured ({step.action})"


def _rule(step: RuleStep) -> str:
    why = f" ({step.why})" if step.why else ""
    return f"rule {step.number} of {step.chain}{why}: {step.match}"


def _other(other: "Foreign") -> str:
    return f"table {other.table}, {other.chain}, priority {other.priority}: {other.text}"
