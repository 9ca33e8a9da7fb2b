"""A plain TCP leg: one recv and one send a message, splice when there is much."""

import errno
import os
import socket
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from typing import TYPE_CHECKING

from meshnet.errors import EndedBy, Reason
from meshnet.net.sockets import GONE, OUR_SHORTAGE
from meshnet.relay.python.side import RESET_ON_CLOSE, Side
from meshnet.relay.python.splice import Pipe

if TYPE_CHECKING:  # it holds sides
    from meshnet.relay.python.loop import RelayLoop
    from meshnet.relay.python.pair import Pair

_TROUBLE = EPOLLERR | EPOLLHUP
_BULK_ROUNDS = 4  # pipefuls one event may move before others get their turn
_BULK_ENDS_BELOW = 1 << 15  # bytes a splice moved; less is cheaper to copy


class PlainSide(Side):
    __slots__ = ("_bulk", "_fin_due", "_held", "_payload", "_pipe", "_recv_into", "_send")

    def __init__(self, loop: "RelayLoop", pair: "Pair", sock: socket.socket, who: EndedBy) -> None:
        super().__init__(loop, pair, sock, who)
        self._recv_into = sock.recv_into
        self._send = sock.send
        self._payload = loop.payload
        self._held = b""  # on its way to this socket, which is full
        self._pipe: Pipe | None = None  # the same, of a bulk stream; never both
        self._fin_due = False
        self._bulk = False  # this socket's reads fill the buffer

    def move(self, loop: "RelayLoop") -> None:
        super().move(loop)
        self._payload = loop.payload

    def on_event(self, mask: int) -> None:
        if mask & EPOLLOUT and self.writing:
            self._flush()
        if mask & EPOLLIN and self.reading:
            self.pull()
        elif mask & _TROUBLE and not self.reading and not self.over:
            self._on_trouble()

    def pull(self) -> None:
        if self._bulk:
            self._pull_bulk()
            return
        try:
            size = self._recv_into(self._payload)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        if size:
            self.peer.take(size)
            if size == len(self._payload) and isinstance(self.peer, PlainSide):
                self._bulk = True
        else:
            self._end()

    def take(self, size: int) -> None:
        self.write(self._payload[:size])

    def write(self, data: memoryview) -> None:
        if self._held:
            self._held += data  # the rest of what the peer had already read
            return
        try:
            sent = self._send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._fail(error)
            return
        self.count(sent)
        if sent < len(data):
            self._held = bytes(data[sent:])
            self._hold_peer()

    def finish(self) -> None:
        self._fin_due = True
        if not self.writing:
            self._shutdown()

    def abort(self, reason: Reason) -> None:
        """RST, not FIN: the application must not take what it got for the whole."""
        if not self.over:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            self.close()

    def cut(self) -> None:
        self.abort(Reason.INTERNAL)

    def close(self) -> None:
        self.over = True
        self.reading = self.writing = False
        self.forget()
        self.sock.close()
        self._held = b""
        if self._pipe is not None:
            self.loop.pipes.give_back(self._pipe)
            self._pipe = None

    def _end(self) -> None:
        """Its FIN has come."""
        self.in_done = True
        self.reading = False
        self.watch()
        self.pair.on_fin(self)

    def _shutdown(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._fail(error)
            return
        self.out_done = True
        self.pair.settle()

    def _flush(self) -> None:
        try:
            if self._pipe is not None:
                self._drain(self._pipe)
            elif self._held:
                sent = self._send(self._held)
                self.count(sent)
                self._held = self._held[sent:]
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        if self._held or self._pipe is not None:
            return
        self.writing = False
        self.watch()
        if self._fin_due:
            self._shutdown()
        else:
            self.peer.resume()

    def _hold_peer(self) -> None:
        self.writing = True
        self.watch()
        self.peer.pause()

    def _pull_bulk(self) -> None:
        peer = self.peer
        assert isinstance(peer, PlainSide)
        for _ in range(_BULK_ROUNDS):
            pipe = self.loop.pipes.borrow()
            if pipe is None:
                self._bulk = False
                return
            try:
                size = pipe.fill(self.fd)
            except OSError as error:
                self.loop.pipes.give_back(pipe)
                self._bulk = False
                if not isinstance(error, BlockingIOError):
                    self._fail(error)
                return
            if not size:
                self.loop.pipes.give_back(pipe)
                self._end()
                return
            if not peer._take_pipe(pipe):
                return
            if size < _BULK_ENDS_BELOW:
                self._bulk = False
                return

    def _take_pipe(self, pipe: Pipe) -> bool:
        """Sends what is in `pipe`; whether all of it went."""
        self._pipe = pipe
        try:
            self._drain(pipe)
        except BlockingIOError:
            self._hold_peer()
            return False
        except OSError as error:
            self._fail(error)
            return False
        return True

    def _drain(self, pipe: Pipe) -> None:
        """Raises BlockingIOError when the socket is full before the pipe is empty."""
        while pipe.held:
            self.count(pipe.drain(self.fd))
        self._pipe = None
        self.loop.pipes.give_back(pipe)

    def _on_trouble(self) -> None:
        """An error, or both directions shut, while nothing is read: epoll says so again and again until unwatched.

        Not while reading: then the next read finds it, and the event may be older than the wish to read.
        """
        number = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self._fail(OSError(number, os.strerror(number)))
        elif not self.writing:
            self.unwatch()

    def gone(self) -> None:
        self._fail(OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))

    def _fail(self, error: OSError) -> None:
        detail = error.strerror or str(error)
        if error.errno in OUR_SHORTAGE:
            self.pair.fail(Reason.INTERNAL, EndedBy.PROXY, detail)
        else:
            reason = Reason.KEEPALIVE_DEAD if error.errno in GONE else Reason.PEER_RST
            self.pair.fail(reason, self.who, detail)
