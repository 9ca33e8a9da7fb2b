"""Which addresses are this host's own, as the kernel's routing sees it (rtnetlink(7))."""

import select
import socket
import struct
from collections.abc import Callable
from typing import Self

_RTM_GETROUTE, _NLM_F_REQUEST, _NLMSG_ERROR = 26, 1, 2
_RTA_DST = 1
_RTN_LOCAL = 2
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr


# Groups whose news may change an answer (linux/rtnetlink.h, RTMGRP_*): links, addresses, routes and rules of both
# families. Links too: routes may go with one without a word about each.
_GROUPS = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 1 << (19 - 1)
_MOST_KEPT = 4096


class LocalAddresses:
    """Asks the kernel, and keeps the answers until it tells of a change; an address can move to another host any time.

    A context manager.
    """

    def __init__(self) -> None:
        self._kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._news = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        self._news.bind((0, _GROUPS))
        self._has_news = select.poll()
        self._has_news.register(self._news, select.POLLIN)
        self._known: dict[str, bool] = {}
        self.on_change: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._kernel.close()
        self._news.close()

    def __contains__(self, host: str) -> bool:
        """Whether what is sent to the IP address `host` stays on this host.

        Not "can a socket be bound to it": with net.ipv4.ip_nonlocal_bind one can be bound to anything.
        """
        if self._has_news.poll(0):
            self.forget()
        known = self._known.get(host)
        if known is None:
            if len(self._known) >= _MOST_KEPT:
                self._known.clear()
            known = self._known[host] = self._ask(host)
        return known

    def fileno(self) -> int:
        """Readable when the kernel has told of a change."""
        return self._news.fileno()

    def forget(self) -> None:
        """After a change, which `on_change` is told of."""
        self._known.clear()
        self.on_change()
        try:
            while True:
                self._news.recv(1)  # a datagram each; what it says does not matter
        except OSError:
            pass  # read to the end, or ENOBUFS: some were lost, which says the same

    def _ask(self, host: str) -> bool:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        packed = socket.inet_pton(family, host)
        route = _ROUTE.pack(family, len(packed) * 8, 0, 0, 0, 0, 0, 0, 0)
        body = route + _ATTRIBUTE.pack(_ATTRIBUTE.size + len(packed), _RTA_DST) + packed
        self._kernel.sendto(_HEADER.pack(_HEADER.size + len(body), _RTM_GETROUTE, _NLM_F_REQUEST, 1, 0) + body, (0, 0))
        answer = self._kernel.recv(4096)
        if _HEADER.unpack_from(answer)[1] == _NLMSG_ERROR:
            return False  # there is no way to it at all
        return bool(_ROUTE.unpack_from(answer, _HEADER.size)[7] == _RTN_LOCAL)
