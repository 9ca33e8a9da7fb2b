"""meshnet/1, sans-io: who may send which frame, and when. `meshnet.codec.frames` says what a frame looks like.

Setting. A TCP connection to the peer's tunnel port, TLS 1.3 with a certificate on both sides, ALPN `meshnet/1`. Who
dialled is the CLIENT, for as long as the tunnel lives. A tunnel carries one lease at a time: one connection of an
application. There are no windows and no stream ids; who reads slowly is waited for by TCP itself.

A lease is two halves, what the client sends and what the server sends, and each half goes through the table `_STEPS`:

    client's half   OPEN  (DATA)*  then FIN, RESET, or FIN and RESET
    server's half   OPENED  (DATA)*  then FIN, RESET, or FIN and RESET;  or only REFUSED

- FIN, RESET and REFUSED end a half. When both halves have ended the lease is over and the client may OPEN the next one.
- OPENED is sent when access was granted and the application has accepted. The client need not wait for it: DATA, FIN
  and RESET may follow OPEN at once.
- REFUSED ends both halves. What the client sent before it read that is passed over by the server, up to the client's
  next OPEN or PING; once it has read REFUSED, the client sends no more in that lease.
- RESET says: I read no more and I send no more. Whatever of the peer's is on its way is passed over, until the peer
  ends its half too, which it must do at once. A server that has not answered yet still says OPENED or REFUSED first.
- FIN says: I send no more, but I still read. As long as the peer's end has not come, RESET may follow: nor do I read.
- A RESET behind FIN may cross the peer's end. Then its lease is over where it arrives, and it is passed over. The
  client's comes before its next OPEN or PING. The server's may find the client asking for the next lease already, but
  comes before the answer to that; and an answer is OPENED or REFUSED, never RESET, so it cannot be taken for one.

Between leases the client may PING and the server owes a PONG; that may come late, when the next lease has begun.
GOAWAY may be said by either side at any time, also inside a lease, and again. The client opens no lease once either
side has said it; a server serves an OPEN that crossed its GOAWAY.

Two guilts, two errors. What the peer must not do is a TunnelError: the tunnel is dead, `receive` says so from then on,
and closing the socket is all that is left. What we must not do is a LocalError, a bug in the caller; nothing changed.
"""

import enum

from meshnet.codec import frames
from meshnet.codec.frames import Data, Fin, Frame, GoAway, Kind, Open, Opened, Ping, Pong, Reader, Refused, Reset
from meshnet.errors import TunnelError


class LocalError(RuntimeError):
    """The caller asked for a frame that the state of the tunnel does not allow."""


class Role(enum.Enum):
    CLIENT = "client"
    SERVER = "server"


class Half(enum.Enum):
    """What one side may still send in a lease."""

    ASKED = "asked"  # the server owes an answer to OPEN
    ASKED_NEXT = "asked-next"  # the same, and a late RESET of the last lease may come: only the client sees its peer so
    OPEN = "open"
    FINISHED = "finished"  # by FIN: a RESET may follow
    REFUSED = "refused"  # over, but the client may not know yet: only the server sees its peer so
    RESET = "reset"
    ENDED = "ended"  # by REFUSED, or no lease was ever opened


_STEPS: dict[Half, dict[Kind, Half]] = {
    Half.ASKED: {Kind.OPENED: Half.OPEN, Kind.REFUSED: Half.ENDED},
    Half.ASKED_NEXT: {Kind.OPENED: Half.OPEN, Kind.REFUSED: Half.ENDED, Kind.RESET: Half.ASKED},
    Half.OPEN: {Kind.DATA: Half.OPEN, Kind.FIN: Half.FINISHED, Kind.RESET: Half.RESET},
    Half.FINISHED: {Kind.RESET: Half.RESET},
    Half.REFUSED: {Kind.DATA: Half.REFUSED, Kind.FIN: Half.FINISHED, Kind.RESET: Half.RESET},
    Half.RESET: {},
    Half.ENDED: {},
}
# What else looks at both halves: OPEN begins them, REFUSED ends them, and nobody sends in a lease that is over.

_OPEN, _RESET = Half.OPEN, Half.RESET  # looked up for every message, which costs more on the enum
_ENDS = {"FIN": Half.FINISHED, "RESET": Half.RESET}
_STILL_SENDING = frozenset({Half.ASKED, Half.ASKED_NEXT, Half.OPEN})
_CROSSED = (Opened, Refused, Data)  # what a side that has sent RESET no longer wants to hear


