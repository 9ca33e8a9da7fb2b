"""How the core names the ends of links: the enums of core.h, in their order."""

import functools
import os

from meshnet.errors import EndedBy, Reason
from meshnet.relay import Outcome

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
ENDED_BY = (EndedBy.CLIENT, EndedBy.SERVER, EndedBy.PROXY, EndedBy.PEER_PROXY)


@functools.lru_cache(maxsize=64)  # asked for every connection under an order, and nearly all end alike
def plain_outcome(reason: int, ended_by: int, error: int) -> Outcome:
    """Of a link between two plain legs."""
    return Outcome(REASONS[reason], ENDED_BY[ended_by], os.strerror(error) if error else "")
