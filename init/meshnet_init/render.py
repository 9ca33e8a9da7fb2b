"""A plan as text: what `nft -f` or `iptables-restore --noflush` takes. For review, --dry-run and golden tests. Pure."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Literal

from meshnet_init.plan import CHAIN_IN, CHAINS, Chain, Family, Plan, Rule
from meshnet_init.values import Ports

NFT_TABLE = "meshnet"
NFT_PRIORITY = -105  # just ahead of iptables' nat chains (-100): ours decides first

HOOKS: dict[Chain, str] = {"MESHNET_IN": "PREROUTING", "MESHNET_OUT": "OUTPUT"}

_OPENING_SYN = ("FIN,SYN,RST,ACK", "SYN")


def nft_text(plan: Plan) -> str:
    """One transaction for `nft -f`: creates the table so that it can be deleted, then makes it anew."""
    lines = [f"table inet {NFT_TABLE}", f"delete table inet {NFT_TABLE}", f"table inet {NFT_TABLE} {{"]
    for chain in CHAINS:
        lines.append(f"\tchain {chain} {{")
        lines.append(f"\t\ttype nat hook {HOOKS[chain].lower()} priority {NFT_PRIORITY}; policy accept;")
        lines += [f"\t\t{nft_rule(rule)}" for rule in plan.rules if rule.chain == chain]
        lines.append("\t}")
    lines.append("}")
    return "\n".join(lines) + "\n"


def nft_rule(rule: Rule) -> str:
    """One rule as nft prints it."""
    comment = f'comment "{rule.why}"' if rule.why else ""
    return " ".join(filter(None, (matches(rule), "counter", action(rule), comment)))


def action(rule: Rule) -> str:
    return f"redirect to :{rule.redirect}" if rule.redirect else "return"


def matches(rule: Rule) -> str:
    """What a packet must be like, in nft's words."""
    ip = {"any": "", "ipv4": "ip", "ipv6": "ip6"}[rule.family]
    words = []
    if rule.family != "any" and not rule.source and not rule.destination:
        words.append(f"meta nfproto {rule.family}")
    if rule.loopback:
        words.append('iifname "lo"' if rule.chain == CHAIN_IN else 'oifname "lo"')
    if rule.interface:
        words.append(f'{"iifname" if rule.chain == CHAIN_IN else "oifname"} "{rule.interface}"')
    if rule.mark:
        words.append(f"meta mark {rule.mark:#010x}")
    if rule.uid is not None:
        words.append(f"meta skuid {rule.uid}")
    if rule.gid is not None:
        words.append(f"meta skgid {rule.gid}")
    if rule.source:
        words.append(f"{ip} saddr {_bare(rule.source)}")
    if rule.destination:
        words.append(f"{ip} daddr {_bare(rule.destination)}")
    if rule.local is not None:
        words.append("fib daddr type local" if rule.local else "fib daddr type != local")
    if rule.ports is not None:
        words.append(f"tcp dport {rule.ports}")
    if rule.hold:
        words.append("ct state established")
    if rule.redirect:
        words.append("tcp flags & (fin | syn | rst | ack) == syn")
    return " ".join(words)


def iptables_text(plan: Plan, family: Literal["ipv4", "ipv6"], *, jumps: Iterable[str] | None = None) -> str:
    """One commit for `iptables-restore --noflush` (ip6tables-restore): makes or empties and refills our two chains.

    `jumps` are the commands that lead the built-in chains to ours; None inserts both. The reasons are comments of
    the text, not of the rules: some kernels lack xt_comment (istio#57679).
    """
    rules = plan.of_family(family)
    lines = ["*nat", *(f":{chain} - [0:0]" for chain in CHAINS)]
    lines += [insert_jump(chain) for chain in CHAINS] if jumps is None else jumps
    why = ""
    for rule in rules:
        if rule.why != why:
            why = rule.why
            lines.append(f"# {why}")
        lines.append(f"-A {rule.chain} {' '.join(iptables_words(rule))}")
    lines.append("COMMIT")
    return "\n".join(lines) + "\n"


def jump(chain: Chain) -> str:
    """The rule that leads a built-in chain to ours, without its command."""
    return f"{HOOKS[chain]} -p tcp -j {chain}"


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
        words += ["-i" if rule.chain == CHAIN_IN else "-o", rule.interface.replace("*", "+") or "lo"]
    if rule.ports is not None or rule.redirect:
        words += ["-p", "tcp", "-m", "tcp"]
    if rule.ports is not None:
        words += ["--dport", str(rule.ports).replace("-", ":")]
    if rule.redirect:
        words += ["--tcp-flags", *_OPENING_SYN]
    if rule.mark:
        words += ["-m", "mark", "--mark", hex(rule.mark)]
    if rule.uid is not None:
        words += ["-m", "owner", "--uid-owner", str(rule.uid)]
    if rule.gid is not None:
        words += ["-m", "owner", "--gid-owner", str(rule.gid)]
    if rule.local is not None:
        words += ["-m", "addrtype", *([] if rule.local else ["!"]), "--dst-type", "LOCAL"]
    if rule.hold:
        words += ["-m", "conntrack", "--ctstate", "ESTABLISHED"]
    words += ["-j", "REDIRECT", "--to-ports", str(rule.redirect)] if rule.redirect else ["-j", "RETURN"]
    return words


def read_iptables_rule(chain: Chain, family: Family, words: Sequence[str]) -> Rule | None:
    """The rule whose `iptables_words` these are, whatever their order; None when they are no rule of ours."""
    value = dict(itertools.pairwise(words))
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
            mark=int(value.get("--mark", "0"), 0),
            uid=int(value["--uid-owner"]) if "--uid-owner" in value else None,
            gid=int(value["--gid-owner"]) if "--gid-owner" in value else None,
            source=value.get("-s", ""),
            destination=value.get("-d", ""),
            local="!" not in value if "--dst-type" in value else None,
            ports=Ports(int(ports[0]), int(ports[-1])) if ports[0] else None,
            hold="--ctstate" in value,
            redirect=int(value.get("--to-ports", "0")),
        )
    except ValueError:
        return None
    # Whatever the reading above passed over makes the two differ.
    return rule if sorted(iptables_words(rule)) == sorted(words) else None


def _bare(cidr: str) -> str:
    """A host as nft prints it, without the prefix length."""
    return cidr.removesuffix("/128" if ":" in cidr else "/32")
