"""A rule as nf_tables expressions, and back. A match loads a value into a register, may mask it, and compares it.

Numbers and structs of linux/netfilter/nf_tables.h; header offsets of RFC 791, RFC 8200 and RFC 9293.
"""

import ipaddress
import struct
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from pyroute2.netlink.nfnetlink.nftsocket import Cmp, Meta

from meshnet_init.backends import Counted
from meshnet_init.plan import CHAIN_IN, Chain, Family, Rule
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
    "ct state": Load("ct", {"KEY": 0}, {"KEY": "NFT_CT_STATE"}),
}

_REGISTER, _VERDICT = 1, 0
_NFPROTO = {"ipv4": b"\x02", "ipv6": b"\x0a"}
_IFNAMSIZ = 16  # linux/if.h
_TCP = b"\x06"
_FIN_SYN_RST_ACK, _SYN = b"\x17", b"\x02"
_RTN_LOCAL = struct.pack("=I", 2)
_ESTABLISHED = struct.pack("=I", 2)  # NF_CT_STATE_BIT(IP_CT_ESTABLISHED)
_NFT_RETURN = -5
_BY_PORT = frozenset({"NF_NAT_RANGE_PROTO_SPECIFIED"})


class Match(NamedTuple):
    """`load` is a key of _LOADS; an empty mask masks nothing."""

    load: str
    value: bytes
    compare: Cmp = Cmp.NFT_CMP_EQ
    mask: bytes = b""


def encode(rule: Rule) -> list[Expression]:
    """Load, mask and compare for each match, a counter, and the verdict."""
    expressions: list[Expression] = []
    loaded = ""
    for match in _matches(rule):
        if match.load != loaded or match.mask:
            loaded = match.load
            load = _LOADS[loaded]
            length = {"LEN": len(match.value)} if load.name == "payload" else {}
            expressions.append(_expression(load.name, DREG=_REGISTER, **load.sent, **length))
        if match.mask:
            zero = bytes(len(match.mask))
            masked = {"LEN": len(zero), "MASK": _data(match.mask), "XOR": _data(zero)}
            expressions.append(_expression("bitwise", SREG=_REGISTER, DREG=_REGISTER, **masked))
        expressions.append(_expression("cmp", SREG=_REGISTER, OP=match.compare.value, DATA=_data(match.value)))
    expressions.append(_expression("counter", BYTES=0, PACKETS=0))
    if rule.redirect:
        expressions.append(_expression("immediate", DREG=_REGISTER, DATA=_data(struct.pack("!H", rule.redirect))))
        expressions.append(_expression("redir", REG_PROTO_MIN=_REGISTER, FLAGS=_BY_PORT))
    else:
        verdict = {"attrs": [("NFTA_DATA_VERDICT", {"attrs": [("NFTA_VERDICT_CODE", _NFT_RETURN)]})]}
        expressions.append(_expression("immediate", DREG=_VERDICT, DATA=verdict))
    return expressions


def decode(chain: Chain, expressions: Iterable[Expression]) -> Counted | None:
    """The rule a kernel message holds, or None where it is none that `encode` writes."""
    matches: list[Match] = []
    loaded, mask, port, returns, redirects = "", b"", b"", False, False
    packets = size = 0
    for expression in expressions:
        name, body = expression.get_attr("NFTA_EXPR_NAME"), expression.get_attr("NFTA_EXPR_DATA")
        if name in ("meta", "payload", "fib", "ct"):
            loaded, mask = _load_name(name, body), b""
        elif name == "bitwise":
            mask = _bytes(body.get_attr("NFTA_BITWISE_MASK"))
        elif name == "cmp":
            compare = Cmp[body.get_attr("NFTA_CMP_OP")]
            matches.append(Match(loaded, _bytes(body.get_attr("NFTA_CMP_DATA")), compare, mask))
        elif name == "counter":
            packets, size = body.get_attr("NFTA_COUNTER_PACKETS"), body.get_attr("NFTA_COUNTER_BYTES")
        elif name == "immediate":
            data = body.get_attr("NFTA_IMMEDIATE_DATA")
            verdict = data.get_attr("NFTA_DATA_VERDICT")
            returns = verdict is not None and verdict.get_attr("NFTA_VERDICT_CODE") == "NFT_RETURN"
            port = b"" if verdict is not None else _bytes(data)
        elif name == "redir":
            redirects = True
        else:
            return None
    if returns == redirects or redirects != (len(port) == 2):
        return None
    redirect = int.from_bytes(port, "big")
    rule = _rule(chain, matches, redirect)
    # Whatever the reading above passed over makes the two differ.
    return Counted(rule, packets, size) if rule is not None and list(_matches(rule)) == matches else None


