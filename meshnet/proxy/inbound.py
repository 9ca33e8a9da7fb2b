"""An inbound connection's life: from another host to an application here, through a tunnel or in plain text."""

import socket
import time
from collections.abc import Sequence

from meshnet.codec.frames import Check, Frame, GoAway, Open, Ping, Refused
from meshnet.errors import ConnectionFailed, EndedBy, Reason, TunnelError
from meshnet.model.address import Address
from meshnet.model.canary import is_inbound_canary
from meshnet.model.connection import Direction, Security
from meshnet.model.identity import trust_domain
from meshnet.net import tls
from meshnet.net.check import check_application
from meshnet.net.original import original_destination
from meshnet.proxy.admission import admit
from meshnet.proxy.attempt import reach_address
from meshnet.proxy.canary import answer_canary
from meshnet.proxy.carry import relay
from meshnet.proxy.readiness import asks_for_readiness, pass_on
from meshnet.proxy.record import Record
from meshnet.proxy.state import ProxyState
from meshnet.relay import PlainLeg, Target, TunnelLeg
from meshnet.tunnel.protocol import Role, Tunnel

_APP_CONNECT_TIMEOUT = 1.0  # seconds; the application is on this host
_SERVED_CONNECT_TIMEOUT = 0.1  # under an order: then it is tried as ever, and seen by who looks
_LONGEST_CHECK = 10.0


async def carry_plain(client: socket.socket, source: Address, state: ProxyState) -> None:
    """A connection that came in plain text. Owns `client` from here on; one record comes out."""
    with state.registry.life(Direction.INBOUND, source, client) as record:
        target = record.original = original_destination(client)
        if is_inbound_canary(target):
            answer_canary(client, target, record)
            return
        if asks_for_readiness(target, state):
            pass_on(client, record, state)
            return
        decided = state.orders.generation
        admit("", target, record, state, tunnelled=False)
        seen = state.speaks_as(source)
        leg = await reach_address(target, record, state, _APP_CONNECT_TIMEOUT, local=True, source=seen)
        _offer(record, target, _APP_CONNECT_TIMEOUT, decided, state)
        await relay(PlainLeg(client), leg, record, state)


async def serve_tunnel(sock: socket.socket, source: Address, state: ProxyState) -> None:
    """A peer sidecar's tunnel: one lease after another, each of them one connection. Owns `sock`."""
    try:
        tunnel = await ServedTunnel.accept(sock, source, state)
    except ConnectionFailed as failure:
        with state.registry.life(Direction.INBOUND, source, sock):
            raise failure
        return
    state.tunnels.add(tunnel)
    try:
        while tunnel.reusable and (request := await tunnel.next_open()) is not None:
            if not tunnel.is_vouched_for(state):
                break  # an honest peer asks again, through a new tunnel
            await _carry_lease(tunnel, request, state)
            if state.draining or not tunnel.is_vouched_for(state):
                tunnel.go_away()
    finally:
        state.tunnels.discard(tunnel)
        tunnel.channel.close()


async def _carry_lease(tunnel: "ServedTunnel", request: Open, state: ProxyState) -> None:
    """One connection through the tunnel, which afterwards can serve another or not."""
    tunnel.reusable = False
    if request.check is not None:
        tunnel.reusable = await tunnel.refuse(await _checked(tunnel, request, request.check, state))
        return
    with state.registry.life(Direction.INBOUND, tunnel.source_of(request), None, request.id) as record:
        record.security = Security.MTLS
        record.source_identity = tunnel.identity
        record.destination_identity = state.identity.name
        record.tls_version, record.cipher = tunnel.channel.version, tunnel.channel.cipher
        target = record.original = Address(request.host, request.port)
        try:
            if tunnel.good_until < time.time():
                raise ConnectionFailed(Reason.TLS_EXPIRED, f"the certificate of {tunnel.identity} has expired")
            decided = state.orders.generation
            admit(tunnel.identity, target, record, state, tunnelled=True)
            timeout = min(_APP_CONNECT_TIMEOUT, request.deadline / 1000 or _APP_CONNECT_TIMEOUT)
            seen = state.speaks_as(tunnel.source)
            leg = await reach_address(target, record, state, timeout, local=True, source=seen)
            if record.abort_reason is not None:
                leg.abandon()
                record.go_on()
        except ConnectionFailed as failure:
            tunnel.reusable = await tunnel.refuse(failure)
            raise
        record.security = Security.MTLS
        _offer(record, target, _SERVED_CONNECT_TIMEOUT, decided, state)
        try:
            early = await tunnel.opened()
        except BaseException as error:
            leg.abandon()
            if not isinstance(error, OSError):
                raise
            raise ConnectionFailed(Reason.TUNNEL_LOST, str(error), ended_by=EndedBy.PEER_PROXY) from error
        outcome = await relay(TunnelLeg(tunnel.channel, tunnel.wire), leg, record, state, early)
        tunnel.reusable = outcome.reusable
        tunnel.late = outcome.late


