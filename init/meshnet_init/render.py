"""A plan as text: what `nft -f` or `iptables-restore --noflush` takes. For review, --dry-run and golden tests. Pure."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Literal

from meshnet_init.rule import CHAINS, NAT_CHAINS, PLACES, Chain, Family, Plan, Rule, Table, Verdict, arriving
from meshnet_init.values import Ports

NFT_TABLE = "meshnet"
KEEPER_TABLE = "meshnet_keeper"  # see keep/guard.py
TABLES: tuple[Table, ...] = ("mangle", "nat", "filter")

_OF_UDP_TOO: tuple[Chain, ...] = ("MESHNET_GUARD_OUT", "MESHNET_GUARD_FWD")
_OPENING_SYN = ("FIN,SYN,RST,ACK", "SYN")
_NFT_VERDICTS: dict[Verdict, str] = {
    "return": "return",
    "drop": "drop",
    "reset": "reject with tcp reset",
    "reject": "reject with icmpx port-unreachable",
    "unreachable": "reject with icmpx host-unreachable",
}
_ANY_ADDRESS = {"any": "0.0.0.0", "ipv4": "0.0.0.0", "ipv6": "::"}


def chains_of(plan: Plan) -> tuple[Chain, ...]:
    """Those the plan has rules in, and the nat table's."""
    used = {rule.chain for rule in plan.rules} | set(NAT_CHAINS)
    return tuple(chain for chain in CHAINS if chain in used)


def nft_text(plan: Plan) -> str:
    """One transaction for `nft -f`: creates the table so that it can be deleted, then makes it anew."""
    lines = [f"table inet {NFT_TABLE}", f"delete table inet {NFT_TABLE}", f"table inet {NFT_TABLE} {{"]
    for chain in chains_of(plan):
        place = PLACES[chain]
        lines.append(f"\tchain {chain} {{")
        lines.append(f"\t\ttype {place.kind} hook {place.hook.lower()} priority {place.priority}; policy accept;")
        lines += [f"\t\t{nft_rule(rule)}" for rule in plan.rules if rule.chain == chain]
        lines.append("\t}")
    lines.append("}")
    return "\n".join(lines) + "\n"


def nft_rule(rule: Rule) -> str:
    """One rule as nft prints it."""
    comment = f'comment "{rule.why}"' if rule.why else ""
    return " ".join(filter(None, (matches(rule), "counter", action(rule), comment)))


def action(rule: Rule) -> str:
    """What is done with what matches, in nft's words."""
    if rule.redirect:
        return f"redirect to :{rule.redirect}"
    if rule.tproxy:
        mark = f"meta mark set meta mark | {rule.tproxy_mark:#010x} " if rule.tproxy_mark else ""
        family = {"any": "", "ipv4": "ip ", "ipv6": "ip6 "}[rule.family]
        return f"tproxy {family}to :{rule.tproxy} {mark}accept"
    if rule.queue:
        return f"queue flags bypass to {rule.queue}"
    if rule.verdict == "save":
        return f"ct mark set ct mark | {rule.mark:#010x}"
    if rule.verdict == "restore":
        return f"meta mark set meta mark | {rule.connmark:#010x}"
    return _NFT_VERDICTS[rule.verdict]


def matches(rule: Rule) -> str:
    """What a packet must be like, in nft's words."""
    ip = {"any": "", "ipv4": "ip", "ipv6": "ip6"}[rule.family]
    side = "iifname" if arriving(rule.chain) else "oifname"
    words = []
    if rule.family != "any" and not rule.source and not rule.destination:
        words.append(f"meta nfproto {rule.family}")
    if rule.loopback:
        words.append(f'{side} "lo"')
    if rule.interface:
        words.append(f'{side} "{rule.interface}"')
    if rule.mark:
        words.append(f"meta mark & {rule.mark:#010x} == {rule.mark:#010x}")
    if rule.connmark:
        words.append(f"ct mark & {rule.connmark:#010x} == {rule.connmark:#010x}")
    if rule.uid is not None:
        words.append(f"meta skuid {rule.uid}")
    if rule.gid is not None:
        words.append(f"meta skgid {rule.gid}")
    if rule.cgroup:
        words.append(f'socket cgroupv2 level {rule.cgroup.count("/") + 1} "{rule.cgroup}"')
    if rule.source:
        words.append(f"{ip} saddr {_bare(rule.source)}")
    if rule.destination:
        words.append(f"{ip} daddr {_bare(rule.destination)}")
    if rule.local is not None:
        words.append("fib daddr type local" if rule.local else "fib daddr type != local")
    if rule.ports is not None:
        words.append(f"{'udp' if rule.udp else 'tcp'} dport {rule.ports}")
    elif rule.udp:
        words.append("meta l4proto udp")
    if rule.established:
        words.append("ct state established")
    if rule.invalid:
        words += [*([] if rule.ports is not None else ["meta l4proto tcp"]), "ct state invalid"]
    if rule.opening():
        words.append("tcp flags & (fin | syn | rst | ack) == syn")
    return " ".join(words)


