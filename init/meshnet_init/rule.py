"""A RULE AS DATA, and where in the kernel it stands. Pure; plan.py says which rules there are.

Redirects match only the opening SYN: packets of connections that were open before can reach the chains, as conntrack
starts to run with the first rule and takes them for new ones, and redirecting those would reset them (istio#36870,
istio#48876).
"""

import ipaddress
from collections.abc import Iterable
from typing import Literal, NamedTuple

import msgspec

from meshnet.model.canary import OWN_CANARY
from meshnet_init.values import ALL_PORTS, Ports

Chain = Literal[
    "MESHNET_MARK_IN",
    "MESHNET_MARK_OUT",
    "MESHNET_HOLD",
    "MESHNET_IN",
    "MESHNET_OUT",
    "MESHNET_GUARD_IN",
    "MESHNET_GUARD_OUT",
    "MESHNET_GUARD_FWD",
]
Family = Literal["any", "ipv4", "ipv6"]
Table = Literal["mangle", "nat", "filter"]
Hook = Literal["PREROUTING", "INPUT", "FORWARD", "OUTPUT"]
Verdict = Literal["return", "drop", "reset", "reject", "unreachable", "save", "restore"]


class Place(NamedTuple):
    """`priority` is nft's, just ahead of iptables' chains at that hook; `kind` is nft's type of the chain."""

    table: Table
    hook: Hook
    kind: Literal["filter", "nat", "route"]
    priority: int


CHAIN_IN: Chain = "MESHNET_IN"
CHAIN_OUT: Chain = "MESHNET_OUT"
PLACES: dict[Chain, Place] = {
    "MESHNET_MARK_IN": Place("mangle", "PREROUTING", "filter", -155),
    "MESHNET_MARK_OUT": Place("mangle", "OUTPUT", "route", -155),
    "MESHNET_HOLD": Place("mangle", "OUTPUT", "filter", -154),
    CHAIN_IN: Place("nat", "PREROUTING", "nat", -105),
    CHAIN_OUT: Place("nat", "OUTPUT", "nat", -105),
    "MESHNET_GUARD_IN": Place("filter", "INPUT", "filter", -5),
    "MESHNET_GUARD_OUT": Place("filter", "OUTPUT", "filter", -5),
    "MESHNET_GUARD_FWD": Place("filter", "FORWARD", "filter", -5),
}
"""In the order in which they are written: what marks, what holds, what redirects, what refuses."""
CHAINS: tuple[Chain, ...] = tuple(PLACES)
NAT_CHAINS: tuple[Chain, ...] = (CHAIN_IN, CHAIN_OUT)
"""Those are always there: without a nat chain translation stops."""

READINESS = "readiness is asked for through the rules"
"""Why what comes in for capture.readiness_port is redirected."""

_ARRIVING: tuple[Hook, ...] = ("PREROUTING", "INPUT", "FORWARD")


def arriving(chain: Chain) -> bool:
    """Whether `interface` and `loopback` are where a packet came from there, not by which it leaves."""
    return PLACES[chain].hook in _ARRIVING


_OWN_CANARIES = frozenset(str(ipaddress.ip_network(host)) for host in OWN_CANARY.values())


