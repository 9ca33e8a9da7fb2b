"""A rule as nf_tables expressions, and back. A match loads a value into a register, may mask it, and compares it.

Numbers and structs of linux/netfilter/nf_tables.h; header offsets of RFC 791, RFC 8200 and RFC 9293.
"""

import ipaddress
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from pyroute2.netlink.nfnetlink.nftsocket import Cmp, Meta, nft_contains_expr

from meshnet_init.backends import Counted
from meshnet_init.backends.cgroups import cgroup_id, cgroup_path
from meshnet_init.rule import Chain, Family, Rule, Verdict, arriving
from meshnet_init.values import Ports

Expression = Any  # pyroute2's dictionary of attributes


class Load(NamedTuple):
    """An expression that puts a value into the register: attributes as sent, and as pyroute2 shows them when read."""

    name: str
    sent: dict[str, object]
    shown: dict[str, object]


def _meta(key: Meta) -> Load:
    return Load("meta", {"KEY": key.value}, {"KEY": key.name})


def _header(base: int, offset: int) -> Load:
    return Load("payload", {"BASE": base, "OFFSET": offset}, {"BASE": _BASES[base], "OFFSET": offset})


_NETWORK, _TRANSPORT = 1, 2
_BASES = {_NETWORK: "NFT_PAYLOAD_NETWORK_HEADER", _TRANSPORT: "NFT_PAYLOAD_TRANSPORT_HEADER"}
# NFT_FIB_RESULT_ADDRTYPE is 3, which pyroute2 takes for two flags; NFTA_FIB_F_DADDR is 2, which it takes for an index.
_FIB_ADDRTYPE = frozenset({"NFT_FIB_RESULT_UNSPEC", "NFT_FIB_RESULT_OIF"})

_LOADS = {
    "nfproto": _meta(Meta.NFT_META_NFPROTO),
    "iifname": _meta(Meta.NFT_META_IIFNAME),
    "oifname": _meta(Meta.NFT_META_OIFNAME),
    "mark": _meta(Meta.NFT_META_MARK),
    "skuid": _meta(Meta.NFT_META_SKUID),
    "skgid": _meta(Meta.NFT_META_SKGID),
    "l4proto": _meta(Meta.NFT_META_L4PROTO),
    "ipv4 saddr": _header(_NETWORK, 12),
    "ipv4 daddr": _header(_NETWORK, 16),
    "ipv6 saddr": _header(_NETWORK, 8),
    "ipv6 daddr": _header(_NETWORK, 24),
    "dport": _header(_TRANSPORT, 2),
    "tcp flags": _header(_TRANSPORT, 13),
    "daddr type": Load(
        "fib",
        {"RESULT": _FIB_ADDRTYPE, "FLAGS": 2},
        {"RESULT": _FIB_ADDRTYPE, "FLAGS": "NFTA_FIB_F_MARK"},
    ),
    "connmark": Load("ct", {"KEY": 3}, {"KEY": "NFT_CT_MARK"}),
    "cgroup": Load("socket", {"KEY": 3}, {"KEY": "NFT_SOCKET_CGROUPV2"}),
    "ct state": Load("ct", {"KEY": 0}, {"KEY": "NFT_CT_STATE"}),
}

# pyroute2 0.9.7 does not know of cgroups.
_socket: Any = nft_contains_expr.nft_expr.nft_socket
_socket.socket_keys.ops[3] = "NFT_SOCKET_CGROUPV2"
if "NFTA_SOCKET_LEVEL" not in dict(_socket.nla_map):
    _socket.nla_map = (*_socket.nla_map, ("NFTA_SOCKET_LEVEL", "be32"))

