"""The last step that outbound and inbound lives share: both legs are up, the bytes move, and it ends."""

import time

from meshnet.codec.frames import Frame
from meshnet.errors import Phase
from meshnet.proxy.attempt import EndpointLeg
from meshnet.proxy.record import Record
from meshnet.proxy.state import ProxyState
from meshnet.relay import Link, Outcome, PlainLeg, TunnelLeg


async def relay(
    client: PlainLeg | TunnelLeg,
    endpoint: EndpointLeg,
    record: Record,
    state: ProxyState,
    early_frames: list[Frame] | None = None,
) -> Outcome:
    """Moves the bytes until both directions are over; the record says how it ended, and `endpoint` is released."""
    reusable = False
    try:
        record.connected = time.monotonic()
        record.phase = Phase.DATA
        record.link = Link(
            client,
            endpoint.leg,
            to_endpoint=endpoint.early,
            early_frames=early_frames or [],
            leg_port=endpoint.port,
        )
        mover = state.relays.choose(record.link)
        record.relay = mover.name
        state.registry.connected(record)
        record.go_on()
        outcome = await mover.run(record.link, record.tally)
        record.finish(outcome)
        if endpoint.known is not None:
            state.ended(record, endpoint.known)
        reusable = outcome.reusable
        return outcome
    except BaseException:  # trio.Cancelled, for one
        endpoint.abandon()
        raise
    finally:
        endpoint.release(state, reusable=reusable)
