"""An outbound connection's life: from this host's applications into the mesh, or past it."""

import socket
from functools import partial

from meshnet.decide.route import Passthrough, Refuse, ToService, route
from meshnet.decide.standing import endpoint_for_all
from meshnet.errors import ConnectionFailed, EndedBy, Phase, Reason
from meshnet.model.address import Address
from meshnet.model.canary import is_canary, is_proof
from meshnet.model.connection import Direction
from meshnet.model.service import Endpoint, ServicePort
from meshnet.net import sockets
from meshnet.net.original import original_destination
from meshnet.proxy.attempt import EndpointLeg, reach_address, standing_request
from meshnet.proxy.canary import answer_canary
from meshnet.proxy.carry import relay
from meshnet.proxy.client import AcceptedClient, Client
from meshnet.proxy.dial import dial_service
from meshnet.proxy.held import HeldClient, HeldSyns
from meshnet.proxy.record import Record
from meshnet.proxy.standing_order import Asking, Before
from meshnet.proxy.state import ProxyState, ServiceState
from meshnet.relay import Target

_PASSTHROUGH_TIMEOUT = 10.0  # seconds; nothing else is to be tried, so longer than an attempt at an endpoint


async def carry(client: socket.socket, source: Address, state: ProxyState) -> None:
    """Owns `client` from here on. Whatever happens in here, one record comes out."""
    if state.held is not None and state.held.arrived(client, source):
        return  # its life has begun with its SYN
    with state.registry.life(Direction.OUTBOUND, source, client) as record:
        destination = record.original = original_destination(client)
        if is_canary(destination) or is_proof(destination):
            answer_canary(client, destination, record)
            return
        await _carry(AcceptedClient(client), destination, record, state, Before())


async def carry_held(client: HeldClient, held: HeldSyns, state: ProxyState) -> None:
    """One whose SYN waits. Whatever happens in here, one record comes out, and who waits still is refused."""
    record = state.registry.life(Direction.OUTBOUND, client.syn.source, None)
    record.original = client.syn.destination
    record.held = True
    try:
        with record:
            await _carry(client, record.original, record, state, Before())
    finally:
        held.finish(client, record.reason)
        if client.sock is not None:
            sockets.reset(client.sock)  # as the record does; it may have come when nobody waited any more


async def carry_on(record: Record, before: Before, state: ProxyState) -> None:
    """One that an order began, and whose endpoint could not be reached."""
    with record:
        assert record.original is not None  # no order is for a connection
        assert record.client is not None  # that has lost either
        await _carry(AcceptedClient(record.client), record.original, record, state, before)


async def _carry(
    client: Client,
    destination: Address,
    record: Record,
    state: ProxyState,
    before: Before,
) -> None:
    state.need_mesh()
    decided = state.orders.generation
    # Whether it is local matters for our own ports only, and the kernel is not asked for nothing.
    is_local = destination.port in state.own_ports and state.is_local(destination.host)
    match route(state.snapshot, destination, state.own_ports, is_local):
        case ToService(service=service, pinned=pinned):
            await _to_service(client, service, pinned, record, state, decided, before)
        case Passthrough():
            leg = await reach_address(destination, record, state, _PASSTHROUGH_TIMEOUT)
            leg.early = before.early
            state.orders.offer(record, Target(destination, state.mark, False, _PASSTHROUGH_TIMEOUT), decided)
            await _join(client, leg, record, state)
        case Refuse(reason=reason, detail=detail):
            raise ConnectionFailed(reason, detail)


async def _to_service(
    client: Client,
    service: ServicePort,
    pinned: Endpoint | None,
    record: Record,
    state: ProxyState,
    decided: int,
    before: Before,
) -> None:
    record.service = service.name
    record.source_identity = state.identity.name
    held = state.service(service)
    record.phase = Phase.QUEUE
    record.queued = await state.enter(held)
    try:
        if record.queued is not None and client.gave_up():
            raise ConnectionFailed(Reason.PEER_RST, "the client gave up in the queue", ended_by=EndedBy.CLIENT)
        if before.failed is not None:
            record.phase = Phase.CONNECT  # where it was, should there be nothing left to try
        leg = await dial_service(service, pinned, client, record, state, before)
        _offer_order(service, pinned, held, leg, record, state, decided)
        await _join(client, leg, record, state)
    finally:
        state.leave(held)


async def _join(client: Client, leg: EndpointLeg, record: Record, state: ProxyState) -> None:
    try:
        near = await client.leg()
    except BaseException:
        leg.abandon()
        leg.release(state, reusable=False)
        raise
    record.client = near.sock
    await relay(near, leg, record, state, leg.early_frames)


def _offer_order(
    service: ServicePort,
    pinned: Endpoint | None,
    held: ServiceState,
    leg: EndpointLeg,
    record: Record,
    state: ProxyState,
    decided: int,
) -> None:
    """For the connections to come, if they can only be treated as this one was."""
    known = leg.known
    if known is None:
        return
    endpoint = endpoint_for_all(service, pinned, known.breaker.state(record.opened))
    if endpoint is None or state.is_local(endpoint.address.host):
        return
    patience = min(service.traffic.connect.attempt_timeout, service.traffic.connect.total_timeout)
    target = Target(endpoint.address, state.mark, False, patience)
    asking = None
    if leg.tunnel is not None:
        opening = partial(standing_request, endpoint, service, record.source.host, patience)
        asking = Asking(leg.tunnel.key, opening)
    state.orders.offer(record, target, decided, held, known, asking)
