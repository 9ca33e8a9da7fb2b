"""Which addresses are this host's own, as the kernel's routing sees it (rtnetlink(7))."""

import socket
import struct
from typing import Self

_RTM_GETROUTE, _NLM_F_REQUEST, _NLMSG_ERROR = 26, 1, 2
_RTA_DST = 1
_RTN_LOCAL = 2
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr


class LocalAddresses:
    """Asks each time, for an address can move to another host at any moment; the kernel answers in a few microseconds.

    A context manager.
    """

    def __init__(self) -> None:
        self._kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._kernel.close()

    def __contains__(self, host: str) -> bool:
        """Whether what is sent to the IP address `host` stays on this host.

        Not "can a socket be bound to it": with net.ipv4.ip_nonlocal_bind one can be bound to anything.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        packed = socket.inet_pton(family, host)
        route = _ROUTE.pack(family, len(packed) * 8, 0, 0, 0, 0, 0, 0, 0)
        body = route + _ATTRIBUTE.pack(_ATTRIBUTE.size + len(packed), _RTA_DST) + packed
        self._kernel.sendto(_HEADER.pack(_HEADER.size + len(body), _RTM_GETROUTE, _NLM_F_REQUEST, 1, 0) + body, (0, 0))
        answer = self._kernel.recv(4096)
        if _HEADER.unpack_from(answer)[1] == _NLMSG_ERROR:
            return False  # there is no way to it at all
        return bool(_ROUTE.unpack_from(answer, _HEADER.size)[7] == _RTN_LOCAL)