def iptables_text(plan: Plan, family: Literal["ipv4", "ipv6"]) -> str:
    """For `iptables-restore --noflush` (ip6tables-restore): makes or empties and refills our chains, table by table."""
    used = {PLACES[chain].table for chain in chains_of(plan)}
    return "".join(iptables_table(plan, family, table) for table in TABLES if table in used)


def iptables_table(
    plan: Plan, family: Literal["ipv4", "ipv6"], table: Table, *, changes: Iterable[str] | None = None
) -> str:
    """One table's commit. `changes` are the commands that lead the built-in chains to ours; None inserts each jump.

    The reasons are comments of the text, not of the rules: some kernels lack xt_comment (istio#57679).
    """
    chains = [chain for chain in chains_of(plan) if PLACES[chain].table == table]
    lines = [f"*{table}", *(f":{chain} - [0:0]" for chain in chains)]
    lines += [insert_jump(chain) for chain in chains] if changes is None else changes
    why = ""
    for rule in plan.of_family(family):
        if rule.chain not in chains:
            continue
        if rule.why != why:
            why = rule.why
            lines.append(f"# {why}")
        lines.append(f"-A {rule.chain} {' '.join(iptables_words(rule))}")
    lines.append("COMMIT")
    return "\n".join(lines) + "\n"


def jump(chain: Chain) -> str:
    """The rule that leads a built-in chain to ours, without its command."""
    return f"{PLACES[chain].hook} {'' if chain in _OF_UDP_TOO else '-p tcp '}-j {chain}"


def insert_jump(chain: Chain) -> str:
    """Puts that rule first, ahead of what other software has there."""
    return f"-I {jump(chain).replace(' ', ' 1 ', 1)}"


def iptables_words(rule: Rule) -> list[str]:
    """A rule's matches and target, as iptables-save prints them."""
    words = []
    if rule.source:
        words += ["-s", rule.source]
    if rule.destination:
        words += ["-d", rule.destination]
    if rule.loopback or rule.interface:
        words += ["-i" if arriving(rule.chain) else "-o", rule.interface.replace("*", "+") or "lo"]
    if rule.udp:
        words += ["-p", "udp", *(["-m", "udp"] if rule.ports is not None else [])]
    elif rule.of_tcp():
        words += ["-p", "tcp", "-m", "tcp"]
    if rule.ports is not None:
        words += ["--dport", str(rule.ports).replace("-", ":")]
    if rule.opening():
        words += ["--tcp-flags", *_OPENING_SYN]
    if rule.mark:
        words += ["-m", "mark", "--mark", _compared(rule.mark)]
    if rule.connmark:
        words += ["-m", "connmark", "--mark", _compared(rule.connmark)]
    if rule.uid is not None:
        words += ["-m", "owner", "--uid-owner", str(rule.uid)]
    if rule.gid is not None:
        words += ["-m", "owner", "--gid-owner", str(rule.gid)]
    if rule.cgroup:
        words += ["-m", "cgroup", "--path", rule.cgroup]
    if rule.local is not None:
        words += ["-m", "addrtype", *([] if rule.local else ["!"]), "--dst-type", "LOCAL"]
    if rule.established:
        words += ["-m", "conntrack", "--ctstate", "ESTABLISHED"]
    if rule.invalid:
        words += ["-m", "conntrack", "--ctstate", "INVALID"]
    return [*words, "-j", *_target(rule)]


BUILT_IN = frozenset({"-j RETURN", "-j DROP"})
"""Of x_tables itself, in no module of their own."""


def parts_of(rule: Rule) -> frozenset[str]:
    """Its matches and its target, `-m owner` and `-j TPROXY` for two; what every kernel has only where that is all."""
    words = iptables_words(rule)
    parts = frozenset(f"{option} {name}" for option, name in itertools.pairwise(words) if option in ("-m", "-j"))
    return parts - BUILT_IN or parts


