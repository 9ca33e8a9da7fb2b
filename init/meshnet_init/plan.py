"""THE RULES THAT SETTINGS ASK FOR, in order, each with its reason. Pure.

MESHNET_IN sees what arrives, MESHNET_OUT what local processes send. A rule of theirs that matches either returns, which
leaves the connection to the host's other rules, or redirects. The other chains exist only where settings need them:
MESHNET_MARK_IN gives arriving connections to a transparent listener, and carries marks over with MESHNET_MARK_OUT;
MESHNET_HOLD queues what is about to be redirected until the sidecar has reached the endpoint; MESHNET_GUARD_IN, _OUT
and _FWD refuse what should have been redirected and was not, what the sidecar refuses, and UDP where it is not wanted.
"""

import ipaddress
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from meshnet.errors import ConfigError
from meshnet.model.address import Network
from meshnet.model.canary import FAMILIES, OWN_CANARY, PROOF_PORT
from meshnet.model.settings import Settings
from meshnet_init.rule import (
    CHAIN_IN,
    CHAIN_OUT,
    CHAINS,
    READINESS,
    Chain,
    Family,
    Plan,
    Routing,
    Rule,
    Verdict,
    is_for_canary,
)
from meshnet_init.values import (
    ALL_PORTS,
    ANYTHING,
    Ports,
    parse_cgroups,
    parse_ids,
    parse_interfaces,
    parse_networks,
    parse_ports,
)

_LARGEST_MARK = 2**32 - 1
_LARGEST_GID = 2**32 - 2  # the last value means "no group" to the kernel
_LARGEST_PLAN = 1000  # rules; what fits into one netlink transaction
_QUIC = Ports(443, 443)  # RFC 9114, 3.1
_IPV6_OFF = "IPv6 is not captured here"


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan depends on beside the settings. `uids` and `gids` are the runs of ids this user namespace maps.

    `accepts_marks`: tcp_fwmark_accept may be switched here.
    """

    ipv6: bool = True
    uids: tuple[range, ...] = (range(2**32 - 1),)
    gids: tuple[range, ...] = (range(2**32 - 1),)
    accepts_marks: bool = True


class _Owner(msgspec.Struct, frozen=True):
    """Whose connections; everybody's, where nothing is set."""

    uid: int | None = None
    gid: int | None = None
    cgroup: str = ""


_EVERYBODY = _Owner()


def make_plan(settings: Settings, host: Host) -> Plan:
    """The plan these settings ask for. Raises ConfigError: what is wrong and what to write instead."""
    capture = settings.capture
    _check(settings)
    ipv6 = capture.ipv6 == "on" or (capture.ipv6 == "auto" and host.ipv6)
    every_inbound, every_outbound = list(_inbound(settings, ipv6)), list(_outbound(settings, host))
    inbound = every_inbound if ipv6 else _without_ipv6(every_inbound)
    outbound = every_outbound if ipv6 else _without_ipv6(every_outbound)

    rules = [*_carried(settings, host), *outbound]
    if capture.truthful_connect:
        rules += [*_held(settings, outbound), *_refused(settings)]
    if capture.inbound_mode == "tproxy":
        rules += [*_given_to_a_listener(settings, inbound), *_rerouting(inbound)]
    else:
        rules += inbound
        if capture.drop_invalid:
            rules += _without_invalid(inbound)
    udp = list(_udp(settings, host))
    guarded = (every_inbound, every_outbound) if capture.ipv6 == "reject" else (inbound, outbound)
    rules += [*_guards(settings, *guarded, ahead_of_udp=bool(udp)), *udp]
    plan = Plan(
        rules=tuple(sorted(rules, key=lambda rule: CHAINS.index(rule.chain))),
        ipv6=ipv6 or capture.ipv6 == "reject",
        routing=_routing(settings, host),
    )
    if len(plan.rules) > _LARGEST_PLAN:
        raise ConfigError(
            f"capture: {len(plan.rules)} rules are more than {_LARGEST_PLAN}",
            suggestion="join ports and CIDRs",
        )
    return plan


