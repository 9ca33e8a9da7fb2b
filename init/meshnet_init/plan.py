"""THE RULES AS DATA: what goes into the kernel, in order, each with its reason. Pure.

Two chains of the nat table: MESHNET_IN sees what arrives (PREROUTING), MESHNET_OUT what local processes send (OUTPUT).
A rule that matches either returns, which leaves the connection to the host's other rules, or redirects. Redirects
match only the opening SYN: packets of connections that were open before can reach the chains, as conntrack starts to
run with the first rule and takes them for new ones, and redirecting those would reset them (istio#36870, istio#48876).
"""

import ipaddress
from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from meshnet.errors import ConfigError
from meshnet.model.address import Network
from meshnet.model.settings import Settings
from meshnet_init.values import ALL_PORTS, Ports, parse_ids, parse_interfaces, parse_networks, parse_ports

Chain = Literal["MESHNET_IN", "MESHNET_OUT"]
Family = Literal["any", "ipv4", "ipv6"]

CHAIN_IN: Chain = "MESHNET_IN"
CHAIN_OUT: Chain = "MESHNET_OUT"
CHAINS: tuple[Chain, ...] = (CHAIN_IN, CHAIN_OUT)

_LARGEST_MARK = 2**32 - 1
_LARGEST_GID = 2**32 - 2  # the last value means "no group" to the kernel
_LARGEST_PLAN = 1000  # rules; what fits into one netlink transaction