_REGISTER, _VERDICT = 1, 0
_NFPROTO = {"ipv4": b"\x02", "ipv6": b"\x0a"}
_IFNAMSIZ = 16  # linux/if.h
_TCP, _UDP = b"\x06", b"\x11"
_FIN_SYN_RST_ACK, _SYN = b"\x17", b"\x02"
_RTN_LOCAL = struct.pack("=I", 2)
_INVALID = struct.pack("=I", 1)  # NF_CT_STATE_INVALID_BIT
_ESTABLISHED = struct.pack("=I", 2)  # NF_CT_STATE_BIT(IP_CT_ESTABLISHED)
_NFT_RETURN, _NF_DROP, _NF_ACCEPT = -5, 0, 1
_QUEUE_BYPASS, _BYPASS_SHOWN = 1, frozenset({"NFT_QUEUE_FLAG_BYPASS"})  # pyroute2 writes the number, and reads names
_VERDICTS = {"NFT_RETURN": "return", "NF_DROP": "drop", "NF_ACCEPT": "accept"}
_TCP_RST, _ICMPX_UNREACH = 1, 2
_ICMPX_PORT, _ICMPX_HOST = 1, 2  # NFT_REJECT_ICMPX_PORT_UNREACH, _HOST_UNREACH
_REJECTS = {
    ("NFT_REJECT_TCP_RST", ""): "reset",
    ("NFT_REJECT_ICMPX_UNREACH", "NFT_REJECT_ICMPX_PORT_UNREACH"): "reject",
    ("NFT_REJECT_ICMPX_UNREACH", "NFT_REJECT_ICMPX_HOST_UNREACH"): "unreachable",
}
_UNSPEC = b"\0"  # NFPROTO_UNSPEC: of either family
_PORT_SIZE = 2
_BY_PORT = frozenset({"NF_NAT_RANGE_PROTO_SPECIFIED"})


_CORE = "nf_tables"
# Whose module is not of the expression's name.
_OF_THE_CORE = frozenset({"table", "chain", "meta", "payload", "bitwise", "cmp", "immediate", "counter"})
_OF_EACH_FAMILY = frozenset({"fib", "reject"})


class Match(NamedTuple):
    """`load` is a key of _LOADS; an empty mask masks nothing."""

    load: str
    value: bytes
    compare: Cmp = Cmp.NFT_CMP_EQ
    mask: bytes = b""


def encode(rule: Rule, cgroup_id: Callable[[str], int] = cgroup_id) -> list[Expression]:
    """Load, mask and compare for each match, a counter, and what is done."""
    expressions: list[Expression] = []
    loaded = ""
    for match in _matches(rule, cgroup_id):
        if match.load != loaded or match.mask:
            loaded = match.load
            load = _LOADS[loaded]
            more = {"LEN": len(match.value)} if load.name == "payload" else {}
            if loaded == "cgroup":
                more = {"LEVEL": rule.cgroup.count("/") + 1}
            expressions.append(_expression(load.name, DREG=_REGISTER, **load.sent, **more))
        if match.mask:
            expressions.append(_bitwise(match.mask, bytes(len(match.mask))))
        expressions.append(_expression("cmp", SREG=_REGISTER, OP=match.compare.value, DATA=_data(match.value)))
    expressions.append(_expression("counter", BYTES=0, PACKETS=0))
    return [*expressions, *_action(rule)]


def parts_of(rule: Rule) -> frozenset[str]:
    """What it loads and does that a kernel with nf_tables may lack, each by the name of its expression first; all of it
    where there is nothing of that sort.
    """
    loads = {match.load for match in _matches(rule, lambda _: 0)}
    actions = {expression["attrs"][0][1] for expression in _action(rule)}
    named = actions | {f"{_LOADS[load].name} {load.removeprefix('ct ')}" for load in loads}
    return frozenset({part for part in named if module_of(part) != _CORE} or named)


def module_of(part: str) -> str:
    """The kernel's module that has one of `parts_of`, or `chain TYPE`, or `table`."""
    name = part.partition(" ")[0]
    if name in _OF_THE_CORE:
        return "nft_chain_nat" if part == "chain nat" else _CORE
    return f"nft_{name}_inet" if name in _OF_EACH_FAMILY else f"nft_{name}"


