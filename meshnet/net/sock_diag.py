"""The TCP sockets of this network namespace, as the kernel lists them (sock_diag(7)). Takes no rights."""

import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from meshnet.codec import netlink

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_REQUEST = struct.Struct("=BBBBI48x")  # struct inet_diag_req_v2
_ENDS = struct.Struct(">BB2xHH16s16s")  # the beginning of struct inet_diag_msg: ports in the network's order
_OWNER = struct.Struct("=64xII")  # its end
_V4_MAPPED: Final = bytes(10) + b"\xff\xff"
_MOST = 1 << 17
_INFO = 2  # INET_DIAG_INFO: the attribute with a struct tcp_info
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
    return [found for found, _ in _dump(0)]


def tcp_sockets_with_info() -> list[tuple[TcpSocket, TcpInfo | None]]:
    """As `tcp_sockets`, which need not ask each socket. None of one that listens."""
    return [(found, _info(rest) if found.state != LISTEN else None) for found, rest in _dump(1 << _INFO - 1)]


def _info(attributes: memoryview) -> TcpInfo | None:
    for kind, value in netlink.attributes(attributes):
        if kind == _INFO and len(value) >= _TCP_INFO.size:
            return TcpInfo._make(_TCP_INFO.unpack_from(value))
    return None


def host_of(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def _dump(extensions: int) -> Iterator[tuple[TcpSocket, memoryview]]:
    """And the attributes of each."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as asked:
        for family in (socket.AF_INET, socket.AF_INET6):
            body = _REQUEST.pack(family, socket.IPPROTO_TCP, extensions, 0, 1 << ESTABLISHED | 1 << LISTEN)
            asked.sendto(netlink.message(_SOCK_DIAG_BY_FAMILY, netlink.REQUEST | netlink.DUMP, body), (0, 0))
            yield from _answers(asked)


def _answers(asked: socket.socket) -> Iterator[tuple[TcpSocket, memoryview]]:
    while True:
        for kind, answer in netlink.messages(asked.recv(_MOST)):
            if kind == netlink.DONE:
                return
            if kind == netlink.ERROR:
                raise OSError(netlink.errno_in(answer), "the kernel does not list its TCP sockets")
            family, state, local_port, remote_port, local, remote = _ENDS.unpack_from(answer)
            if family == socket.AF_INET:
                local, remote = local[:4], remote[:4]
            else:
                local, remote = _unmapped(local), _unmapped(remote)
            found = TcpSocket(state, local, local_port, remote, remote_port, *_OWNER.unpack_from(answer))
            yield found, answer[_OWNER.size :]


def _unmapped(address: bytes) -> bytes:
    return address[12:] if address.startswith(_V4_MAPPED) else address