def _target(rule: Rule) -> list[str]:
    if rule.redirect:
        return ["REDIRECT", "--to-ports", str(rule.redirect)]
    if rule.tproxy:
        where = ["--on-port", str(rule.tproxy), "--on-ip", _ANY_ADDRESS[rule.family]]
        return ["TPROXY", *where, "--tproxy-mark", _bits(rule.tproxy_mark)]
    if rule.queue:
        return ["NFQUEUE", "--queue-num", str(rule.queue), "--queue-bypass"]
    match rule.verdict:
        case "save":
            return ["CONNMARK", "--set-xmark", _bits(rule.mark)]
        case "restore":
            return ["MARK", "--set-xmark", _bits(rule.connmark)]
        case "reset":
            return ["REJECT", "--reject-with", "tcp-reset"]
        case "reject":
            icmp = "icmp6-port-unreachable" if rule.family == "ipv6" else "icmp-port-unreachable"
            return ["REJECT", "--reject-with", icmp]
        case "unreachable":
            icmp = "icmp6-addr-unreachable" if rule.family == "ipv6" else "icmp-host-unreachable"
            return ["REJECT", "--reject-with", icmp]
        case "return" | "drop":
            return [rule.verdict.upper()]


_VERDICTS: dict[str, Verdict] = {
    "RETURN": "return",
    "DROP": "drop",
    "REJECT tcp-reset": "reset",
    "REJECT icmp-port-unreachable": "reject",
    "REJECT icmp6-port-unreachable": "reject",
    "REJECT icmp-host-unreachable": "unreachable",
    "REJECT icmp6-addr-unreachable": "unreachable",
    "CONNMARK": "save",
    "MARK": "restore",
    "REDIRECT": "return",
    "TPROXY": "return",
    "NFQUEUE": "return",
}


def read_iptables_rule(chain: Chain, family: Family, words: Sequence[str]) -> Rule | None:
    """The rule whose `iptables_words` these are, whatever their order; None when they are no rule of ours."""
    value = _options(words)
    ports = value.get("--dport", "").split(":")
    interface = value.get("-i", value.get("-o", ""))
    if "+" in interface[:-1] or "*" in interface:  # no name that a plan can have
        return None
    try:
        rule = Rule(
            chain=chain,
            family=family,
            loopback=interface == "lo",
            interface="" if interface == "lo" else interface.replace("+", "*"),
            mark=_number(value.get("mark --mark")),
            connmark=_number(value.get("connmark --mark")),
            uid=int(value["--uid-owner"]) if "--uid-owner" in value else None,
            gid=int(value["--gid-owner"]) if "--gid-owner" in value else None,
            cgroup=value.get("--path", ""),
            source=value.get("-s", ""),
            destination=value.get("-d", ""),
            local="!" not in value if "--dst-type" in value else None,
            udp=value.get("-p") == "udp",
            ports=Ports(int(ports[0]), int(ports[-1])) if ports[0] else None,
            established=value.get("--ctstate") == "ESTABLISHED",
            invalid=value.get("--ctstate") == "INVALID",
            redirect=int(value.get("--to-ports", "0")),
            tproxy=int(value.get("--on-port", "0")),
            tproxy_mark=_number(value.get("--tproxy-mark")),
            queue=int(value.get("--queue-num", "0")),
            verdict=_VERDICTS[" ".join(filter(None, (value.get("-j"), value.get("--reject-with"))))],
        )
    except (KeyError, ValueError):
        return None
    # Whatever the reading above passed over makes the two differ.
    return rule if sorted(iptables_words(rule)) == sorted(words) else None


def _options(words: Sequence[str]) -> dict[str, str]:
    """Each word with the one behind it; `--mark`, which two matches know, with its match in front."""
    value: dict[str, str] = {}
    match = ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "-m":
            match = following
        value[f"{match} {word}" if word == "--mark" else word] = following
    return value


def _bits(mark: int) -> str:
    return f"{mark:#x}/{mark:#x}"


def _compared(mark: int) -> str:
    """With all bits set iptables leaves the mask out."""
    return f"{mark:#x}" if mark == 2**32 - 1 else _bits(mark)


def _number(bits: str | None) -> int:
    return int(bits.partition("/")[0], 0) if bits else 0


def _bare(cidr: str) -> str:
    """A host as nft prints it, without the prefix length."""
    return cidr.removesuffix("/128" if ":" in cidr else "/32")