def _action(rule: Rule) -> Iterator[Expression]:
    if rule.redirect or rule.tproxy:
        port = struct.pack("!H", rule.redirect or rule.tproxy)
        yield _expression("immediate", DREG=_REGISTER, DATA=_data(port))
    if rule.redirect:
        yield _expression("redir", REG_PROTO_MIN=_REGISTER, FLAGS=_BY_PORT)
    elif rule.tproxy:
        family = _NFPROTO.get(rule.family, _UNSPEC)
        yield _expression("tproxy", FAMILY=family[0], REG_PORT=_REGISTER)
        if rule.tproxy_mark:
            yield from _set_bits("meta", _LOADS["mark"], rule.tproxy_mark)
        yield _verdict(_NF_ACCEPT)
    elif rule.queue:
        yield _expression("queue", NUM=rule.queue, TOTAL=1, FLAGS=_QUEUE_BYPASS)
    elif rule.verdict == "save":
        yield from _set_bits("ct", _LOADS["connmark"], rule.mark)
    elif rule.verdict == "restore":
        yield from _set_bits("meta", _LOADS["mark"], rule.connmark)
    elif rule.verdict == "reset":
        yield _expression("reject", TYPE=_TCP_RST, ICMP_CODE=0)
    elif rule.verdict == "reject":
        yield _expression("reject", TYPE=_ICMPX_UNREACH, ICMP_CODE=_ICMPX_PORT)
    elif rule.verdict == "unreachable":
        yield _expression("reject", TYPE=_ICMPX_UNREACH, ICMP_CODE=_ICMPX_HOST)
    else:
        yield _verdict(_NF_DROP if rule.verdict == "drop" else _NFT_RETURN)


def _set_bits(kind: str, load: Load, bits: int) -> Iterator[Expression]:
    """Into the mark that `load` loads: the others stay."""
    yield _expression(kind, DREG=_REGISTER, **load.sent)
    yield _bitwise(struct.pack("=I", ~bits & 0xFFFFFFFF), struct.pack("=I", bits))
    yield _expression(kind, SREG=_REGISTER, **load.sent)


class Done(NamedTuple):
    """What a rule does, as far as the kernel has told it yet. `bits` are those set in the mark that was loaded."""

    redirect: int = 0
    tproxy: int = 0
    queue: int = 0
    verdict: Verdict = "return"
    bits: int = 0


def decode(
    chain: Chain, expressions: Iterable[Expression], cgroup_path: Callable[[int], str] = cgroup_path
) -> Counted | None:
    """The rule a kernel message holds, or None where it is none that `encode` writes."""
    named = [(expr.get_attr("NFTA_EXPR_NAME"), expr.get_attr("NFTA_EXPR_DATA")) for expr in expressions]
    # What people and programs write by hand has no counter; then what is done begins with the verdict.
    at = next((at for at, (name, _) in enumerate(named) if name in ("counter", "immediate", "reject", "queue")), None)
    if at is None:
        return None
    counted = named[at][0] == "counter"
    matches: list[Match] = []
    loaded, mask = "", b""
    for name, body in named[:at]:
        if name in ("meta", "payload", "fib", "ct", "socket"):
            loaded, mask = _load_name(name, body), b""
        elif name == "bitwise":
            mask = _bytes(body.get_attr("NFTA_BITWISE_MASK"))
        elif name == "cmp":
            compare = Cmp[body.get_attr("NFTA_CMP_OP")]
            matches.append(Match(loaded, _bytes(body.get_attr("NFTA_CMP_DATA")), compare, mask))
        else:
            return None
    done = _done(named[at + counted :])
    rule = _rule(chain, matches, done, cgroup_path) if done is not None else None
    # Whatever the reading above passed over makes the two differ.
    if rule is None or list(_matches(rule, lambda _: _cgroup_of(matches))) != matches:
        return None
    if not counted:
        return Counted(rule)
    counter = named[at][1]
    return Counted(rule, counter.get_attr("NFTA_COUNTER_PACKETS"), counter.get_attr("NFTA_COUNTER_BYTES"))


def _done(expressions: list[tuple[str, Any]]) -> Done | None:
    """None where it is nothing that `_action` writes."""
    said = [_said(name, body) for name, body in expressions]
    if [name for name, _ in expressions] == ["queue"]:
        return _queued(expressions[0][1])
    match said:
        case ["return"] | ["drop"] | ["reset"] | ["reject"] | ["unreachable"]:
            return Done(verdict=said[0])
        case [int(port), "redir"]:
            return Done(redirect=port)
        case [int(port), "tproxy", "accept"]:
            return Done(tproxy=port)
        case [int(port), "tproxy", "load mark", (int(bits),), "set mark", "accept"]:
            return Done(tproxy=port, bits=bits)
        case ["load connmark", (int(bits),), "set connmark"]:
            return Done(verdict="save", bits=bits)
        case ["load mark", (int(bits),), "set mark"]:
            return Done(verdict="restore", bits=bits)
        case _:
            return None