def _inbound(settings: Settings, ipv6: bool) -> Iterator[Rule]:
    proxy, capture = settings.proxy, settings.capture
    ports = parse_ports(capture.inbound_ports, "capture.inbound_ports")
    excluded = parse_ports(capture.exclude_inbound_ports, "capture.exclude_inbound_ports")
    sources = parse_networks(capture.exclude_inbound_cidrs, "capture.exclude_inbound_cidrs")
    named = tuple(name for name in capture.inbound_interfaces if name != ANYTHING)
    interfaces = parse_interfaces(named, "capture.inbound_interfaces")
    if named != capture.inbound_interfaces:
        interfaces = ("",)

    yield Rule(chain=CHAIN_IN, loopback=True, why="came from this host itself")
    yield Rule(chain=CHAIN_IN, mark=proxy.mark, why="made by the proxy")
    yield from _readiness(settings, ipv6)
    for port in sorted(settings.listening_ports()):
        yield Rule(chain=CHAIN_IN, ports=Ports(port, port), why="the sidecar's own port")
    yield from _rerouted(settings)
    for interface in parse_interfaces(capture.exclude_interfaces, "capture.exclude_interfaces"):
        yield Rule(chain=CHAIN_IN, interface=interface, why="capture.exclude_interfaces")
    for run in excluded:
        yield Rule(chain=CHAIN_IN, ports=run, why="capture.exclude_inbound_ports")
    for network in sources:
        family, cidr = _side(network)
        yield Rule(chain=CHAIN_IN, family=family, source=cidr, why="capture.exclude_inbound_cidrs")
    yield Rule(chain=CHAIN_IN, local=False, why="only passes through this host")
    for family, cidr in _sides(capture.inbound_cidrs, "capture.inbound_cidrs"):
        for interface in interfaces:
            for run in ports:
                yield Rule(
                    chain=CHAIN_IN,
                    family=family,
                    source=cidr,
                    interface=interface,
                    ports=_unless_all(run),
                    redirect=proxy.inbound_port,
                    why="to the inbound proxy",
                )


def _readiness(settings: Settings, ipv6: bool) -> Iterator[Rule]:
    """Ahead of all that is left alone: who asks for readiness comes by the rules, from wherever.

    Where settings leave IPv6 out the sidecar listens itself; a host without it nobody asks there.
    """
    if port := settings.capture.readiness_port:
        asked = Rule(chain=CHAIN_IN, local=True, ports=Ports(port, port), why=READINESS)
        yield msgspec.structs.replace(asked, family="any" if ipv6 else "ipv4", redirect=settings.proxy.inbound_port)
        if not ipv6:
            yield msgspec.structs.replace(asked, family="ipv6")


def _rerouted(settings: Settings) -> Iterator[Rule]:
    """What passes through from behind a bridge (containers, virtual machines) is sent like a local process's.

    What goes to this host itself comes in like anything else (istio#39775, istio#44996).
    """
    capture = settings.capture
    why = "capture.reroute_interfaces"
    for interface in parse_interfaces(capture.reroute_interfaces, why):
        for rule in (*_excluded_destinations(settings), *_to_the_outbound_proxy(settings, _EVERYBODY)):
            reason = f"{why}: {rule.why}" if rule.redirect else rule.why
            yield msgspec.structs.replace(rule, chain=CHAIN_IN, interface=interface, local=False, why=reason)


def _outbound(settings: Settings, host: Host) -> Iterator[Rule]:
    proxy, capture = settings.proxy, settings.capture
    # Ahead of all that lets the sidecar's connections pass: so it can prove by one of its own that rules are in force.
    for family in FAMILIES:
        yield Rule(
            chain=CHAIN_OUT,
            family=family,
            destination=str(ipaddress.ip_network(OWN_CANARY[family])),
            ports=Ports(PROOF_PORT, PROOF_PORT),
            redirect=proxy.outbound_port,
            why="the sidecar's own canary",
        )
    yield Rule(chain=CHAIN_OUT, mark=proxy.mark, why="made by the proxy")
    if _is_mapped(capture.gid, host.gids):
        yield Rule(chain=CHAIN_OUT, gid=capture.gid, why="made by the proxy's group")
    for setting, owner in _owners(settings, host, "exclude"):
        yield Rule(chain=CHAIN_OUT, uid=owner.uid, gid=owner.gid, cgroup=owner.cgroup, why=setting)
    for run in parse_ports(capture.loopback_ports, "capture.loopback_ports"):
        yield Rule(
            chain=CHAIN_OUT, loopback=True, ports=run, redirect=proxy.outbound_port, why="capture.loopback_ports"
        )
    yield Rule(chain=CHAIN_OUT, loopback=True, why="stays on this host")
    for interface in parse_interfaces(capture.exclude_interfaces, "capture.exclude_interfaces"):
        yield Rule(chain=CHAIN_OUT, interface=interface, why="capture.exclude_interfaces")
    yield Rule(chain=CHAIN_OUT, local=True, why="goes to this host's own address")
    yield from _excluded_destinations(settings)
    for owner in _sending(settings, host):
        yield from _to_the_outbound_proxy(settings, owner)


