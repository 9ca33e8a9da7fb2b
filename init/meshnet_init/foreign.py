"""Other programs' rules that may decide about a connection before ours do, or instead of ours.

They are read as text: by `nft list ruleset`, which shows those of iptables-nft too, and by iptables-legacy-save. Only
what a text plainly rules out is left aside; sets, marks and the like may match. Of other nat chains only those count
that translate: whatever else one says, the kernel goes on to the next (nf_nat_inet_fn). In a chain that itself leads to
ours whatever ends the walk counts: what was accepted there never comes to our jump.
"""

import ipaddress
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import msgspec

from meshnet_init.render import KEEPER_TABLE, NFT_TABLE
from meshnet_init.rule import CHAINS, NAT_CHAINS, PLACES, Chain

_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
_LEGACY_PRIORITIES = {"raw": -300, "mangle": -150, "nat": -100, "filter": 0}
_TABLE = re.compile(r"table (\S+) (\S+) \{(?: #.*)?")  # behind it the program that owns it, if one does
_CHAIN = re.compile(r"\tchain (\S+) \{")
_BASE = re.compile(r"\t\ttype (\S+) hook (\S+) (?:device \S+ )?priority (-?\d+);")
_JUMP = re.compile(r"(?:\b(jump|goto)|-([jg])) (\S+)")
_ENDING_TARGETS = {"ACCEPT", "DROP", "REJECT", "QUEUE", "NFQUEUE", "DNAT", "REDIRECT", "NETMAP", "TPROXY"}
_ENDING_WORDS = re.compile(
    r"(?<!policy )\b(?:accept|drop|reject|queue|dnat|redirect|tproxy|DNAT|REDIRECT|NETMAP|TPROXY)\b"
)
_TRANSLATES = re.compile(r"\b(?:redirect|dnat|tproxy|REDIRECT|DNAT|TPROXY|NETMAP)\b")
_STOPS = re.compile(r"\b(?:drop|reject|notrack|tproxy|DROP|REJECT|NOTRACK|TPROXY|CT --notrack)\b")
_COUNTER = re.compile(r" ?counter packets \d+ bytes \d+")
_NFT_PORTS = re.compile(r"\b(?:tcp|th) dport (\{[^}]*\}|\S+)")
_SAVED_PORTS = re.compile(r"(?<!! )--dports? (\S+)")
_DESTINATION = re.compile(r"\bip6? daddr (\{[^}]*\}|[\da-f.:/]+)(?!\S)|(?<!! )-d (\S+)")
_NOT_TCP = re.compile(r"\b(?:udp|icmp|sctp) |-p (?:udp|icmp|sctp|icmpv6)\b")
_STATES = re.compile(r"(?<!! )(?:--(?:ct)?state|\bct state) (\S+)")


