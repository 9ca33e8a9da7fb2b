"""The TCP sockets of this network namespace, as the kernel lists them (sock_diag(7)). Takes no rights."""

import socket
import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, TypeVar

from meshnet.codec import netlink

T = TypeVar("T")

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_REQUEST = struct.Struct("=BBBBI48x")  # struct inet_diag_req_v2
_ANSWER = struct.Struct("=BB2x2s2s16s16s12xIIIII")  # struct inet_diag_msg
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
    return _both(lambda found, _: found, 0)


def tcp_sockets_with_info() -> list[tuple[TcpSocket, TcpInfo | None]]:
    """As `tcp_sockets`, which need not ask each socket. None of one that listens."""
    return _both(lambda found, rest: (found, _info(rest) if found.state != LISTEN else None), 1 << _INFO - 1)


def _both(make: Callable[[TcpSocket, memoryview], T], extensions: int) -> list[T]:
    """What `make` makes of each socket and its attributes."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as asked:
        return [
            make(found, rest)
            for family in (socket.AF_INET, socket.AF_INET6)
            for found, rest in _dump(asked, family, extensions)
        ]


def _info(attributes: memoryview) -> TcpInfo | None:
    for kind, value in netlink.attributes(attributes):
        if kind == _INFO and len(value) >= _TCP_INFO.size:
            return TcpInfo._make(_TCP_INFO.unpack_from(value))
    return None


def host_of(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def _dump(asked: socket.socket, family: int, extensions: int) -> Iterator[tuple[TcpSocket, memoryview]]:
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, extensions, 0, 1 << ESTABLISHED | 1 << LISTEN)
    asked.sendto(netlink.message(_SOCK_DIAG_BY_FAMILY, netlink.REQUEST | netlink.DUMP, body), (0, 0))
    while True:
        for kind, answer in netlink.messages(asked.recv(_MOST)):
            if kind == netlink.DONE:
                return
            if kind == netlink.ERROR:
                raise OSError(netlink.errno_in(answer), "the kernel does not list its TCP sockets")
            family, state, sport, dport, source, target, _, _, _, uid, inode = _ANSWER.unpack_from(answer)
            found = TcpSocket(
                state,
                _packed(family, source),
                int.from_bytes(sport, "big"),
                _packed(family, target),
                int.from_bytes(dport, "big"),
                uid,
                inode,
            )
            yield found, answer[_ANSWER.size :]


def _packed(family: int, address: bytes) -> bytes:
    if family == socket.AF_INET:
        return address[:4]
    return address[12:] if address.startswith(_V4_MAPPED) else address
