"""When a connection has lived long enough: idle, half-closed, or old. Pure; times in seconds."""

from collections.abc import Hashable, Mapping
from typing import TypeVar
from zlib import crc32

from meshnet.errors import Reason
from meshnet.model.service import Timeouts

IDLE_MOMENT = 0.1  # without a byte either way: nothing is likely to be under way
_JITTER = 0.2  # of an age, either way: connections that began together do not end together

K = TypeVar("K", bound=Hashable)


def overdue(
    timeouts: Timeouts, *, age: float, idle: float | None, half_closed: bool, connection: str
) -> tuple[Reason, str] | None:
    """Why a connection is to be ended now, as a code and in words; None: it may live on.

    `idle`: since when nothing has moved, None where nothing ever did. `connection`: its id, by which ages differ.
    """
    quiet = age if idle is None else idle
    if half_closed and timeouts.half_closed and quiet >= timeouts.half_closed:
        return Reason.HALF_CLOSE_TIMEOUT, f"one side had ended, and nothing moved for {timeouts.half_closed:g} s"
    if timeouts.idle and quiet >= timeouts.idle:
        return Reason.IDLE, f"nothing moved for {timeouts.idle:g} s"
    if not timeouts.max_age:
        return None
    most = timeouts.max_age * _jittered(connection)
    if age >= most + timeouts.max_age_grace or (age >= most and quiet >= IDLE_MOMENT):
        return Reason.MAX_AGE, f"it was {age:.0f} s old"
    return None


def surplus(loads: Mapping[K, tuple[int, int]], above: float) -> dict[K, int]:
    """How many connections each endpoint has beyond `above` times its share; `loads`: connections and weight of each.

    Only as many as those below their share lack, and none where ending one would only turn the tables.
    """
    total = sum(connections for connections, _ in loads.values())
    weights = sum(weight for _, weight in loads.values())
    if not above or not weights:
        return {}
    shares = {key: total * weight / weights for key, (_, weight) in loads.items()}
    lacking = sum(max(0, int(shares[key]) - connections) for key, (connections, _) in loads.items())
    found: dict[K, int] = {}
    for key, (connections, _) in sorted(loads.items(), key=lambda item: shares[item[0]] - item[1][0]):
        beyond = (
            min(connections - max(1, int(shares[key] + 0.999)), lacking) if connections > above * shares[key] else 0
        )
        if beyond > 0:
            found[key] = beyond
            lacking -= beyond
    return found


def _jittered(connection: str) -> float:
    """The same for one connection whenever it is asked, between 1 - _JITTER and 1 + _JITTER."""
    return 1 + _JITTER * (crc32(connection.encode()) / 2**31 - 1)
