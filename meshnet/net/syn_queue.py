"""The kernel's queue in which opening SYNs wait, and the word that lets each go on.

It takes CAP_NET_ADMIN, when it is opened and for each word: the kernel asks both who opened the socket and who sends
(netlink_net_capable), so that nobody else can open it for us.
"""

import errno
import os
import socket
from collections.abc import Iterator
from typing import Self

from meshnet.codec import nfqueue
from meshnet.codec.nfqueue import Packet

_NETLINK_NETFILTER = 12  # linux/netlink.h
_SOL_NETLINK, _NETLINK_NO_ENOBUFS = 270, 5
_SO_RCVBUFFORCE = 33
_MOST = 4096  # SYNs that wait at once; who comes then passes
_BUFFER = _MOST * 1024  # bytes; what does not fit passes, too
_AT_ONCE = 64  # datagrams
_LARGEST = 4096


class SynQueue:
    """A context manager. When it is closed, what waits is dropped, and comes again within a second; new SYNs pass."""

    def __init__(self, number: int) -> None:
        """Raises OSError: EPERM without the capability, or where another program has that queue."""
        self._number = number
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._kernel = socket.socket(socket.AF_NETLINK, kind, _NETLINK_NETFILTER)
        try:
            self._kernel.bind((0, 0))
            for request in (nfqueue.bind(number), nfqueue.configure(number, _MOST)):
                self._kernel.send(request)
                # The kernel has answered when send returns.
                if code := nfqueue.error_in(self._kernel.recv(_LARGEST)):
                    raise OSError(code, os.strerror(code))
            self._kernel.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
            try:
                self._kernel.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
            except PermissionError:  # root of a user namespace only
                self._kernel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        except BaseException:
            self._kernel.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._kernel.close()

    def fileno(self) -> int:
        return self._kernel.fileno()

    def take(self) -> Iterator[Packet]:
        """Some of those that have come."""
        for _ in range(_AT_ONCE):
            try:
                data = self._kernel.recv(_LARGEST)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    continue
                raise
            yield from nfqueue.packets(data)

    def let_go(self, number: int, mark: int | None = None) -> None:
        """The packet of that number goes on, marked so if a mark is given. Nothing if the queue is closed."""
        if self._kernel.fileno() >= 0:
            try:
                self._kernel.send(nfqueue.verdict(self._number, number, mark))
            except BlockingIOError:
                pass  # it is dropped in the end, and its sender tries again
