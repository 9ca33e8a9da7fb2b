"""Who has changed nf_tables, or the routing table by which answers in clients' names come back (routing.py).

The kernel tells of every transaction of nf_tables, with the program's name (NFNLGRP_NFTABLES); iptables-nft writes them
too. Of the legacy tables nothing tells. It tells of every route and routing rule, with the netlink port of who asked.
"""

import ctypes
import select
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from pyroute2.netlink import NETLINK_NETFILTER, NETLINK_ROUTE

from meshnet_init.routing import TABLE

_NFNLGRP_NFTABLES = 7
_RTNLGRP_IPV4_ROUTE, _RTNLGRP_IPV4_RULE, _RTNLGRP_IPV6_ROUTE, _RTNLGRP_IPV6_RULE = 7, 8, 11, 19  # linux/rtnetlink.h
_NEWGEN = 10 << 8 | 15  # NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWGEN: the last message of a transaction
_PROC_PID, _PROC_NAME = 2, 3  # NFTA_GEN_*
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_NFGENMSG = 4  # bytes of struct nfgenmsg
_MOST = 1 << 17
_SO_ATTACH_FILTER = 26
_WHOLE = 0xFFFFFFFF

# For the kernel (linux/filter.h), so that the routes of others wake nobody: RTA_TABLE, which is FRA_TABLE,
# behind struct nlmsghdr and struct rtmsg, which is as long as struct fib_rule_hdr, has to be our table.
_OF_OUR_TABLE = (
    (0x00, 0, 0, 28),  # A = their length
    (0x01, 0, 0, 15),  # X = RTA_TABLE
    (0x20, 0, 0, 0xFFFFF000 + 12),  # A = where it is: SKF_AD_OFF + SKF_AD_NLATTR
    (0x07, 0, 0, 0),  # X = A
    (0x40, 0, 0, _ATTRIBUTE.size),  # A = its value, as if it were in the network's order
    (0x15, 0, 1, int.from_bytes(TABLE.to_bytes(4, sys.byteorder), "big")),
    (0x06, 0, 0, _WHOLE),
    (0x06, 0, 0, 0),
)


class RulesNews:
    """A context manager. Readable when what the rules of this network namespace are made of changes. Raises OSError."""

    def __init__(self) -> None:
        with ExitStack() as stack:
            self._tables = stack.enter_context(_listener(NETLINK_NETFILTER, _NFNLGRP_NFTABLES))
            self._routes = stack.enter_context(
                _listener(
                    NETLINK_ROUTE, _RTNLGRP_IPV4_ROUTE, _RTNLGRP_IPV4_RULE, _RTNLGRP_IPV6_ROUTE, _RTNLGRP_IPV6_RULE
                )
            )
            self._both = stack.enter_context(select.epoll())
            for sock in (self._tables, self._routes):
                self._both.register(sock, select.EPOLLIN)
            self._open = stack.pop_all()

    def fileno(self) -> int:
        return self._both.fileno()

    def read(self) -> list[str]:
        """All that there is: programs by their names, each with its process id."""
        named = [name for data in _messages(self._tables) for name in _programs(data)]
        named += [name for data in _messages(self._routes) for name in _holder(data)]
        return list(dict.fromkeys(named))

    def __enter__(self) -> "RulesNews":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._open.close()


def _listener(protocol: int, *groups: int) -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        sock.setblocking(False)
        if protocol == NETLINK_ROUTE:
            program = b"".join(struct.pack("=HBBI", *step) for step in _OF_OUR_TABLE)
            steps = ctypes.create_string_buffer(program)
            fprog = struct.pack("@HP", len(_OF_OUR_TABLE), ctypes.addressof(steps))
            sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
        sock.bind((0, sum(1 << group - 1 for group in groups)))
    except OSError:
        sock.close()
        raise
    return sock


def _messages(sock: socket.socket) -> Iterator[bytes]:
    while True:
        try:
            yield sock.recv(_MOST)
        except BlockingIOError:
            return
        except OSError:  # ENOBUFS: more than could be kept, and not known whose
            continue


def _programs(data: bytes) -> list[str]:
    found, at = [], 0
    while at + _HEADER.size <= len(data):
        size, kind, *_ = _HEADER.unpack_from(data, at)
        if kind == _NEWGEN:
            attributes = _attributes(data[at + _HEADER.size + _NFGENMSG : at + size])
            name = attributes.get(_PROC_NAME, b"").rstrip(b"\0").decode(errors="replace")
            if name:
                found.append(f"{name} (pid {int.from_bytes(attributes.get(_PROC_PID, b''), 'big')})")
        at += size + 3 & ~3
    return found


def _holder(data: bytes) -> list[str]:
    """Whose port is the number of a process that lives, as that of its first netlink socket is (netlink(7))."""
    *_, port = _HEADER.unpack_from(data)
    try:
        return [f"{Path(f'/proc/{port}/comm').read_text().strip()} (pid {port})"]
    except OSError:
        return []


def _attributes(data: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        found[kind] = data[at + _ATTRIBUTE.size : at + size]
        at += max(size + 3 & ~3, _ATTRIBUTE.size)
    return found
