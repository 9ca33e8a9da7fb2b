"""The TCP sockets of this network namespace, as the kernel lists them (sock_diag(7)). Takes no rights."""

import socket
import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, TypeVar

T = TypeVar("T")

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST = struct.Struct("=BBBBI48x")  # struct inet_diag_req_v2
_ANSWER = struct.Struct("=BB2x2s2s16s16s12xIIIII")  # struct inet_diag_msg
_V4_MAPPED: Final = bytes(10) + b"\xff\xff"
_MOST = 1 << 17
_INFO = 2  # INET_DIAG_INFO: the attribute with a struct tcp_info
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_TCP_INFO = struct.Struct("=68xII24xI16xQQ")  # rtt, rttvar, total_retrans, bytes_acked, bytes_received

ESTABLISHED, LISTEN = 1, 10  # net/tcp_states.h


class TcpSocket(NamedTuple):
    """Addresses are packed, IPv4 ones in 4 bytes whatever socket has them. `inode` is 0 until a program accepts it."""

    state: int
    local: bytes
    local_port: int
    remote: bytes
    remote_port: int
    uid: int
    inode: int


class TcpInfo(NamedTuple):
    """Of an established socket; see tcp(7), TCP_INFO. `retransmits` and bytes since it was opened."""

    rtt_us: int
    rtt_var_us: int
    retransmits: int
    bytes_sent: int  # that the other side has acknowledged
    bytes_received: int


def tcp_sockets() -> list[TcpSocket]:
    """Those of both families that listen or are established; not of one moment. Raises OSError."""
    return _both(lambda found, _: found, 0)


def tcp_sockets_with_info() -> list[tuple[TcpSocket, TcpInfo | None]]:
    """As `tcp_sockets`, which need not ask each socket. None of one that listens."""
    return _both(lambda found, rest: (found, _info(rest) if found.state != LISTEN else None), 1 << _INFO - 1)


def _both(make: Callable[[TcpSocket, memoryview], T], extensions: int) -> list[T]:
    """What `make` makes of each socket and its attributes."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as netlink:
        return [
            make(found, rest)
            for family in (socket.AF_INET, socket.AF_INET6)
            for found, rest in _dump(netlink, family, extensions)
        ]


def _info(attributes: memoryview) -> TcpInfo | None:
    at = 0
    while at + _ATTRIBUTE.size <= len(attributes):
        size, kind = _ATTRIBUTE.unpack_from(attributes, at)
        if kind == _INFO and size - _ATTRIBUTE.size >= _TCP_INFO.size:
            return TcpInfo._make(_TCP_INFO.unpack_from(attributes, at + _ATTRIBUTE.size))
        at += max(size, _ATTRIBUTE.size) + 3 & ~3
    return None


def host_of(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def _dump(netlink: socket.socket, family: int, extensions: int) -> Iterator[tuple[TcpSocket, memoryview]]:
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, extensions, 0, 1 << ESTABLISHED | 1 << LISTEN)
    size = _HEADER.size + len(body)
    netlink.sendto(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 0, 0) + body, (0, 0))
    while True:
        data, at = netlink.recv(_MOST), 0
        while at < len(data):
            size, kind, _, _, _ = _HEADER.unpack_from(data, at)
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                (code,) = struct.unpack_from("=i", data, at + _HEADER.size)
                raise OSError(-code, "the kernel does not list its TCP sockets")
            family, state, sport, dport, source, target, _, _, _, uid, inode = _ANSWER.unpack_from(
                data, at + _HEADER.size
            )
            found = TcpSocket(
                state,
                _packed(family, source),
                int.from_bytes(sport, "big"),
                _packed(family, target),
                int.from_bytes(dport, "big"),
                uid,
                inode,
            )
            yield found, memoryview(data)[at + _HEADER.size + _ANSWER.size : at + size]
            at += size + 3 & ~3


def _packed(family: int, address: bytes) -> bytes:
    if family == socket.AF_INET:
        return address[:4]
    return address[12:] if address.startswith(_V4_MAPPED) else address
