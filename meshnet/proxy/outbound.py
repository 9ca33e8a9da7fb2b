"""An outbound connection's life: from this host's applications into the mesh, or past it."""

import socket

from meshnet.decide.route import Passthrough, Refuse, ToService, route
from meshnet.errors import ConnectionFailed, EndedBy, Phase, Reason
from meshnet.model.address import Address
from meshnet.model.canary import CANARY_GREETING, is_canary
from meshnet.model.connection import Direction
from meshnet.model.service import Endpoint, ServicePort
from meshnet.net import sockets
from meshnet.net.original import original_destination
from meshnet.proxy.attempt import reach_address
from meshnet.proxy.carry import relay
from meshnet.proxy.dial import dial_service
from meshnet.proxy.record import Record
from meshnet.proxy.state import ProxyState
from meshnet.relay import PlainLeg

_PASSTHROUGH_TIMEOUT = 10.0  # seconds; nothing else is to be tried, so longer than an attempt at an endpoint


async def carry(client: socket.socket, source: Address, state: ProxyState) -> None:
    """Owns `client` from here on. Whatever happens in here, one record comes out."""
    with state.registry.life(Direction.OUTBOUND, source, client) as record:
        destination = record.original = original_destination(client)
        if is_canary(destination):
            _answer_canary(client, destination)
            record.end(Reason.OK, EndedBy.PROXY, "capture canary")
            return
        state.need_mesh()
        # Whether it is local matters for our own ports only, and the kernel is not asked for nothing.
        is_local = destination.port in state.own_ports and state.is_local(destination.host)
        match route(state.snapshot, destination, state.own_ports, is_local):
            case ToService(service=service, pinned=pinned):
                await _to_service(client, service, pinned, record, state)
            case Passthrough():
                leg = await reach_address(destination, record, state, _PASSTHROUGH_TIMEOUT)
                await relay(PlainLeg(client), leg, record, state)
            case Refuse(reason=reason, detail=detail):
                raise ConnectionFailed(reason, detail)


async def _to_service(
    client: socket.socket, service: ServicePort, pinned: Endpoint | None, record: Record, state: ProxyState
) -> None:
    record.service = service.name
    record.source_identity = state.identity.name
    held = state.service(service)
    record.phase = Phase.QUEUE
    record.queued = await state.enter(held)
    try:
        if record.queued is not None and sockets.was_reset(client):
            raise ConnectionFailed(Reason.PEER_RST, "the client gave up in the queue", ended_by=EndedBy.CLIENT)
        leg = await dial_service(service, pinned, client, record, state)
        await relay(PlainLeg(client), leg, record, state, leg.early_frames)
    finally:
        state.leave(held)


def _answer_canary(client: socket.socket, destination: Address) -> None:
    client.send(CANARY_GREETING + f"{destination}\n".encode())
    client.close()
