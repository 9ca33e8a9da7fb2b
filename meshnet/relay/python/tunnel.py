"""A lease on a tunnel: each DATA frame in a TLS record of its own, on the raw socket."""

import errno
import os
import socket
import ssl
from collections import deque
from collections.abc import Iterable
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from typing import TYPE_CHECKING

from meshnet.codec.frames import HEADER_SIZE, MAX_DATA, MAX_RECORD, Data, Fin, Frame, Reset
from meshnet.errors import EndedBy, Reason, TunnelError
from meshnet.net.python_tls import PythonChannel
from meshnet.net.sockets import GONE, OUR_SHORTAGE
from meshnet.relay import TUNNEL_CLOSED, TunnelLeg, reset_by_peer
from meshnet.relay.python.side import RESET_ON_CLOSE, Side

if TYPE_CHECKING:  # it holds sides
    from meshnet.relay.python.loop import RelayLoop
    from meshnet.relay.python.pair import Pair

_RECORDS_PER_EVENT = 4  # then others get their turn
_TROUBLE = EPOLLERR | EPOLLHUP


class TunnelSide(Side):
    """`in_done`: the peer has ended its half of the lease. `out_done`: we have ended ours, and it has gone out."""

    __slots__ = (
        "_broken",
        "_buffer",
        "_crossed",
        "_ended",
        "_error",
        "_outbox",
        "_pending",
        "_receive",
        "_recv_into",
        "_send",
        "_wire",
        "late",
    )

    def __init__(self, loop: "RelayLoop", pair: "Pair", leg: TunnelLeg, who: EndedBy) -> None:
        assert isinstance(leg.channel, PythonChannel)
        sock = leg.channel.sock
        super().__init__(loop, pair, sock, who)
        self._wire = leg.wire
        self._receive = leg.wire.receive
        self._buffer = loop.frame
        self._recv_into = sock.recv_into
        self._send = sock.send
        self._pending = sock.pending
        # Frames not yet sent, each with its count of application bytes. OpenSSL has begun the first one: whatever
        # happens, it must be offered again with the same bytes (SSL_write(3)).
        self._outbox: deque[tuple[bytes, int]] = deque()
        self._ended = False  # our FIN or RESET is sent or in the outbox
        self._crossed = 0  # OpenSSL wants to read in order to write, or the other way round: then only this event
        self._broken = False
        self._error = 0  # errno of the socket
        self.late: list[Frame] = []  # what came behind the end of the lease

    @property
    def reusable(self) -> bool:
        return self.over and not self._broken

    def move(self, loop: "RelayLoop") -> None:
        super().move(loop)
        self._buffer = loop.frame

    def on_event(self, mask: int) -> None:
        crossed, self._crossed = self._crossed, 0
        if mask & EPOLLERR:
            # Asked before OpenSSL reads: Python's ssl takes an RST or a timeout for an end of file.
            self._error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if crossed or (mask & EPOLLOUT and self.writing):
            self._flush()
        if self.reading and (mask & EPOLLIN or crossed):
            self.pull()
        elif mask & _TROUBLE and not self.reading and not self.over:
            self._lose()
        if crossed and not self.over:
            self.watch()

    def pull(self) -> None:
        buffer = self._buffer
        for _ in range(_RECORDS_PER_EVENT):
            try:
                size = self._recv_into(buffer)
                frames = self._receive(buffer[:size])
            except ssl.SSLWantReadError:
                return
            except ssl.SSLWantWriteError:
                self._crossed = EPOLLOUT
                self.watch()
                return
            except OSError as error:
                self._lose(error)
                return
            except TunnelError as error:
                self._break(Reason.TUNNEL_PROTOCOL, str(error))
                return
            if not size:
                self._lose()
                return
            self.accept(frames)
            # A record that is not full is most often the last: the kernel knows, and OpenSSL has nothing left over.
            if size < MAX_RECORD or not self.reading:
                return

    def accept(self, frames: Iterable[Frame]) -> None:
        for frame in frames:
            if isinstance(frame, Data) and not self.in_done:
                if not self.peer.over:
                    self.peer.write(frame.payload)
            elif self.over:
                self.late.append(_kept(frame))
            elif isinstance(frame, Fin):
                self._end_in()
                self.pair.on_fin(self)
            elif isinstance(frame, Reset):
                self._end_in()
                self._on_reset(frame.reason)

    def take(self, size: int) -> None:
        if size <= MAX_DATA:
            self._frame(0, size)
        else:
            for start in range(0, size, MAX_DATA):
                self._frame(start, min(size - start, MAX_DATA))

    def _frame(self, start: int, size: int) -> None:
        if self._ended:  # a frame before this one failed
            return
        # The header goes over bytes that are already sent, or into the room before the first.
        frame = self._buffer[start : start + HEADER_SIZE + size]
        frame[:HEADER_SIZE] = self._wire.data(size)
        if self._outbox:
            self._outbox.append((bytes(frame), size))
            return
        try:
            sent = self._send(frame)
        except ssl.SSLWantWriteError:
            sent = 0
        except ssl.SSLWantReadError:
            sent = 0
            self._crossed = EPOLLIN
        except OSError as error:
            self._lose(error)
            return
        if sent == HEADER_SIZE + size:
            self.count(size)
            return
        self._outbox.append((bytes(frame[sent:]), size))
        self._hold_peer()

    def write(self, data: memoryview) -> None:
        if self._ended:
            return
        for start in range(0, len(data), MAX_DATA):
            part = data[start : start + MAX_DATA]
            self._outbox.append((self._wire.data(len(part)) + part, len(part)))
        self._flush()

    def finish(self) -> None:
        self._ended = True
        self._outbox.append((self._wire.fin(), 0))
        if not self.writing:
            self._flush()

    def abort(self, reason: Reason) -> None:
        if self.over:
            return
        # Over already: our FIN is still to go out, or the peer's end is in what is being accepted just now.
        if not self._wire.lease_over:
            while len(self._outbox) > 1:
                self._outbox.pop()
            self._ended, self.out_done = True, False  # a FIN that went out before is not the last word now
            self._outbox.append((self._wire.reset(str(reason)), 0))
            self._flush()
        if not self.over:
            self.reading = True  # on to the peer's end
            self.watch()

    def cut(self) -> None:
        if not self.over:
            self._kill()

    def close(self) -> None:
        self.reading = False
        self.unwatch()

    def resume(self) -> None:
        if not self.reading and not self.over:
            self.reading = True
            self.watch()
            if self.pending:
                self.loop.unread.append(self)

    @property
    def pending(self) -> bool:
        """OpenSSL holds decrypted bytes, which epoll knows nothing of."""
        return self._pending() > 0

    def _interest(self) -> int:
        return self._crossed or super()._interest()

    def _flush(self) -> None:
        outbox = self._outbox
        try:
            while outbox:
                frame, part = outbox[0]
                sent = self._send(frame)
                if sent < len(frame):
                    outbox[0] = (frame[sent:], part)
                    continue
                outbox.popleft()
                if part:
                    self.count(part)
        except ssl.SSLWantWriteError:
            self._hold_peer()
            return
        except ssl.SSLWantReadError:
            self._crossed = EPOLLIN
            self._hold_peer()
            return
        except OSError as error:
            self._lose(error)
            return
        if self.writing:
            self.writing = False
            self.watch()
        if self._ended:
            self.out_done = True
            if self.in_done:
                self._end()
            self.pair.settle()
        else:
            self.peer.resume()

    def _hold_peer(self) -> None:
        self.writing = True
        self.watch()
        if not self.peer.over:
            self.peer.pause()

    def _end_in(self) -> None:
        self.in_done = True
        if self.out_done:
            self._end()
        else:
            self.resume()  # however slow the application: only a RESET can come now, or the end of the tunnel

    def _end(self) -> None:
        """The lease is over. What the tunnel brings now is not for this pair, which may live on for its other leg."""
        self.over = True
        self.close()

    def _kill(self) -> None:
        # When its owner closes the socket, the peer shall get RST: a FIN would wait behind bytes that nobody reads.
        self._broken = self._ended = self.over = True
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

    def _on_reset(self, text: str) -> None:
        self.pair.fail(*reset_by_peer(text, self.who))

    def gone(self) -> None:
        self._error = errno.ETIMEDOUT
        self._lose()

    def _lose(self, error: OSError | None = None) -> None:
        number = self._error
        if error is not None and not number and not isinstance(error, ssl.SSLError):  # which has numbers of its own
            number = error.errno or 0
        detail = os.strerror(number) if number else error and error.strerror
        if number in OUR_SHORTAGE:
            self._break(Reason.INTERNAL, os.strerror(number), EndedBy.PROXY)
            return
        reason = Reason.KEEPALIVE_DEAD if number in GONE else Reason.TUNNEL_LOST
        self._break(reason, detail or TUNNEL_CLOSED)

    def _break(self, reason: Reason, detail: str, who: EndedBy = EndedBy.PEER_PROXY) -> None:
        self._kill()
        self.pair.fail(reason, who, detail)


def _kept(frame: Frame) -> Frame:
    """A payload is a view into a buffer that all links share."""
    return Data(memoryview(bytes(frame.payload))) if isinstance(frame, Data) else frame