def _matches(rule: Rule) -> Iterator[Match]:
    """In the order nft(8) prints them."""
    if rule.family != "any":
        yield Match("nfproto", _NFPROTO[rule.family])
    if rule.loopback:
        yield Match("iifname" if rule.chain == CHAIN_IN else "oifname", _interface("lo"))
    if rule.interface:
        yield Match("iifname" if rule.chain == CHAIN_IN else "oifname", _interface(rule.interface))
    if rule.mark:
        yield Match("mark", struct.pack("=I", rule.mark))
    if rule.uid is not None:
        yield Match("skuid", struct.pack("=I", rule.uid))
    if rule.gid is not None:
        yield Match("skgid", struct.pack("=I", rule.gid))
    for end, cidr in (("saddr", rule.source), ("daddr", rule.destination)):
        if cidr:
            network = ipaddress.ip_network(cidr)
            address, (whole, bits) = network.network_address.packed, divmod(network.prefixlen, 8)
            # As nft(8) does: a prefix of whole bytes is that many bytes, compared without a mask.
            mask = network.netmask.packed if bits else b""
            yield Match(f"{rule.family} {end}", address if bits else address[:whole], mask=mask)
    if rule.local is not None:
        yield Match("daddr type", _RTN_LOCAL, Cmp.NFT_CMP_EQ if rule.local else Cmp.NFT_CMP_NEQ)
    if rule.ports is not None or rule.redirect:
        yield Match("l4proto", _TCP)
    if rule.ports is not None:
        first, last = struct.pack("!H", rule.ports.first), struct.pack("!H", rule.ports.last)
        if first == last:
            yield Match("dport", first)
        else:
            yield Match("dport", first, Cmp.NFT_CMP_GTE)
            yield Match("dport", last, Cmp.NFT_CMP_LTE)
    if rule.hold:
        yield Match("ct state", bytes(4), Cmp.NFT_CMP_NEQ, mask=_ESTABLISHED)
    if rule.redirect:
        yield Match("tcp flags", _SYN, mask=_FIN_SYN_RST_ACK)


def _rule(chain: Chain, matches: list[Match], redirect: int) -> Rule | None:
    """The one rule that could have these matches; whether it has, the caller checks."""
    by_load = {match.load: match for match in reversed(matches)}
    family: Family = "any"
    if nfproto := by_load.get("nfproto"):
        family = "ipv6" if nfproto.value == _NFPROTO["ipv6"] else "ipv4"
    ports = [int.from_bytes(match.value, "big") for match in matches if match.load == "dport"]
    local = by_load.get("daddr type")
    interface = by_load.get("iifname") or by_load.get("oifname")
    name = "" if interface is None else _interface_name(interface.value)
    try:
        return Rule(
            chain=chain,
            family=family,
            loopback=name == "lo",
            interface="" if name == "lo" else name,
            mark=_number(by_load.get("mark")) or 0,
            uid=_number(by_load.get("skuid")),
            gid=_number(by_load.get("skgid")),
            source=_cidr(family, by_load.get(f"{family} saddr")),
            destination=_cidr(family, by_load.get(f"{family} daddr")),
            local=None if local is None else local.compare == Cmp.NFT_CMP_EQ,
            ports=Ports(ports[0], ports[-1]) if ports else None,
            hold="ct state" in by_load,
            redirect=redirect,
        )
    except ValueError:  # a mask that is no prefix
        return None


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


def _expression(name: str, **fields: object) -> Expression:
    attributes = [(f"NFTA_{name.upper()}_{key}", value) for key, value in fields.items()]
    return {"attrs": [("NFTA_EXPR_NAME", name), ("NFTA_EXPR_DATA", {"attrs": attributes})]}


def _data(value: bytes) -> Expression:
    return {"attrs": [("NFTA_DATA_VALUE", value)]}


def _bytes(data: Any) -> bytes:
    value = data.get_attr("NFTA_DATA_VALUE")
    return bytes(value) if value is not None else b""