class Rule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """TCP that matches every field set is redirected to port `redirect`, or returned when that is 0.

    `loopback` is the interface in MESHNET_IN's case it came from, in MESHNET_OUT's case it leaves by. `local` asks
    whether the destination is an address of this host. `mark` is the packet's mark, `uid` and `gid` are those of the
    process that made the sending socket, when it made it. `interface` is a name, or with `*` behind it the beginning of
    names: where it came from in MESHNET_IN, where it leaves in MESHNET_OUT.
    `hold` matches nothing a nat chain ever sees; while it stands, conntrack keeps running for the family.
    """

    chain: Chain
    why: str = ""
    family: Family = "any"
    loopback: bool = False
    interface: str = ""
    mark: int = 0
    uid: int | None = None
    gid: int | None = None
    source: str = ""  # CIDR
    destination: str = ""  # CIDR
    local: bool | None = None
    ports: Ports | None = None  # destination ports
    hold: bool = False
    redirect: int = 0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel shall hold. Without `ipv6` an iptables backend leaves ip6tables alone."""

    rules: tuple[Rule, ...]
    ipv6: bool = True

    def of_family(self, family: Literal["ipv4", "ipv6"]) -> tuple[Rule, ...]:
        """The rules one family's table gets, each saying that family."""
        return tuple(msgspec.structs.replace(r, family=family) for r in self.rules if r.family in ("any", family))


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan depends on beside the settings. `uids` and `gids` are the runs of ids this user namespace maps."""

    ipv6: bool = True
    uids: tuple[range, ...] = (range(2**32 - 1),)
    gids: tuple[range, ...] = (range(2**32 - 1),)


def make_plan(settings: Settings, host: Host) -> Plan:
    """The plan these settings ask for. Raises ConfigError: what is wrong and what to write instead."""
    proxy, capture = settings.proxy, settings.capture
    _check(settings)
    ipv6 = capture.ipv6 == "on" or (capture.ipv6 == "auto" and host.ipv6)
    mark = proxy.mark
    gid = capture.gid if _is_mapped(capture.gid, host.gids) else None

    rules = (*_inbound(settings, mark), *_outbound(settings, mark, gid, host))
    if ipv6:
        plan = Plan(rules=rules)
    else:
        off = (Rule(chain=chain, family="ipv6", why="IPv6 is not captured here") for chain in CHAINS)
        kept = (rule for rule in rules if rule.family != "ipv6")
        plan = Plan(rules=tuple(sorted((*off, *kept), key=lambda rule: CHAINS.index(rule.chain))), ipv6=False)
    if len(plan.rules) > _LARGEST_PLAN:
        raise ConfigError(
            f"capture: {len(plan.rules)} rules are more than {_LARGEST_PLAN}",
            suggestion="join ports and CIDRs",
        )
    return plan


def drain_set(ports: Iterable[int], *, ipv6: bool = True) -> Plan:
    """No redirects; keeps NAT and conntrack alive for connections that were redirected to `ports` before.

    When a namespace's last rule that uses conntrack goes, address translation stops for open connections too.
    """
    why = "keeps redirected connections alive until they end"
    runs = [Ports(port, port) for port in sorted(set(ports))] or [ALL_PORTS]
    return Plan(
        rules=tuple(Rule(chain=chain, why=why, ports=run, hold=True) for chain in CHAINS for run in runs), ipv6=ipv6
    )


def captures(rules: Iterable[Rule], host: str, port: int) -> bool:
    """Whether a local process's new connection to a remote `host` would be redirected; the proxy's own aside."""
    address = ipaddress.ip_address(host)
    family = f"ipv{address.version}"
    for rule in rules:
        if rule.chain != CHAIN_OUT or rule.family not in ("any", family):
            continue
        if rule.loopback or rule.mark or rule.uid is not None or rule.gid is not None or rule.local or rule.hold:
            continue
        if rule.interface:
            continue
        if rule.destination and address not in ipaddress.ip_network(rule.destination):
            continue
        if rule.ports is not None and port not in rule.ports:
            continue
        return bool(rule.redirect)
    return False


def _inbound(settings: Settings, mark: int) -> Iterator[Rule]:
    proxy, capture = settings.proxy, settings.capture
    included = parse_ports(capture.inbound_ports, "capture.inbound_ports")
    excluded = parse_ports(capture.exclude_inbound_ports, "capture.exclude_inbound_ports")
    sources = parse_networks(capture.exclude_inbound_cidrs, "capture.exclude_inbound_cidrs")

    yield Rule(chain=CHAIN_IN, loopback=True, why="came from this host itself")
    yield Rule(chain=CHAIN_IN, mark=mark, why="made by the proxy")
    for port in sorted(settings.own_ports()):
        yield Rule(chain=CHAIN_IN, ports=Ports(port, port), why="the sidecar's own port")
    for interface in parse_interfaces(capture.exclude_interfaces, "capture.exclude_interfaces"):
        yield Rule(chain=CHAIN_IN, interface=interface, why="capture.exclude_interfaces")
    for run in excluded:
        yield Rule(chain=CHAIN_IN, ports=run, why="capture.exclude_inbound_ports")
    for network in sources:
        family, cidr = _side(network)
        yield Rule(chain=CHAIN_IN, family=family, source=cidr, why="capture.exclude_inbound_cidrs")
    yield Rule(chain=CHAIN_IN, local=False, why="only passes through this host")
    for run in included:
        yield Rule(chain=CHAIN_IN, ports=_unless_all(run), redirect=proxy.inbound_port, why="to the inbound proxy")


def _outbound(settings: Settings, mark: int, gid: int | None, host: Host) -> Iterator[Rule]:
    proxy, capture = settings.proxy, settings.capture
    ports = parse_ports(capture.outbound_ports, "capture.outbound_ports")
    networks = parse_networks(capture.outbound_cidrs, "capture.outbound_cidrs")
    excluded_networks = parse_networks(capture.exclude_outbound_cidrs, "capture.exclude_outbound_cidrs")
    excluded_ports = parse_ports(capture.exclude_outbound_ports, "capture.exclude_outbound_ports")

    yield Rule(chain=CHAIN_OUT, mark=mark, why="made by the proxy")
    if gid is not None:
        yield Rule(chain=CHAIN_OUT, gid=gid, why="made by the proxy's group")
    for uid in parse_ids(capture.exclude_uids, "capture.exclude_uids"):
        if _is_mapped(uid, host.uids):
            yield Rule(chain=CHAIN_OUT, uid=uid, why="capture.exclude_uids")
    for group in parse_ids(capture.exclude_gids, "capture.exclude_gids"):
        if _is_mapped(group, host.gids):
            yield Rule(chain=CHAIN_OUT, gid=group, why="capture.exclude_gids")
    for run in parse_ports(capture.loopback_ports, "capture.loopback_ports"):
        yield Rule(
            chain=CHAIN_OUT, loopback=True, ports=run, redirect=proxy.outbound_port, why="capture.loopback_ports"
        )
    yield Rule(chain=CHAIN_OUT, loopback=True, why="stays on this host")
    for interface in parse_interfaces(capture.exclude_interfaces, "capture.exclude_interfaces"):
        yield Rule(chain=CHAIN_OUT, interface=interface, why="capture.exclude_interfaces")
    yield Rule(chain=CHAIN_OUT, local=True, why="goes to this host's own address")
    for network in excluded_networks:
        family, cidr = _side(network)
        yield Rule(chain=CHAIN_OUT, family=family, destination=cidr, why="capture.exclude_outbound_cidrs")
    for run in excluded_ports:
        yield Rule(chain=CHAIN_OUT, ports=run, why="capture.exclude_outbound_ports")
    # Everywhere in both families is one rule, not two.
    sides: list[tuple[Family, str]] = [_side(network) for network in networks]
    if sides == [("ipv4", ""), ("ipv6", "")]:
        sides = [("any", "")]
    for family, cidr in sides:
        for run in ports:
            yield Rule(
                chain=CHAIN_OUT,
                family=family,
                destination=cidr,
                ports=_unless_all(run),
                redirect=proxy.outbound_port,
                why="to the outbound proxy",
            )


def _is_mapped(number: int, runs: Iterable[range]) -> bool:
    """One that is not can be no process's here, and the kernel refuses to match it."""
    return any(number in run for run in runs)


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
    own = settings.own_ports()
    for run in parse_ports(capture.loopback_ports, "capture.loopback_ports"):
        for port in sorted(own):
            if port in run:
                raise ConfigError(
                    f"capture.loopback_ports: {run} has {port}, which is the sidecar's own",
                    suggestion="name the ports of applications only",
                )
    if not 0 < proxy.mark <= _LARGEST_MARK:
        raise ConfigError(f"proxy.mark: {proxy.mark} is not a mark", suggestion="marks go from 1 to 0xffffffff")
    if not 0 <= capture.gid <= _LARGEST_GID:
        raise ConfigError(f"capture.gid: {capture.gid} is not a group id", suggestion="write the proxy's primary group")