def _sending(settings: Settings, host: Host) -> list[_Owner]:
    """Whose connections are captured: everybody's unless some are named."""
    capture = settings.capture
    if not (capture.outbound_uids or capture.outbound_gids or capture.outbound_cgroups):
        return [_EVERYBODY]
    return [owner for _, owner in _owners(settings, host, "outbound")]


def _owners(settings: Settings, host: Host, which: str) -> Iterator[tuple[str, _Owner]]:
    """Of the settings capture.WHICH_uids, _gids and _cgroups. An id that is not mapped can be no process's here."""
    names = [f"{which}_{kind}" for kind in ("uids", "gids", "cgroups")]
    uids, gids, cgroups = ((f"capture.{name}", getattr(settings.capture, name)) for name in names)
    for uid in parse_ids(uids[1], uids[0]):
        if _is_mapped(uid, host.uids):
            yield uids[0], _Owner(uid=uid)
    for gid in parse_ids(gids[1], gids[0]):
        if _is_mapped(gid, host.gids):
            yield gids[0], _Owner(gid=gid)
    for cgroup in parse_cgroups(cgroups[1], cgroups[0]):
        yield cgroups[0], _Owner(cgroup=cgroup)


def _excluded_destinations(settings: Settings) -> Iterator[Rule]:
    capture = settings.capture
    for network in parse_networks(capture.exclude_outbound_cidrs, "capture.exclude_outbound_cidrs"):
        family, cidr = _side(network)
        yield Rule(chain=CHAIN_OUT, family=family, destination=cidr, why="capture.exclude_outbound_cidrs")
    for run in parse_ports(capture.exclude_outbound_ports, "capture.exclude_outbound_ports"):
        yield Rule(chain=CHAIN_OUT, ports=run, why="capture.exclude_outbound_ports")


def _to_the_outbound_proxy(settings: Settings, owner: _Owner) -> Iterator[Rule]:
    capture = settings.capture
    for family, cidr in _sides(capture.outbound_cidrs, "capture.outbound_cidrs"):
        for run in parse_ports(capture.outbound_ports, "capture.outbound_ports"):
            yield Rule(
                chain=CHAIN_OUT,
                family=family,
                uid=owner.uid,
                gid=owner.gid,
                cgroup=owner.cgroup,
                destination=cidr,
                ports=_unless_all(run),
                redirect=settings.proxy.outbound_port,
                why="to the outbound proxy",
            )


def _without_ipv6(rules: Sequence[Rule]) -> list[Rule]:
    off = Rule(chain=rules[0].chain, family="ipv6", why=_IPV6_OFF)
    return [off, *(rule for rule in rules if rule.family != "ipv6")]


def _carried(settings: Settings, host: Host) -> Iterator[Rule]:
    """The mark of a connection that the proxy made in its client's name, over to what the application answers."""
    if settings.capture.original_source and not host.accepts_marks:
        mark, why = settings.proxy.local_mark, "capture.original_source"
        yield Rule(chain="MESHNET_MARK_IN", loopback=True, mark=mark, verdict="save", why=why)
        yield Rule(chain="MESHNET_MARK_OUT", connmark=mark, verdict="restore", why=why)


def _routing(settings: Settings, host: Host) -> Routing | None:
    if not settings.capture.original_source:
        return None
    return Routing(mark=settings.proxy.local_mark, accepts=host.accepts_marks)


def _given_to_a_listener(settings: Settings, inbound: Iterable[Rule]) -> Iterator[Rule]:
    """TPROXY in the place of REDIRECT.

    What is taken goes to an address of this host anyhow, so that it needs no mark and no route to get there, and
    neither src_valid_mark nor a missing xt_socket is in its way (tailscale#19796, istio#22500); the proxy's mark tells
    the guard. Where nobody listens nftables lets the packet go on to the application, but for the rule behind.
    """
    proxy = settings.proxy
    for rule in inbound:
        if _passes(rule):
            continue
        placed = msgspec.structs.replace(rule, chain="MESHNET_MARK_IN", redirect=0)
        if not rule.redirect:
            yield placed
        else:
            yield msgspec.structs.replace(placed, tproxy=proxy.inbound_port, tproxy_mark=proxy.mark)
            yield msgspec.structs.replace(placed, verdict="drop", why="no inbound proxy is there to take it")


