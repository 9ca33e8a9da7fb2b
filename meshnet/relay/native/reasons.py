"""How the core names the ends of links: the enums of core.h, in their order."""

import functools
import os

from meshnet.codec import frames
from meshnet.codec.frames import Kind, Reset
from meshnet.errors import EndedBy, Reason
from meshnet.relay import TUNNEL_CLOSED, Outcome, reset_by_peer

REASONS = (
    Reason.OK,
    Reason.DRAIN,  # aborted: whoever did it says why
    Reason.PEER_RST,
    Reason.KEEPALIVE_DEAD,
    Reason.INTERNAL,
    Reason.TUNNEL_LOST,
    Reason.TUNNEL_PROTOCOL,
    Reason.PEER_RST,  # reset by the peer sidecar, which says why
)
ABORTED, LOST, PROTOCOL, RESET = 1, 5, 6, 7
END_NAMES = {int(Kind.FIN): "FIN", int(Kind.RESET): "RESET"}
"""For meshnet.relay.Wire.take_back, by the kind of the frame that ended half a lease."""
ENDED_BY = (EndedBy.CLIENT, EndedBy.SERVER, EndedBy.PROXY, EndedBy.PEER_PROXY)


def link_outcome(reason: int, ended_by: int, error: int, reset: bytes, from_client: bool) -> Outcome:
    """How a link has ended that nobody aborted. `reset`: the payload of the peer's RESET.

    `from_client`: the link's client leg is the tunnel.
    """
    if reason != RESET:
        return plain_outcome(reason, ended_by, error)
    try:
        text = frames.decode_reset(reset).reason
    except ValueError as problem:
        detail = f"the peer sidecar broke meshnet/1 within a lease: {problem}"
        return Outcome(Reason.TUNNEL_PROTOCOL, EndedBy.PEER_PROXY, detail)
    return Outcome(*reset_by_peer(text, EndedBy.CLIENT if from_client else EndedBy.SERVER))


@functools.lru_cache(maxsize=64)  # asked for every connection, and nearly all end alike
def plain_outcome(reason: int, ended_by: int, error: int) -> Outcome:
    detail = os.strerror(error) if error else ""
    if reason == LOST and not error:
        detail = TUNNEL_CLOSED
    elif reason == PROTOCOL:
        detail = "the peer sidecar broke meshnet/1 within a lease"
    return Outcome(REASONS[reason], ENDED_BY[ended_by], detail)


def reset_payload(reason: str) -> bytes:
    """Of the RESET frame that says so."""
    return frames.encode(Reset(reason=str(reason)))[frames.HEADER_SIZE :]
