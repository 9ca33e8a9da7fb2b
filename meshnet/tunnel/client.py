"""A tunnel seen from the side that dialled it: how it comes up, and how it asks for a lease."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from meshnet.codec.frames import Frame, Open, Opened, Pong, Refused
from meshnet.errors import ConnectionFailed, EndedBy, Reason, TunnelError
from meshnet.model.address import Address
from meshnet.net import sockets, tls
from meshnet.net.deadline import Deadline, Deadlines
from meshnet.tunnel.protocol import Role, Tunnel

_RETIRE_BEFORE_EXPIRY = 60.0  # seconds
_SESSION_LIFETIME = 3600.0  # seconds; RFC 8446 allows a week, a renewed certificate should be seen sooner

Key = tuple[Address, str]
"""Where a tunnel leads, and the SPIFFE id that must be there."""


@dataclass(frozen=True, slots=True)
class Resumable:
    """A ticket, and the context it was made in."""

    context: object
    ticket: tls.Ticket

    def fits(self, context: object) -> bool:
        """Whether a handshake in `context` may begin with it now."""
        return self.context is context and self.ticket.time + _SESSION_LIFETIME >= time.time()


@dataclass(slots=True, eq=False)
class ClientTunnel:
    """A tunnel this sidecar opened. `good_until` and `idle_since` are seconds since the epoch and monotonic ones.

    `idle_since` is 0 until it stands idle. `on_answer` is called when the peer has answered an OPEN: what TLS had to
    bring, tickets among it, came before that. `is_known`: somebody has looked at that. `port` is our own.
    It `took` so many seconds to connect and to shake hands.
    """

    key: Key
    port: int
    channel: tls.Channel
    wire: Tunnel
    good_until: float
    handshake_ms: float
    took: float
    deadlines: Deadlines
    is_known: bool = False
    idle_since: float = 0.0
    pinged: bool = False
    on_answer: "Callable[[ClientTunnel], None]" = lambda tunnel: None

    @property
    def is_fresh(self) -> bool:
        """Made for who has it, it has never stood idle: a failure on it is the endpoint's, not that of a stale one."""
        return self.idle_since == 0.0

    async def open(self, request: Open, early: bytes, timeout: float) -> list[Frame]:
        """Asks the peer for a connection; `early` goes along. The frames that came right behind OPENED, copied.

        Raises ConnectionFailed: what the peer refused with, tunnel.lost, tunnel.protocol or connect.timeout.
        """
        wire, channel = self.wire, self.channel
        opening = wire.open(request)
        if early:
            opening += wire.data(len(early)) + early
        deadline = self.deadlines.set(channel.shut, timeout)
        try:
            await channel.send_all(opening)
            while data := await channel.receive():
                frames = wire.receive(memoryview(data))
                for position, frame in enumerate(frames):
                    if isinstance(frame, Opened | Refused):
                        self.on_answer(self)
                    if isinstance(frame, Opened):
                        # `data` is ours alone, so the payload views in it stay valid.
                        return [late for late in frames[position + 1 :] if not isinstance(late, Pong)]
                    if isinstance(frame, Refused):
                        raise refusal(frame)
            raise _lost(deadline, timeout, "the peer sidecar closed the tunnel")
        except TunnelError as error:
            raise ConnectionFailed(Reason.TUNNEL_PROTOCOL, str(error), ended_by=EndedBy.PEER_PROXY) from error
        except OSError as error:
            raise _lost(deadline, timeout, error.strerror or str(error)) from error
        finally:
            deadline.done()


async def connect(
    key: Key,
    credentials: tls.Credentials | None,
    resumable: Resumable | None,
    *,
    secure: tls.Tls,
    deadlines: Deadlines,
    mark: int,
    timeout: float,
) -> ClientTunnel:
    """A new tunnel to `key`. `resumable` is of an earlier one.

    `timeout` seconds are for the connect and the handshake together.

    Raises ConnectionFailed(connect.*, tls.*).
    """
    address, identity = key
    if credentials is None:
        raise ConnectionFailed(Reason.TLS_NO_IDENTITY, "this sidecar has no certificate: see meshnet status")
    if problem := credentials.problem(time.time()):  # or the peer would be blamed for what our clock makes of its own
        raise ConnectionFailed(Reason.TLS_NO_IDENTITY, f"this sidecar's certificate {problem}; see meshnet status")
    began = time.monotonic()
    plain = await sockets.connect(address, mark=mark, timeout=timeout)
    port, started = sockets.port_of(plain), time.monotonic()
    ticket = resumable.ticket if resumable and resumable.fits(credentials.client) else None
    channel = await secure.connect(plain, credentials.client, ticket, max(0.0, timeout - (started - began)))
    if channel.identity != identity:
        channel.close()
        raise ConnectionFailed(
            Reason.TLS_PEER_IDENTITY, f"{address} is {channel.identity}; the mesh says it must be {identity}"
        )
    now = time.monotonic()
    return ClientTunnel(
        key=key,
        port=port,
        channel=channel,
        wire=Tunnel(Role.CLIENT),
        good_until=min(channel.good_until, credentials.not_after) - _RETIRE_BEFORE_EXPIRY,
        handshake_ms=(now - started) * 1000,
        took=now - began,
        deadlines=deadlines,
    )


def _lost(deadline: Deadline, timeout: float, detail: str) -> ConnectionFailed:
    return no_answer(timeout) if deadline.passed else ConnectionFailed(Reason.TUNNEL_LOST, detail)


def no_answer(timeout: float) -> ConnectionFailed:
    """To an OPEN; seconds."""
    return ConnectionFailed(Reason.CONNECT_TIMEOUT, f"the peer sidecar did not answer OPEN within {timeout:.3g} s")


def no_turn(key: Key, waited: float) -> ConnectionFailed:
    """To make a tunnel, in time; seconds."""
    why = f"too many handshakes at once: no tunnel to {key[0]} within {waited:.1f} s"
    return ConnectionFailed(Reason.LIMIT_QUEUE_TIMEOUT, why)


def refusal(frame: Refused) -> ConnectionFailed:
    try:
        reason = Reason(frame.reason)
    except ValueError:
        reason = Reason.INTERNAL
    ended_by = EndedBy.POLICY if reason in (Reason.AUTHZ_DENIED, Reason.AUTHN_DISABLED) else EndedBy.PEER_PROXY
    return ConnectionFailed(reason, frame.detail or frame.reason, ended_by=ended_by, policy=frame.policy)
