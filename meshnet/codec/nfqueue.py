"""The kernel's queue of packets that wait for a verdict, as netlink messages (linux/netfilter/nfnetlink_queue.h).

Numbers in nfnetlink's header and attributes are in the network's byte order. A packet is copied as far as TCP's ports
and sequence number: RFC 791, RFC 8200, RFC 9293.
"""

import ipaddress
import struct
from collections.abc import Iterator
from typing import NamedTuple

from meshnet.codec import netlink
from meshnet.codec.netlink import attribute, attributes
from meshnet.model.address import Address, canonical_host

_SUBSYSTEM = 3 << 8  # NFNL_SUBSYS_QUEUE
_PACKET, _VERDICT, _CONFIG = 0, 1, 2  # NFQNL_MSG_*
_BIND, _COPY_PACKET, _FAIL_OPEN = 1, 2, 1  # NFQNL_CFG_CMD_BIND, NFQNL_COPY_PACKET, NFQA_CFG_F_FAIL_OPEN
_CFG_CMD, _CFG_PARAMS, _CFG_QUEUE_MAXLEN, _CFG_MASK, _CFG_FLAGS = 1, 2, 3, 4, 5  # NFQA_CFG_*
_PACKET_HDR, _VERDICT_HDR, _MARK, _PAYLOAD = 1, 2, 3, 10  # NFQA_*
_ACCEPT = 1  # NF_ACCEPT
_COPIED = 80  # bytes: the longest header of IPv4, and of TCP's what is looked at
_TCP = 6

_FAMILY = struct.Struct("!BBH")  # struct nfgenmsg: family, version, number of the queue


class Packet(NamedTuple):
    """One that waits. `mark` is what it has now, `payload` its beginning, from the IP header on."""

    number: int
    mark: int
    payload: bytes


class Syn(NamedTuple):
    """The opening segment of a connection; who sends it again sends the same sequence number."""

    source: Address
    destination: Address
    sequence: int


def bind(queue: int) -> bytes:
    """The kernel gives the packets of this queue to whoever sends this, from now on. Answered by an errno."""
    return _message(_CONFIG, queue, attribute(_CFG_CMD, struct.pack("!BxH", _BIND, 0)), netlink.ACK)


def configure(queue: int, most: int) -> bytes:
    """At most so many wait; who comes then passes without having waited. Answered by an errno."""
    told = (
        (_CFG_PARAMS, struct.pack("!IB", _COPIED, _COPY_PACKET)),
        (_CFG_QUEUE_MAXLEN, struct.pack("!I", most)),
        (_CFG_MASK, struct.pack("!I", _FAIL_OPEN)),
        (_CFG_FLAGS, struct.pack("!I", _FAIL_OPEN)),
    )
    return _message(_CONFIG, queue, b"".join(attribute(kind, value) for kind, value in told), netlink.ACK)


def verdict(queue: int, number: int, mark: int | None = None) -> bytes:
    """That packet goes on, with another mark if one is given. Only a complaint is answered."""
    told = attribute(_VERDICT_HDR, struct.pack("!II", _ACCEPT, number))
    if mark is not None:
        told += attribute(_MARK, struct.pack("!I", mark))
    return _message(_VERDICT, queue, told)


def error_in(data: bytes) -> int:
    """The errno that a request is answered with, 0 where all is well. Raises ValueError for another message."""
    for kind, body in netlink.messages(data):
        if kind == netlink.ERROR:
            return netlink.errno_in(body)
    raise ValueError("not an answer")


def packets(data: bytes) -> Iterator[Packet]:
    """Those in one datagram of the kernel's; what else it says is passed over."""
    for kind, body in netlink.messages(data):
        if kind == _SUBSYSTEM | _PACKET and (found := _packet(body[_FAMILY.size :])) is not None:
            yield found


def syn_in(payload: bytes) -> Syn | None:
    """None where it is nothing that could be one: too short, or not TCP right behind the IP header."""
    version = payload[0] >> 4 if payload else 0
    if version == 4:
        start, kind, hosts, size = (payload[0] & 0xF) * 4, 9, 12, 4
    elif version == 6:
        start, kind, hosts, size = 40, 6, 8, 16
    else:
        return None
    if start < hosts + 2 * size or len(payload) < start + 8 or payload[kind] != _TCP:
        return None
    source, destination = (_host(payload[at : at + size]) for at in (hosts, hosts + size))
    from_port, to_port, sequence = struct.unpack_from("!HHI", payload, start)
    return Syn(Address(source, from_port), Address(destination, to_port), sequence)


def _host(packed: bytes) -> str:
    text = str(ipaddress.ip_address(packed))
    return canonical_host(text) if len(packed) == 16 else text


def _packet(body: memoryview) -> Packet | None:
    number, mark, payload = None, 0, b""
    for kind, value in attributes(body):
        if kind == _PACKET_HDR and len(value) >= 4:
            number = int.from_bytes(value[:4], "big")
        elif kind == _MARK:
            mark = int.from_bytes(value, "big")
        elif kind == _PAYLOAD:
            payload = bytes(value)
    return None if number is None else Packet(number, mark, payload)


def _message(kind: int, queue: int, told: bytes, flags: int = 0) -> bytes:
    return netlink.message(_SUBSYSTEM | kind, netlink.REQUEST | flags, _FAMILY.pack(0, 0, queue) + told)