def _queued(body: Any) -> Done | None:
    """One queue, which those pass whom nobody waits for."""
    shown = (body.get_attr("NFTA_QUEUE_TOTAL"), body.get_attr("NFTA_QUEUE_FLAGS"))
    return Done(queue=body.get_attr("NFTA_QUEUE_NUM")) if shown == (1, _BYPASS_SHOWN) else None


def _said(name: str, body: Any) -> Any:
    """One expression of an action as a word; a port as its number, bits to set as a tuple of one."""
    if name in ("meta", "ct"):
        loaded = _load_name(name, body)
        return f"{'load' if body.get_attr(f'NFTA_{name.upper()}_DREG') is not None else 'set'} {loaded}"
    if name == "bitwise":
        mask, xor = (_bytes(body.get_attr(f"NFTA_BITWISE_{part}")) for part in ("MASK", "XOR"))
        bits = int.from_bytes(xor, sys.byteorder)
        return (bits,) if int.from_bytes(mask, sys.byteorder) == ~bits & 0xFFFFFFFF else None
    if name == "reject":
        shown = body.get_attr("NFTA_REJECT_TYPE"), body.get_attr("NFTA_REJECT_ICMP_CODE")
        return _REJECTS.get((str(shown[0]), str(shown[1]) if "ICMPX" in str(shown[0]) else ""))
    if name == "immediate":
        data = body.get_attr("NFTA_IMMEDIATE_DATA")
        verdict = data.get_attr("NFTA_DATA_VERDICT")
        if verdict is not None:
            return _VERDICTS.get(verdict.get_attr("NFTA_VERDICT_CODE"))
        value = _bytes(data)
        return int.from_bytes(value, "big") if len(value) == _PORT_SIZE else None
    return name if name in ("redir", "tproxy") else None


def _matches(rule: Rule, cgroup_id: Callable[[str], int]) -> Iterator[Match]:
    """In the order nft(8) prints them."""
    if rule.family != "any":
        yield Match("nfproto", _NFPROTO[rule.family])
    side = "iifname" if arriving(rule.chain) else "oifname"
    if rule.loopback:
        yield Match(side, _interface("lo"))
    if rule.interface:
        yield Match(side, _interface(rule.interface))
    for load, bits in (("mark", rule.mark), ("connmark", rule.connmark)):
        if bits:
            yield Match(load, struct.pack("=I", bits), mask=struct.pack("=I", bits))
    if rule.uid is not None:
        yield Match("skuid", struct.pack("=I", rule.uid))
    if rule.gid is not None:
        yield Match("skgid", struct.pack("=I", rule.gid))
    if rule.cgroup:
        yield Match("cgroup", struct.pack("=Q", cgroup_id(rule.cgroup)))
    for end, cidr in (("saddr", rule.source), ("daddr", rule.destination)):
        if cidr:
            network = ipaddress.ip_network(cidr)
            address, (whole, bits) = network.network_address.packed, divmod(network.prefixlen, 8)
            # As nft(8) does: a prefix of whole bytes is that many bytes, compared without a mask.
            mask = network.netmask.packed if bits else b""
            yield Match(f"{rule.family} {end}", address if bits else address[:whole], mask=mask)
    if rule.local is not None:
        yield Match("daddr type", _RTN_LOCAL, Cmp.NFT_CMP_EQ if rule.local else Cmp.NFT_CMP_NEQ)
    if rule.udp or rule.of_tcp():
        yield Match("l4proto", _UDP if rule.udp else _TCP)
    if rule.ports is not None:
        first, last = struct.pack("!H", rule.ports.first), struct.pack("!H", rule.ports.last)
        if first == last:
            yield Match("dport", first)
        else:
            yield Match("dport", first, Cmp.NFT_CMP_GTE)
            yield Match("dport", last, Cmp.NFT_CMP_LTE)
    for asked, state in ((rule.established, _ESTABLISHED), (rule.invalid, _INVALID)):
        if asked:
            yield Match("ct state", bytes(4), Cmp.NFT_CMP_NEQ, mask=state)
    if rule.opening():
        yield Match("tcp flags", _SYN, mask=_FIN_SYN_RST_ACK)


