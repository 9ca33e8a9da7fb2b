"""What plain and tunnel legs share in a loop's hands: what they wait for, and what has ended."""

import abc
import socket
import struct
from select import EPOLLIN, EPOLLOUT
from typing import TYPE_CHECKING

from meshnet.errors import EndedBy, Reason

if TYPE_CHECKING:  # they hold sides
    from meshnet.relay.python.loop import RelayLoop
    from meshnet.relay.python.pair import Pair

UNWATCHED = -1
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, with no time


class Side(abc.ABC):
    """One leg of a pair.

    `in_done`: its FIN has come. `out_done`: its FIN has gone out, after all bytes for it. `over`: nothing is left to do
    here, should the pair have failed.
    """

    __slots__ = (
        "_is_client",
        "_mask",
        "fd",
        "in_done",
        "loop",
        "out_done",
        "over",
        "pair",
        "peer",
        "reading",
        "sock",
        "who",
        "writing",
    )
    peer: "Side"

    def __init__(self, loop: "RelayLoop", pair: "Pair", sock: socket.socket, who: EndedBy) -> None:
        self.loop = loop
        self.pair = pair
        self.sock = sock
        self.fd = sock.fileno()
        self.who = who
        self.in_done = False
        self.out_done = False
        self.over = False
        self.reading = True
        self.writing = False
        self._is_client = who is EndedBy.CLIENT
        self._mask = UNWATCHED

    def watch(self) -> None:
        """Brings what epoll waits for in line with `reading` and `writing`; asks the kernel only on a change."""
        mask = self._interest()
        if mask == self._mask:
            return
        if self._mask == UNWATCHED:
            self.loop.epoll.register(self.fd, mask)
            self.loop.sides[self.fd] = self
        else:
            self.loop.epoll.modify(self.fd, mask)
        self._mask = mask

    def unwatch(self) -> None:
        if self._mask != UNWATCHED:
            self._mask = UNWATCHED
            del self.loop.sides[self.fd]
            self.loop.epoll.unregister(self.fd)

    def forget(self) -> None:
        """As `unwatch`, for a socket that is closed next: the kernel takes it out of epoll then (epoll(7), Q6)."""
        if self._mask != UNWATCHED:
            self._mask = UNWATCHED
            del self.loop.sides[self.fd]

    def move(self, loop: "RelayLoop") -> None:
        """Into another loop, unwatched."""
        self.unwatch()
        if self in self.loop.unread:
            self.loop.unread.remove(self)
        self.loop = loop

    def pause(self) -> None:
        self.reading = False
        self.watch()

    def resume(self) -> None:
        self.reading = True
        self.watch()

    def count(self, size: int) -> None:
        """`size` bytes have been handed to this side's socket."""
        tally = self.pair.tally
        if self._is_client:
            tally.received += size
        else:
            tally.sent += size
        tally.moved_at = self.loop.now

    def _interest(self) -> int:
        return (EPOLLIN if self.reading else 0) | (EPOLLOUT if self.writing else 0)

    @abc.abstractmethod
    def on_event(self, mask: int) -> None: ...

    @abc.abstractmethod
    def pull(self) -> None:
        """Reads what is there, within a budget, and gives it to the peer."""

    @abc.abstractmethod
    def take(self, size: int) -> None:
        """Sends the first `size` bytes of the loop's payload buffer; keeps what does not go and pauses the peer."""

    @abc.abstractmethod
    def write(self, data: memoryview) -> None:
        """As `take`, from any memory."""

    @abc.abstractmethod
    def finish(self) -> None:
        """The peer has ended: FIN, after everything that is still to go."""

    @abc.abstractmethod
    def abort(self, reason: Reason) -> None:
        """The pair has failed: RST or RESET."""

    @abc.abstractmethod
    def gone(self) -> None:
        """Its peer answers no more."""

    @abc.abstractmethod
    def cut(self) -> None:
        """Whatever `abort` was still waiting for will not be waited for."""

    @abc.abstractmethod
    def close(self) -> None:
        """The pair is over."""
