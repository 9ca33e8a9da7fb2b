"""One attempt to reach an endpoint or an address: through a tunnel, in plain TCP, or on this very host."""

import logging
import time
from dataclasses import dataclass, field

from meshnet.codec import frames
from meshnet.codec.frames import Frame, Open
from meshnet.errors import ConnectionFailed, Phase, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Attempt, Security
from meshnet.model.service import Endpoint, ServicePort, TunnelKind
from meshnet.net import sockets
from meshnet.proxy.admission import admit
from meshnet.proxy.patience import Patience
from meshnet.proxy.record import Record
from meshnet.proxy.state import EndpointState, ProxyState
from meshnet.relay import PlainLeg, TunnelLeg
from meshnet.tunnel.client import ClientTunnel, no_answer, no_turn

_log = logging.getLogger("meshnet.proxy")

_TOO_SHORT = 0.005  # seconds, for an answer: what goes along with the question might arrive all the same
_KEPT_TUNNELS_TRIED = 3  # that turn out to be dead, before the endpoint is blamed after all


@dataclass(slots=True)
class EndpointLeg:
    """A leg that is up, and what has to be undone when its connection is over."""

    leg: PlainLeg | TunnelLeg
    early: bytes = b""  # of the client's, read already and still to be sent
    known: EndpointState | None = None
    tunnel: ClientTunnel | None = None
    early_frames: list[Frame] = field(default_factory=list)

    @property
    def port(self) -> int:
        """Ours."""
        if isinstance(self.leg, PlainLeg):
            return sockets.port_of(self.leg.sock)
        return self.tunnel.port if self.tunnel is not None else 0

    def abandon(self) -> None:
        """Closes a plain leg that no relay has taken over; one that a relay owned is closed by now."""
        if isinstance(self.leg, PlainLeg):
            sockets.reset(self.leg.sock)

    def release(self, state: ProxyState, *, reusable: bool) -> None:
        if self.known is not None:
            self.known.open -= 1
        if self.tunnel is not None:
            state.pool.give_back(self.tunnel, reusable=reusable)


async def reach_endpoint(
    endpoint: Endpoint, service: ServicePort, early: bytes, patience: Patience, record: Record, state: ProxyState
) -> EndpointLeg:
    """A leg to `endpoint`. Raises ConnectionFailed; either way the record has one attempt more."""
    if record.attempts:
        record.forget_tunnel()
    record.endpoint = endpoint.name
    record.phase = Phase.CONNECT
    started = time.monotonic()
    try:
        if state.is_local(endpoint.address.host):
            leg = await _hairpin(endpoint, early, patience, record, state)
        elif endpoint.tunnel is TunnelKind.NONE:
            sock = await sockets.connect(endpoint.address, mark=state.mark, timeout=patience.for_attempt())
            leg = EndpointLeg(PlainLeg(sock), early)
            record.security = Security.PLAIN
        else:
            leg = await _through_tunnel(endpoint, service, early, patience, record, state)
    except ConnectionFailed as failure:
        _note(record, endpoint.name, started, failure)
        raise
    _note(record, endpoint.name, started, None)
    return leg


async def reach_address(
    address: Address, record: Record, state: ProxyState, timeout: float, *, local: bool = False, source: str = ""
) -> EndpointLeg:
    """A plain leg to an address that is not, or need not be, an endpoint: pass-through and the application itself.

    An application sees the address `source` if there is one.
    """
    record.endpoint = str(address)
    record.phase = Phase.CONNECT
    started = time.monotonic()
    mark = state.mark | (state.settings.proxy.local_mark if source else 0)
    try:
        sock = await sockets.connect(address, mark=mark, timeout=timeout, local=local, source=source)
    except ConnectionFailed as failure:
        _note(record, record.endpoint, started, failure)
        raise
    record.security = Security.PLAIN
    _note(record, record.endpoint, started, None)
    return EndpointLeg(PlainLeg(sock))