def _without_invalid(inbound: Iterable[Rule]) -> Iterator[Rule]:
    """What TCP cannot place is not translated back: the host would answer it with a reset of its own (istio#36489)."""
    for rule in inbound:
        if _passes(rule):
            continue
        if rule.redirect:
            why = "fits into no connection, capture.drop_invalid"
            yield msgspec.structs.replace(
                rule, chain="MESHNET_MARK_IN", redirect=0, verdict="drop", invalid=True, why=why
            )
        else:
            yield msgspec.structs.replace(rule, chain="MESHNET_MARK_IN")


def _rerouting(inbound: Sequence[Rule]) -> Sequence[Rule]:
    """What is left in the nat chain beside TPROXY: what passes through goes to the outbound proxy by a redirect."""
    last = max((at for at, rule in enumerate(inbound) if rule.redirect and _passes(rule)), default=-1)
    return [rule for rule in inbound[: last + 1] if not rule.redirect or _passes(rule)]


def _guards(
    settings: Settings, inbound: Sequence[Rule], outbound: Sequence[Rule], *, ahead_of_udp: bool
) -> Iterator[Rule]:
    """What refuses where something should have been redirected: all of it, or that of IPv6. Ahead of UDP's rules there
    is at least what lets pass, for UDP has the same exceptions.
    """
    capture = settings.capture
    guarded: dict[Chain, list[Rule]] = {
        "MESHNET_GUARD_IN": [rule for rule in inbound if not _passes(rule)],
        "MESHNET_GUARD_OUT": list(outbound),
    }
    if capture.reroute_interfaces:
        guarded["MESHNET_GUARD_FWD"] = [rule for rule in inbound if _passes(rule) or rule.why == _IPV6_OFF]
    for chain, rules in guarded.items():
        lets_udp_pass = ahead_of_udp and chain != "MESHNET_GUARD_IN"
        for rule in _guard(rules, chain):
            if capture.strict or (lets_udp_pass and rule.verdict == "return"):
                yield rule
            elif capture.ipv6 == "reject" and rule.family != "ipv4":
                yield msgspec.structs.replace(rule, family="ipv6")


def _guard(rules: Iterable[Rule], chain: Chain) -> Iterator[Rule]:
    """The same again behind the redirects: what they have turned goes to the sidecar's own port by then."""
    yield Rule(chain=chain, established=True, why="open already")
    for rule in rules:
        if rule.redirect:
            why = "captured, and yet nothing has redirected it"
            yield msgspec.structs.replace(rule, chain=chain, redirect=0, verdict="reset", why=why)
        else:
            yield msgspec.structs.replace(rule, chain=chain)


def _held(settings: Settings, outbound: Iterable[Rule]) -> Iterator[Rule]:
    """The same again ahead of the redirects: who is let pass there is not held here."""
    for rule in outbound:
        if rule.redirect and not is_for_canary(rule):
            why = "held until its endpoint is reached, capture.truthful_connect"
            yield msgspec.structs.replace(
                rule, chain="MESHNET_HOLD", redirect=0, queue=settings.proxy.outbound_port, why=why
            )
        elif not rule.redirect:
            yield msgspec.structs.replace(rule, chain="MESHNET_HOLD")


def _refused(settings: Settings) -> Iterator[Rule]:
    """What the sidecar says of those. It marks them as its own, too, so that nothing redirects them on their way."""
    reset, unreachable = settings.refusal_marks()
    yield Rule(chain="MESHNET_GUARD_OUT", mark=reset, verdict="reset", why="refused by its endpoint, or by the sidecar")
    yield Rule(chain="MESHNET_GUARD_OUT", mark=unreachable, verdict="unreachable", why="its endpoint is not reached")


def _passes(rule: Rule) -> bool:
    """Whether it is about what comes from behind a bridge and goes elsewhere."""
    return bool(rule.interface) and rule.local is False