class Foreign(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One rule. `text` is as the program says that lists it.

    `ahead`: it is asked before ours, or may be: of two chains with one priority the one made last is, which none tells.
    """

    table: str
    chain: str
    priority: int
    ahead: bool
    text: str


def foreign_rules(backend: str, chain: Chain, target: str, port: int) -> tuple[tuple[Foreign, ...], tuple[str, ...]]:
    """Those that may decide about a connection to `target`, in the order they are asked; and what could not be read.

    `backend` is that of our rules, whose place theirs are compared with.
    """
    family = "ip6" if ":" in target else "ip"
    return _foreign(backend, chain, family, partial(may_match, target=target, port=port))


def asked_first(backend: str) -> tuple[Foreign, ...]:
    """Rules in other tables than ours that may turn a new TCP connection elsewhere before ours are asked.

    No jump of ours can be put ahead of those.
    """
    return tuple(
        each
        for chain in NAT_CHAINS
        for family in ("ip", "ip6")
        for each in _foreign(backend, chain, family, _may_open)[0]
        if each.ahead and _TRANSLATES.search(each.text) and each.table not in _own_tables(backend, chain)
    )


def _foreign(
    backend: str, chain: Chain, family: str, may: Callable[[str], bool]
) -> tuple[tuple[Foreign, ...], tuple[str, ...]]:
    place = PLACES[chain]
    own = place.priority if backend == "nft" else _LEGACY_PRIORITIES[place.table]
    found, unread = [], []
    # One by one: libxtables keeps the first family it is used for, and nft 1.0.6 then prints no target of the other's.
    listed = [_said("nft", "-y", "list", "ruleset", it) for it in (family, "inet")]
    if None in listed:
        unread.append("nftables: nft is not installed, or did not work")
    for nft in filter(None, listed):
        found += list(_of_nft(nft, chain, may))
    for table in _legacy_tables(family):
        saved = _said(f"{family}tables-legacy-save", "-t", table) or _said(f"{family}tables-save", "-t", table)
        if saved is None:
            unread.append(f"the legacy table {table}: iptables-legacy-save is not installed")
        else:
            found += list(_of_save(saved, f"legacy {family} {table}", chain, may))
    families = {"inet", family, f"legacy {family}"}
    placed = [
        each if each.table in _own_tables(backend, chain) else msgspec.structs.replace(each, ahead=each.priority <= own)
        for each in found
        if each.table.rpartition(" ")[0] in families
    ]
    return tuple(sorted(placed, key=lambda each: each.priority)), tuple(unread)


def _own_tables(backend: str, chain: Chain) -> tuple[str, ...]:
    """Those that lead to our chains, as they are named here."""
    if backend == "nft":
        return (f"inet {NFT_TABLE}",)
    kind = "legacy " if backend == "legacy" else ""
    return tuple(f"{kind}{family} {PLACES[chain].table}" for family in ("ip", "ip6"))


def standing_ahead(chains: Mapping[str, Sequence[str]], ours: Chain) -> tuple[str, ...]:
    """The rules that may end the way of a new TCP connection in the built-in chain that leads to `ours`, ahead of that.

    `chains` are one table's, as iptables-save prints their rules. Each is a rule of the built-in chain, with what it
    leads to in brackets.
    """
    found: dict[str, str] = {}
    for it in _reachable(chains, PLACES[ours].hook, ours, _may_open):
        if it.ahead and it.ends:
            found.setdefault(it.by, it.rule)
    return tuple(by if by == rule else f"{by} ({rule})" for by, rule in found.items())


def _of_nft(text: str, ours: Chain, may: Callable[[str], bool]) -> Iterator[Foreign]:
    tables: dict[str, dict[str, list[str]]] = {}
    table = chain = ""
    for line in text.splitlines():
        if match := _TABLE.fullmatch(line):
            table = f"{match[1]} {match[2]}"
            tables[table] = {}
        elif match := _CHAIN.fullmatch(line):
            chain = match[1]
            tables[table][chain] = []
        elif line.startswith("\t\t") and chain:
            tables[table][chain].append(line)
        elif line == "\t}":
            chain = ""
    for name, chains in tables.items():
        if name in (f"inet {NFT_TABLE}", f"inet {KEEPER_TABLE}"):
            continue
        for base, lines in chains.items():
            hooked = _BASE.match(lines[0]) if lines else None
            if hooked is not None and hooked[2] == PLACES[ours].hook.lower():
                deciding = _TRANSLATES if hooked[1] == "nat" else _STOPS
                priority = int(hooked[3])
                for it in _reachable(chains, base, ours, may):
                    if deciding.search(it.rule) or (it.ahead and it.ends):
                        rule = _COUNTER.sub("", it.rule).strip()
                        yield Foreign(table=name, chain=base, priority=priority, ahead=it.ahead, text=rule)


def _of_save(text: str, table: str, ours: Chain, may: Callable[[str], bool]) -> Iterator[Foreign]:
    chains: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("-A "):
            _, chain, rule = line.split(" ", 2)
            chains.setdefault(chain, []).append(rule)
    kind = table.rpartition(" ")[2]
    priority = _LEGACY_PRIORITIES[kind]
    hook = PLACES[ours].hook
    deciding = _TRANSLATES if kind == "nat" else _STOPS
    for it in _reachable(chains, hook, ours, may):
        if deciding.search(it.rule) or (it.ahead and it.ends):
            yield Foreign(table=table, chain=hook, priority=priority, ahead=it.ahead, text=it.rule)


class _Reached(NamedTuple):
    """`by`: the rule of the base chain that it is or that leads to it. `ahead`: a jump to ours comes behind it.

    `ends`: what matches it comes to no rule of the base chain behind that.
    """

    rule: str
    by: str
    ahead: bool
    ends: bool


def _reachable(
    chains: Mapping[str, Sequence[str]], base: str, ours: Chain, may: Callable[[str], bool]
) -> list[_Reached]:
    """Rules of `base` and of the chains it leads to, but for ours, as far as they `may` match."""
    found: list[tuple[str, str, bool]] = []
    ours_at = -1
    seen = set()

    def visit(name: str, by: str) -> None:
        nonlocal ours_at
        seen.add(name)
        for rule in chains.get(name, ()):
            if not may(rule):
                continue
            match = _JUMP.search(rule)
            verb, to = (match[1] or match[2], match[3]) if match else ("", "")
            ends = to in _ENDING_TARGETS if to else bool(_ENDING_WORDS.search(rule))
            if name == base:  # whoever returns from there, or goes from there for good, is done with it
                ends |= verb in ("goto", "g") or to == "RETURN" or (not to and "return" in rule.split())
            found.append((rule, by or rule, ends))
            if to == ours:
                ours_at = len(found)
            elif to in chains and to not in seen and to not in CHAINS:
                visit(to, by or rule)

    visit(base, "")
    return [_Reached(rule, by, at < ours_at, ends) for at, (rule, by, ends) in enumerate(found)]


def _may_open(text: str) -> bool:
    """Whether a rule as iptables-save prints it may match the packet that opens a TCP connection; in doubt it may."""
    states = _STATES.search(text)
    return not _NOT_TCP.search(text) and (states is None or "NEW" in states[1].upper())


def may_match(text: str, target: str, port: int) -> bool:
    """Whether a rule as nft or iptables-save prints it may be about TCP to `target`; in doubt it may."""
    if _NOT_TCP.search(text):
        return False
    ports = _NFT_PORTS.search(text) or _SAVED_PORTS.search(text)
    if ports is not None and not _has_port(ports[1], port):
        return False
    destination = _DESTINATION.search(text)
    return destination is None or _has_host(destination[1] or destination[2], target)


def _has_port(text: str, port: int) -> bool:
    for part in text.strip("{ }").replace(":", "-").split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            return True  # a set, or a name
        if int(first) <= port <= int(last or first):
            return True
    return False


def _has_host(text: str, host: str) -> bool:
    for part in text.strip("{ }").split(","):
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(part.strip(), strict=False):
                return True
        except ValueError:  # a range, or a set
            return True
    return False


def _legacy_tables(family: str) -> list[str]:
    try:
        with open(f"/proc/thread-self/net/{family}_tables_names") as file:
            return [name for name in file.read().split() if name in _LEGACY_PRIORITIES]
    except OSError:
        return []


def _said(program: str, *arguments: str) -> str | None:
    path = shutil.which(program, path=_PATH)
    if path is None:
        return None
    done = subprocess.run([path, *arguments], capture_output=True, text=True, errors="replace", check=False)
    return done.stdout if done.returncode == 0 else None