class Rule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What matches every field set is redirected to port `redirect`; or given to the listener on port `tproxy`, marked
    with the bits `tproxy_mark`; or put into the queue of that number until whoever listens there says what becomes of
    it, and let pass where nobody does; or else `verdict` is done: the chain is left, the packet dropped, refused with a
    TCP reset or an ICMP error (of the port, or of the host), its mark's bits `mark` saved to its connection's, or the
    connection's bits `connmark` restored to the packet's.

    `loopback` is the interface it came from, or leaves by where the chain sees what leaves. `local` asks whether the
    destination is an address of this host. Of the bits `mark` and `connmark` all must be set. `uid`, `gid` and `cgroup`
    (a path below the root of cgroup v2) are those of the process that made the sending socket, when it made it.
    `interface` is a name, or with `*` behind it the beginning of names. `ports` are TCP's, with `udp` UDP's.
    `established` asks whether conntrack knows the connection already: in a nat chain that matches nothing ever, and
    while such a rule stands conntrack keeps running for the family. `invalid`: it knows none that TCP fits into.
    Whoever redirects, gives to a listener, queues, drops, resets or says that the host is unreachable does so with an
    opening SYN only, unless it is `udp` or `invalid`.
    """

    chain: Chain
    why: str = ""
    family: Family = "any"
    loopback: bool = False
    interface: str = ""
    mark: int = 0
    connmark: int = 0
    uid: int | None = None
    gid: int | None = None
    cgroup: str = ""
    source: str = ""  # CIDR
    destination: str = ""  # CIDR
    local: bool | None = None
    udp: bool = False
    ports: Ports | None = None  # destination ports
    established: bool = False
    invalid: bool = False
    redirect: int = 0
    tproxy: int = 0
    tproxy_mark: int = 0
    queue: int = 0
    verdict: Verdict = "return"

    def of_tcp(self) -> bool:
        """Whether it says so: only where a port, a flag or TCP's own answer asks for it."""
        return not self.udp and (self.ports is not None or self.opening() or self.invalid)

    def opening(self) -> bool:
        """Whether it matches opening SYNs only."""
        takes = self.redirect or self.tproxy or self.queue or self.verdict in ("drop", "reset", "unreachable")
        return bool(takes) and not self.udp and not self.invalid

    def keeps(self) -> bool:
        """Whether open connections hang on it, and new ones are left alone."""
        held = self.established and self.chain in NAT_CHAINS
        return held or self.verdict in ("save", "restore")


class Routing(msgspec.Struct, frozen=True, kw_only=True):
    """What an application answers to a client's own address comes back to the proxy that speaks from there.

    Packets with the bits `mark` are delivered on this host. `accepts`: what answers a packet has its mark, by switches
    of /proc/sys/net (tcp_fwmark_accept, fwmark_reflect); without, rules carry the mark over through the connection's.
    """

    mark: int
    accepts: bool


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel shall hold. Without `ipv6` an iptables backend leaves ip6tables alone."""

    rules: tuple[Rule, ...]
    ipv6: bool = True
    routing: Routing | None = None

    def of_family(self, family: Literal["ipv4", "ipv6"]) -> tuple[Rule, ...]:
        """The rules one family's tables get, each saying that family."""
        return tuple(msgspec.structs.replace(r, family=family) for r in self.rules if r.family in ("any", family))


def drain_set(ports: Iterable[int], kept: Iterable[Rule] = (), *, ipv6: bool = True) -> Plan:
    """No redirects; keeps NAT and conntrack alive for connections that were redirected to `ports` before.

    When a namespace's last rule that uses conntrack goes, address translation stops for open connections too. Of the
    rules in force `kept` stay that open connections hang on.
    """
    why = "keeps redirected connections alive until they end"
    runs = [Ports(port, port) for port in sorted(set(ports))] or [ALL_PORTS]
    holds = (Rule(chain=chain, why=why, ports=run, established=True) for chain in NAT_CHAINS for run in runs)
    carry = tuple(rule for rule in kept if rule.chain not in NAT_CHAINS and rule.keeps())
    return Plan(rules=(*carry, *holds), ipv6=ipv6)


def captures(rules: Iterable[Rule], host: str, port: int) -> bool:
    """Whether a local process's new connection to a remote `host` would be redirected; the proxy's own aside."""
    address = ipaddress.ip_address(host)
    family = f"ipv{address.version}"
    for rule in rules:
        if rule.chain != CHAIN_OUT or rule.family not in ("any", family) or _depends_on_who(rule):
            continue
        if rule.destination and address not in ipaddress.ip_network(rule.destination):
            continue
        if rule.ports is not None and port not in rule.ports:
            continue
        return bool(rule.redirect)
    return False


def is_for_canary(rule: Rule) -> bool:
    """Whether it is there to prove that the rules are in force, and redirects nobody's traffic."""
    return rule.chain == CHAIN_OUT and rule.destination in _OWN_CANARIES


def _depends_on_who(rule: Rule) -> bool:
    """On more than where a connection goes, or on its not going anywhere else."""
    by_process = rule.mark or rule.uid is not None or rule.gid is not None or rule.cgroup
    return bool(by_process or rule.loopback or rule.interface or rule.local or rule.established)