async def _hairpin(
    endpoint: Endpoint, early: bytes, patience: Patience, record: Record, state: ProxyState
) -> EndpointLeg:
    """An endpoint on this very host: the inbound side's policy in process, no tunnel to ourselves."""
    admit(state.identity.name, endpoint.address, record, state, tunnelled=True)
    record.destination_identity = state.identity.name
    sock = await sockets.connect(endpoint.address, mark=state.mark, timeout=patience.for_attempt(), local=True)
    record.security = Security.PLAIN
    return EndpointLeg(PlainLeg(sock), early)


async def _through_tunnel(
    endpoint: Endpoint, service: ServicePort, early: bytes, patience: Patience, record: Record, state: ProxyState
) -> EndpointLeg:
    """A lease on a tunnel to the endpoint's sidecar, which has reached the application when this returns."""
    pool, peer = state.pool, (endpoint.tunnel_address, endpoint.identity)
    tried, spent, queued = 0, 0.0, 0.0
    while True:
        record.phase = Phase.TLS
        asked = time.monotonic()
        tunnel = pool.lease_idle(*peer) or await pool.lease(
            *peer, patience=patience.for_turn(), timeout=patience.for_attempt
        )
        took = tunnel.took if tunnel.is_fresh else 0.0
        queued += time.monotonic() - asked - took
        # What the peer refuses on a tunnel was refused by that peer: on record before it is asked.
        record.security = Security.MTLS
        record.source_identity = state.identity.name
        record.destination_identity = endpoint.identity
        record.tls_version, record.cipher = tunnel.channel.version, tunnel.channel.cipher
        if tunnel.is_fresh:
            record.handshake_ms, record.resumed = tunnel.handshake_ms, tunnel.channel.resumed
        record.phase = Phase.CONNECT
        opened, asked = False, time.monotonic()
        try:
            left = patience.for_attempt(spent + took)
            if left < _TOO_SHORT:
                was_late = queued > _TOO_SHORT and patience.attempt - spent - took > _TOO_SHORT
                raise no_turn(peer, queued) if was_late else no_answer(patience.attempt)
            frames = await tunnel.open(_request(endpoint, service, left, record), early, left)
            opened = True
        except ConnectionFailed as failure:
            tried += 1
            if failure.reason is not Reason.TUNNEL_LOST or tunnel.is_fresh or tried == _KEPT_TUNNELS_TRIED:
                raise
            pool.weed(*peer)  # the peer had hung up on a kept tunnel: that says nothing about the endpoint
            record.forget_tunnel()
            spent += time.monotonic() - asked
            continue
        finally:
            if not opened:
                pool.give_back(tunnel, reusable=tunnel.wire.idle)
        record.tally.sent = len(early)
        return EndpointLeg(TunnelLeg(tunnel.channel, tunnel.wire), tunnel=tunnel, early_frames=frames)


def _request(endpoint: Endpoint, service: ServicePort, seconds: float, record: Record) -> Open:
    return Open(
        host=endpoint.address.host,
        port=endpoint.address.port,
        service=service.name,
        source=str(record.source),
        id=record.id,
        deadline=int(seconds * 1000),
    )


def standing_request(
    endpoint: Endpoint, service: ServicePort, source: str, patience: float
) -> tuple[bytes, bytes, bytes]:
    """The OPEN of all connections from host `source`, without the ports of their sources and their ids.

    See meshnet.relay.Through.
    """
    asked = Open(
        host=endpoint.address.host,
        port=endpoint.address.port,
        service=service.name,
        source=str(Address(source, 0)),
        id="@",
        deadline=int(patience * 1000),
    )
    before, behind = frames.encode(asked)[frames.HEADER_SIZE :].split(b':0","id":"@"')
    return before + b":", b'","id":"', b'"' + behind


def _note(record: Record, endpoint: str, started: float, failure: ConnectionFailed | None) -> None:
    milliseconds = round((time.monotonic() - started) * 1000, 3)
    attempt = Attempt(
        endpoint=endpoint,
        result=str(failure.reason) if failure else "ok",
        ms=milliseconds,
        detail=failure.detail if failure else "",
        weighed=record.weighed,
    )
    record.attempts.append(attempt)
    # A peer may have said what stands in id and detail.
    _log.debug("%r: %s %s after %s ms %r", record.id, endpoint, attempt.result, milliseconds, attempt.detail)