class Tunnel:
    """One tunnel as one side sees it.

    The methods named after frames return the bytes to send, in that order; each raises LocalError when it is not the
    time for it. `receive` takes what came. Satisfies `meshnet.relay.Wire`.
    """

    def __init__(self, role: Role) -> None:
        self._role = role
        self._reader = Reader()
        self._mine = Half.ENDED
        self._theirs = Half.ENDED
        self._goaway_sent = False
        self._goaway_received = False
        self._pings = 0  # not answered yet
        self._broken = ""

    def __repr__(self) -> str:
        retired = ", retired" if self.retired else ""
        broken = f", broken: {self._broken}" if self._broken else ""
        halves = f"mine {self._mine.value}, theirs {self._theirs.value}"
        return f"<Tunnel {self._role.value}, {halves}{retired}{broken}>"

    @property
    def role(self) -> Role:
        return self._role

    @property
    def leased(self) -> bool:
        return not self.lease_over

    @property
    def lease_over(self) -> bool:
        """Both halves have ended, or no lease was ever opened."""
        return self.sent_end and self.received_end

    @property
    def sent_end(self) -> bool:
        """We may send no more in this lease, but for a RESET behind our FIN."""
        return self._mine not in _STILL_SENDING

    @property
    def received_end(self) -> bool:
        """The peer may send no more in this lease, but for a RESET behind its FIN."""
        return self._theirs not in _STILL_SENDING

    @property
    def retired(self) -> bool:
        """GOAWAY was sent or received: no lease will be opened here, save one that crossed ours."""
        return self._goaway_sent or self._goaway_received

    @property
    def idle(self) -> bool:
        """A client may open a lease; a server may be asked for one. Never so once the peer broke the protocol."""
        retired = self._goaway_received or (self._goaway_sent and self._role is Role.CLIENT)
        return self.lease_over and not retired and not self._broken

    def open(self, asked: Open) -> bytes:
        """Raises ValueError for what no peer would take."""
        if self._role is not Role.CLIENT or not self.idle:
            raise LocalError(f"OPEN is not allowed on {self!r}")
        encoded = frames.encode(asked)
        self._mine = Half.OPEN
        self._theirs = Half.ASKED_NEXT if self._theirs is Half.FINISHED else Half.ASKED
        return encoded

    def opened(self) -> bytes:
        self._send(Kind.OPENED)
        return _OPENED

    def refused(self, refused: Refused) -> bytes:
        """Ends the lease. Raises ValueError for what no peer would take."""
        encoded = frames.encode(refused)
        self._send(Kind.REFUSED)
        if self._theirs is Half.OPEN:
            self._theirs = Half.REFUSED
        return encoded

    def data(self, size: int) -> bytes:
        """The header that goes before `size` payload bytes. Raises ValueError unless 1 <= size <= MAX_DATA."""
        if self._mine is not Half.OPEN:
            raise LocalError(f"DATA is not allowed on {self!r}")
        return frames.data_header(size)

    def fin(self) -> bytes:
        self._send(Kind.FIN)
        return _FIN

    def reset(self, reason: str) -> bytes:
        """Ends our half, and with it all interest in the peer's; also after `fin`, until the lease is over.

        Raises ValueError if `reason` is not a code.
        """
        encoded = frames.encode(Reset(reason=reason))
        self._send(Kind.RESET)
        return encoded

    def ping(self) -> bytes:
        if self._role is not Role.CLIENT or self.leased:
            raise LocalError(f"PING is not allowed on {self!r}")
        self._pings += 1
        return _PING

    def pong(self) -> bytes:
        """Answers one Ping that `receive` returned."""
        if self._role is not Role.SERVER or not self._pings:
            raise LocalError(f"PONG is not allowed on {self!r}: no PING is unanswered")
        self._pings -= 1
        return _PONG

    def goaway(self) -> bytes:
        self._goaway_sent = True
        return _GOAWAY

    def receive(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """The frames that `data` completes, without those that only crossed the end of our half.

        Payloads may be views into `data`. Raises TunnelError, and again ever after; what came in the same piece as the
        offence is lost with it.
        """
        if self._broken:
            raise TunnelError(self._broken)
        try:
            frames = self._reader.feed(data)
            if len(frames) == 1 and type(frames[0]) is Data and self._theirs is _OPEN and self._mine is not _RESET:
                return frames  # nearly every message of a busy lease
            return [frame for frame in frames if self._take(frame)]
        except TunnelError as error:
            self._broken = str(error)
            raise

    @property
    def is_between_frames(self) -> bool:
        return self._reader.is_between

    def hand_over(self) -> bytes:
        """Within a lease that is up: what has come of a frame that is not whole. See meshnet.relay.Wire."""
        return self._reader.give_away()

    def take_back(self, sent: str, received: str) -> None:
        """How a lease that was handed over has ended."""
        self._mine, self._theirs = _ENDS.get(sent, self._mine), _ENDS.get(received, self._theirs)

    def _take(self, frame: Frame) -> bool:
        """Does what `frame` says; whether the caller should see it. Raises TunnelError."""
        match frame:
            case Data() if self._theirs is Half.OPEN:
                return self._mine is not Half.RESET
            case Open():
                self._begin()
                return True
            case Ping() if self._role is Role.SERVER and self.lease_over:
                self._theirs = Half.ENDED  # the client has read our REFUSED
                self._pings += 1
                return True
            case Pong() if self._role is Role.CLIENT and self._pings:
                self._pings -= 1
                return True
            case GoAway():
                self._goaway_received = True
                return True
            case _:
                return self._take_step(frame)

    def _begin(self) -> None:
        if self._role is not Role.SERVER or not self.idle:
            raise TunnelError(f"OPEN is not allowed on {self!r}")
        self._theirs, self._mine = Half.OPEN, Half.ASKED

    def _take_step(self, frame: Frame) -> bool:
        kind = frames.KINDS[type(frame)]
        after = _STEPS[self._theirs].get(kind)
        if after is None:
            raise TunnelError(f"{kind.name} is not allowed on {self!r}")
        late = self.lease_over or after is Half.ASKED  # where only a RESET of the lease before leads
        crossed = self._mine is Half.RESET and isinstance(frame, _CROSSED)
        self._theirs = after
        if kind is Kind.REFUSED:
            self._mine = Half.ENDED
        return not (late or crossed)

    def _send(self, kind: Kind) -> None:
        after = None if self.lease_over else _STEPS[self._mine].get(kind)
        if after is None:
            raise LocalError(f"{kind.name} is not allowed on {self!r}")
        self._mine = after


_OPENED, _FIN, _PING, _PONG, _GOAWAY = (frames.encode(frame) for frame in (Opened(), Fin(), Ping(), Pong(), GoAway()))
