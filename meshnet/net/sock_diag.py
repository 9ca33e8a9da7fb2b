"""The TCP sockets of this network namespace, as the kernel lists them (sock_diag(7)). Takes no rights."""

import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST = struct.Struct("=BBBBI48x")  # struct inet_diag_req_v2
_ANSWER = struct.Struct("=BB2x2s2s16s16s12xIIIII")  # struct inet_diag_msg
_V4_MAPPED: Final = bytes(10) + b"\xff\xff"
_MOST = 1 << 17

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


def tcp_sockets() -> list[TcpSocket]:
    """Those of both families that listen or are established; not of one moment. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as netlink:
        return [found for family in (socket.AF_INET, socket.AF_INET6) for found in _dump(netlink, family)]


def host_of(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def _dump(netlink: socket.socket, family: int) -> Iterator[TcpSocket]:
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << ESTABLISHED | 1 << LISTEN)
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
            yield TcpSocket(
                state,
                _packed(family, source),
                int.from_bytes(sport, "big"),
                _packed(family, target),
                int.from_bytes(dport, "big"),
                uid,
                inode,
            )
            at += size + 3 & ~3


def _packed(family: int, address: bytes) -> bytes:
    if family == socket.AF_INET:
        return address[:4]
    return address[12:] if address.startswith(_V4_MAPPED) else address