def _udp(settings: Settings, host: Host) -> Iterator[Rule]:
    """UDP passes beside the proxy: that of this host, and what comes from behind a bridge and goes elsewhere."""
    own = Rule(chain="MESHNET_GUARD_OUT", udp=True)
    sending = [
        msgspec.structs.replace(own, uid=owner.uid, gid=owner.gid, cgroup=owner.cgroup)
        for owner in _sending(settings, host)
    ]
    yield from _udp_of(settings, own, sending)
    for interface in parse_interfaces(settings.capture.reroute_interfaces, "capture.reroute_interfaces"):
        behind = Rule(chain="MESHNET_GUARD_FWD", udp=True, interface=interface)
        yield from _udp_of(settings, behind, [behind])


def _udp_of(settings: Settings, everybody: Rule, sending: Sequence[Rule]) -> Iterator[Rule]:
    """What a host or a container could not do without is only refused where it is said so."""
    capture = settings.capture
    kept = parse_ports(capture.exclude_udp_ports, "capture.exclude_udp_ports")
    chosen = {"capture.quic": (capture.quic, _QUIC), "capture.udp": (capture.udp, None)}
    if all(choice == "allow" for choice, _ in chosen.values()):
        return
    for setting, (choice, ports) in chosen.items():
        for run in kept if setting == "capture.udp" and choice == "reject" else ():
            yield msgspec.structs.replace(everybody, ports=run, why="capture.exclude_udp_ports")
        verdict: Verdict = "reject" if choice == "reject" else "return"
        for sender in sending:
            yield msgspec.structs.replace(sender, ports=ports, verdict=verdict, why=f"{setting} = {choice}")


def _is_mapped(number: int, runs: Iterable[range]) -> bool:
    """One that is not can be no process's here, and the kernel refuses to match it."""
    return any(number in run for run in runs)


def _sides(texts: Iterable[str], setting: str) -> list[tuple[Family, str]]:
    """The networks, each with its family. Everywhere in both families is one rule, not two."""
    sides: list[tuple[Family, str]] = [_side(network) for network in parse_networks(texts, setting)]
    return [("any", "")] if sides == [("ipv4", ""), ("ipv6", "")] else sides


def _side(network: Network) -> tuple[Family, str]:
    return ("ipv4" if network.version == 4 else "ipv6"), str(network) if network.prefixlen else ""


def _unless_all(run: Ports) -> Ports | None:
    return None if run == ALL_PORTS else run


def _check(settings: Settings) -> None:
    proxy, capture = settings.proxy, settings.capture
    for name, port in (("proxy.inbound_port", proxy.inbound_port), ("proxy.outbound_port", proxy.outbound_port)):
        if port not in ALL_PORTS:
            raise ConfigError(f"{name}: {port} is not a port", suggestion="ports go from 1 to 65535")
    if proxy.inbound_port == proxy.outbound_port:
        raise ConfigError(
            f"proxy.inbound_port and proxy.outbound_port are both {proxy.inbound_port}",
            suggestion="give each its own port",
        )
    if capture.readiness_port in settings.listening_ports():
        raise ConfigError(
            f"capture.readiness_port: {capture.readiness_port} is the sidecar's own already",
            suggestion="name a port at which nobody listens, such as 15124",
        )
    for run in parse_ports(capture.loopback_ports, "capture.loopback_ports"):
        for port in sorted(settings.own_ports()):
            if port in run:
                raise ConfigError(
                    f"capture.loopback_ports: {run} has {port}, which is the sidecar's own",
                    suggestion="name the ports of applications only",
                )
    for name, mark in (("proxy.mark", proxy.mark), ("proxy.local_mark", proxy.local_mark)):
        if not 0 < mark <= _LARGEST_MARK:
            raise ConfigError(f"{name}: {mark} is not a mark", suggestion="marks go from 1 to 0xffffffff")
    if capture.original_source and proxy.mark & proxy.local_mark:
        raise ConfigError(
            f"proxy.mark {proxy.mark:#x} and proxy.local_mark {proxy.local_mark:#x} share a bit",
            suggestion="give each bits of its own, such as 0x1000 and 0x2000",
        )
    if capture.truthful_connect:
        try:
            settings.refusal_marks()
        except ValueError:
            raise ConfigError(
                "capture.truthful_connect needs two bits that proxy.mark and proxy.local_mark leave free",
                suggestion="give those fewer bits, such as 0x1000 and 0x2000",
            ) from None
    if not 0 <= capture.gid <= _LARGEST_GID:
        raise ConfigError(f"capture.gid: {capture.gid} is not a group id", suggestion="write the proxy's primary group")
