"""Other programs' rules that may decide about a connection before ours do, or instead of ours.

They are read as text: by `nft list ruleset`, which shows those of iptables-nft too, and by iptables-legacy-save. Only
what a text plainly rules out is left aside; sets, marks and the like may match. Of nat chains only those count that
translate: whatever else one says, the kernel goes on to the next (nf_nat_inet_fn).
"""

import ipaddress
import os
import re
import shutil
import subprocess
from collections.abc import Iterator

import msgspec

from meshnet_init.render import KEEPER_TABLE, NFT_TABLE
from meshnet_init.rule import PLACES, Chain

_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
_LEGACY_PRIORITIES = {"raw": -300, "mangle": -150, "nat": -100, "filter": 0}
_TABLE = re.compile(r"table (\S+) (\S+) \{")
_CHAIN = re.compile(r"\tchain (\S+) \{")
_BASE = re.compile(r"\t\ttype (\S+) hook (\S+) (?:device \S+ )?priority (-?\d+);")
_JUMP = re.compile(r"\b(?:jump|goto) (\S+)|-[jg] (\S+)")
_TRANSLATES = re.compile(r"\b(?:redirect|dnat|tproxy|REDIRECT|DNAT|TPROXY|NETMAP)\b")
_STOPS = re.compile(r"\b(?:drop|reject|notrack|tproxy|DROP|REJECT|NOTRACK|TPROXY|CT --notrack)\b")
_COUNTER = re.compile(r" ?counter packets \d+ bytes \d+")
_NFT_PORTS = re.compile(r"\b(?:tcp|th) dport (\{[^}]*\}|\S+)")
_SAVED_PORTS = re.compile(r"(?<!! )--dports? (\S+)")
_DESTINATION = re.compile(r"\bip6? daddr (\{[^}]*\}|[\da-f.:/]+)(?!\S)|(?<!! )-d (\S+)")
_NOT_TCP = re.compile(r"\b(?:udp|icmp|sctp) |-p (?:udp|icmp|sctp|icmpv6)\b")


class Foreign(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One rule. `ahead`: it is asked before ours. `text` is as the program says that lists it."""

    table: str
    chain: str
    priority: int
    ahead: bool
    text: str


def foreign_rules(backend: str, chain: Chain, target: str, port: int) -> tuple[tuple[Foreign, ...], tuple[str, ...]]:
    """Those that may decide about a connection to `target`, in the order they are asked; and what could not be read.

    `backend` is that of our rules, whose place theirs are compared with.
    """
    place = PLACES[chain]
    own = place.priority if backend == "nft" else _LEGACY_PRIORITIES[place.table]
    found, unread = [], []
    nft = _said("nft", "-y", "list", "ruleset")
    if nft is None:
        unread.append("nftables: nft is not installed, or did not work")
    else:
        found += list(_of_nft(nft, chain, own))
    family = "ip6" if ":" in target else "ip"
    for table in _legacy_tables(family):
        saved = _said(f"{family}tables-legacy-save", "-t", table) or _said(f"{family}tables-save", "-t", table)
        if saved is None:
            unread.append(f"the legacy table {table}: iptables-legacy-save is not installed")
        else:
            found += list(_of_save(saved, f"legacy {family} {table}", chain, own))
    families = {"inet", family, f"legacy {family}"}
    mine = [each for each in found if each.table.rpartition(" ")[0] in families and may_match(each.text, target, port)]
    return tuple(sorted(mine, key=lambda each: each.priority)), tuple(unread)


def _of_nft(text: str, ours: Chain, own: int) -> Iterator[Foreign]:
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
                for rule, ahead in _reachable(chains, base, ours):
                    if deciding.search(rule):
                        text = _COUNTER.sub("", rule).strip()
                        yield Foreign(
                            table=name, chain=base, priority=priority, ahead=ahead or priority < own, text=text
                        )


def _of_save(text: str, table: str, ours: Chain, own: int) -> Iterator[Foreign]:
    chains: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("-A "):
            _, chain, rule = line.split(" ", 2)
            chains.setdefault(chain, []).append(rule)
    kind = table.rpartition(" ")[2]
    priority = _LEGACY_PRIORITIES[kind]
    hook = PLACES[ours].hook
    for rule, ahead in _reachable(chains, hook, ours):
        if (_TRANSLATES if kind == "nat" else _STOPS).search(rule):
            yield Foreign(table=table, chain=hook, priority=priority, ahead=ahead or priority < own, text=rule)


def _reachable(chains: dict[str, list[str]], base: str, ours: Chain) -> list[tuple[str, bool]]:
    """Rules of `base` and of the chains it leads to, each with whether a jump to ours comes behind it."""
    found: list[str] = []
    ours_at = -1
    seen = set()

    def visit(name: str) -> None:
        nonlocal ours_at
        seen.add(name)
        for rule in chains.get(name, []):
            found.append(rule)
            match = _JUMP.search(rule)
            to = (match[1] or match[2]) if match else ""
            if to == ours:
                ours_at = len(found)
            elif to in chains and to not in seen:
                visit(to)

    visit(base)
    return [(rule, at < ours_at) for at, rule in enumerate(found)]


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
