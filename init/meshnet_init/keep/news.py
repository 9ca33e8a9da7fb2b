"""Who has changed nf_tables: the kernel tells of every transaction, with the program's name (NFNLGRP_NFTABLES).

iptables-nft writes nf_tables too. Of the legacy tables nothing tells.
"""

import socket
import struct

from pyroute2.netlink import NETLINK_NETFILTER

_NFNLGRP_NFTABLES = 7
_NEWGEN = 10 << 8 | 15  # NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWGEN: the last message of a transaction
_PROC_PID, _PROC_NAME = 2, 3  # NFTA_GEN_*
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_NFGENMSG = 4  # bytes of struct nfgenmsg
_MOST = 1 << 17


class RulesNews:
    """A context manager. Readable when nf_tables of this network namespace have changed. Raises OSError."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._sock.setblocking(False)
        self._sock.bind((0, 1 << (_NFNLGRP_NFTABLES - 1)))

    def fileno(self) -> int:
        return self._sock.fileno()

    def read(self) -> list[str]:
        """All that there is: programs by their names, each with its process id."""
        programs: dict[str, None] = {}
        while True:
            try:
                data = self._sock.recv(_MOST)
            except BlockingIOError:
                return list(programs)
            except OSError:  # ENOBUFS: more than could be kept, and not known whose
                continue
            for name in _programs(data):
                programs[name] = None

    def __enter__(self) -> "RulesNews":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._sock.close()


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


def _attributes(data: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        found[kind] = data[at + _ATTRIBUTE.size : at + size]
        at += max(size + 3 & ~3, _ATTRIBUTE.size)
    return found