def _rule(chain: Chain, matches: list[Match], done: Done, cgroup_path: Callable[[int], str]) -> Rule | None:
    """The one rule that could have these matches; whether it has, the caller checks."""
    by_load = {match.load: match for match in reversed(matches)}
    family: Family = "any"
    if nfproto := by_load.get("nfproto"):
        family = "ipv6" if nfproto.value == _NFPROTO["ipv6"] else "ipv4"
    ports = [int.from_bytes(match.value, "big") for match in matches if match.load == "dport"]
    local = by_load.get("daddr type")
    interface = by_load.get("iifname") or by_load.get("oifname")
    name = "" if interface is None else _interface_name(interface.value)
    mark, connmark = _number(by_load.get("mark")) or 0, _number(by_load.get("connmark")) or 0
    if done.verdict in ("save", "restore") and done.bits != (mark if done.verdict == "save" else connmark):
        return None
    try:
        return Rule(
            chain=chain,
            family=family,
            loopback=name == "lo",
            interface="" if name == "lo" else name,
            mark=mark,
            connmark=connmark,
            uid=_number(by_load.get("skuid")),
            gid=_number(by_load.get("skgid")),
            cgroup=cgroup_path(_cgroup_of(matches)) if "cgroup" in by_load else "",
            source=_cidr(family, by_load.get(f"{family} saddr")),
            destination=_cidr(family, by_load.get(f"{family} daddr")),
            local=None if local is None else local.compare == Cmp.NFT_CMP_EQ,
            udp="l4proto" in by_load and by_load["l4proto"].value == _UDP,
            ports=Ports(ports[0], ports[-1]) if ports else None,
            established="ct state" in by_load and by_load["ct state"].mask == _ESTABLISHED,
            invalid="ct state" in by_load and by_load["ct state"].mask == _INVALID,
            redirect=done.redirect,
            tproxy=done.tproxy,
            tproxy_mark=done.bits if done.tproxy else 0,
            queue=done.queue,
            verdict=done.verdict,
        )
    except ValueError:  # a mask that is no prefix
        return None


def _cgroup_of(matches: list[Match]) -> int:
    return next((int.from_bytes(match.value, sys.byteorder) for match in matches if match.load == "cgroup"), 0)


def _interface(name: str) -> bytes:
    """A name is compared whole, IFNAMSIZ bytes; the beginning of names as far as it goes."""
    return name[:-1].encode() if name.endswith("*") else name.encode().ljust(_IFNAMSIZ, b"\0")


def _interface_name(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace") + ("*" if len(value) < _IFNAMSIZ else "")


def _cidr(family: Family, match: Match | None) -> str:
    if match is None:
        return ""
    bits = int.from_bytes(match.mask, "big").bit_count() if match.mask else len(match.value) * 8
    return str(ipaddress.ip_network((match.value.ljust(16 if family == "ipv6" else 4, b"\0"), bits)))


def _number(match: Match | None) -> int | None:
    return None if match is None else int.from_bytes(match.value, sys.byteorder)


def _load_name(name: str, body: Any) -> str:
    """The key of _LOADS for an expression the kernel sent; empty for one we do not write."""
    for key, load in _LOADS.items():
        if load.name == name and all(body.get_attr(f"NFTA_{name.upper()}_{k}") == v for k, v in load.shown.items()):
            return key
    return ""


def _bitwise(mask: bytes, xor: bytes) -> Expression:
    return _expression("bitwise", SREG=_REGISTER, DREG=_REGISTER, LEN=len(mask), MASK=_data(mask), XOR=_data(xor))


def _verdict(code: int) -> Expression:
    verdict = {"attrs": [("NFTA_DATA_VERDICT", {"attrs": [("NFTA_VERDICT_CODE", code)]})]}
    return _expression("immediate", DREG=_VERDICT, DATA=verdict)


def _expression(name: str, **fields: object) -> Expression:
    attributes = [(f"NFTA_{name.upper()}_{key}", value) for key, value in fields.items()]
    return {"attrs": [("NFTA_EXPR_NAME", name), ("NFTA_EXPR_DATA", {"attrs": attributes})]}


def _data(value: bytes) -> Expression:
    return {"attrs": [("NFTA_DATA_VALUE", value)]}


def _bytes(data: Any) -> bytes:
    value = data.get_attr("NFTA_DATA_VALUE")
    return bytes(value) if value is not None else b""