async def _checked(tunnel: "ServedTunnel", request: Open, check: Check, state: ProxyState) -> ConnectionFailed:
    """What a peer is told that asks whether its connections would reach the application; `ok` if so.

    Who may not call may not check; and what a check says and hears is too little to be worth a record.
    """
    target = Address(request.host, request.port)
    nobodys = Record(state.registry, Direction.INBOUND, tunnel.source, None)  # never begun, so it never ends
    state.checks.answered += 1
    try:
        admit(tunnel.identity, target, nobodys, state, tunnelled=True)
        await check_application(
            target,
            send=check.send.encode(),
            expect=check.expect.encode(),
            mark=state.mark,
            timeout=min(request.deadline / 1000 or _APP_CONNECT_TIMEOUT, _LONGEST_CHECK),
            local=True,
        )
    except ConnectionFailed as failure:
        return failure
    return ConnectionFailed(Reason.OK)


def _offer(record: Record, target: Address, timeout: float, decided: int, state: ProxyState) -> None:
    """The core may dial for the next one by itself, unless the application is to see who its client is."""
    if not state.settings.capture.original_source:
        state.orders.offer(record, Target(target, state.mark, True, timeout), decided)


class ServedTunnel:
    """The accepting end of a tunnel, with the identity that was proven when it came up, to `authorities`."""

    def __init__(self, channel: tls.Channel, source: Address, authorities: bytes) -> None:
        self.channel = channel
        self.source = source
        self.authorities = authorities
        self.identity = channel.identity
        self.good_until = channel.good_until
        self.wire = Tunnel(Role.SERVER)
        self.reusable = True
        self.late: Sequence[Frame] = ()  # that came in one piece with the end of the last lease
        self._early: list[Frame] = []

    @classmethod
    async def accept(cls, plain: socket.socket, source: Address, state: ProxyState) -> "ServedTunnel":
        """The handshake, and who is there. Raises ConnectionFailed(tls.*)."""
        credentials = state.identity.credentials
        if credentials is None:
            raise ConnectionFailed(Reason.TLS_NO_IDENTITY, "this sidecar has no certificate: see meshnet status")
        with state.arrivals:
            channel = await state.relays.tls.accept(plain, credentials.server, state.arrivals.timeout)
        domain = _domain(state)
        if trust_domain(channel.identity) != domain:
            channel.close()
            raise ConnectionFailed(Reason.TLS_PEER_IDENTITY, f"{channel.identity} is not of trust domain {domain}")
        return cls(channel, source, credentials.authorities)

    def is_vouched_for(self, state: ProxyState) -> bool:
        """Whether the authorities are the same that its peer has proven its identity to, and the trust domain its."""
        credentials = state.identity.credentials
        return (
            credentials is not None
            and credentials.authorities == self.authorities
            and trust_domain(self.identity) == _domain(state)
        )

    def source_of(self, request: Open) -> Address:
        """The application's own address as the peer tells it, believed as far as it is on the peer's host."""
        host, _, port = request.source.rpartition(":")
        if host.strip("[]") != self.source.host or not port.isdecimal() or not 0 < int(port) < 65536:
            return self.source
        return Address(self.source.host, int(port))

    async def next_open(self) -> Open | None:
        """The next request, or None when the tunnel is over."""
        frames, self.late = list(self.late), ()
        try:
            while True:
                for position, frame in enumerate(frames):
                    match frame:
                        case Open():
                            self._early = frames[position + 1 :]
                            return frame
                        case Ping():
                            await self.channel.send_all(self.wire.pong())
                        case GoAway():
                            return None
                        case _:
                            pass  # what a lease that is over has left behind
                if self.wire.is_between_frames and not self.wire.retired:
                    self.channel.serve(self.source.host)
                data = await self.channel.receive()
                self.wire.take_back(*self.channel.last_ends())
                if not data:
                    return None
                frames = self.wire.receive(memoryview(data))
        except (OSError, ConnectionFailed, TunnelError):
            return None

    async def opened(self) -> list[Frame]:
        """Says OPENED; the frames that came right behind OPEN. Raises OSError."""
        await self.channel.send_all(self.wire.opened())
        early, self._early = self._early, []
        return early

    async def refuse(self, failure: ConnectionFailed) -> bool:
        """Says why not. Whether the tunnel can go on."""
        frame = Refused(reason=str(failure.reason), policy=failure.policy, detail=failure.detail)
        try:
            await self.channel.send_all(self.wire.refused(frame))
        except OSError:
            return False
        return self.wire.idle  # not so if a GOAWAY came behind OPEN

    def renewed(self, state: ProxyState) -> None:
        """Our credentials are others. If we believe others than before, its peer has to prove itself again."""
        if not self.is_vouched_for(state):
            self.channel.stop_serving(self.source.host)
            self.go_away()

    def go_away(self) -> None:
        """Asks the peer to open no more leases here; best effort, for the tunnel may be in a relay's hands."""
        if self.reusable and self.wire.idle:
            try:
                self.channel.send_now(self.wire.goaway())
            except OSError:
                pass


def _domain(state: ProxyState) -> str:
    """The trust domain whose workloads may call."""
    return state.snapshot.trust_domain or trust_domain(state.identity.name)
