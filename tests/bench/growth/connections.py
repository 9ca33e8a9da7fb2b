"""Open connections grow: what a request, a new one, a scrape and `meshnet conns` cost while all others are idle."""

import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench.growth.room import BUSY, Room
from tests.bench.growth.sidecars import LagWatch, Pair, conns_seconds, pair, scrape_seconds
from tests.bench.growth.table import table
from tests.bench.load import LoadFailed

LEVELS = (1, 10, 100, 1_000, 10_000, 20_000)

_AT_ONCE = 8  # new connections
_SECONDS = 1.0
_WARM = 0.3
_HEAD = (
    "open",
    "KiB/connection",
    "CPU us/request",
    "CPU us/new connection",
    "lag, ms",
    "scrape, ms",
    "conns, ms",
    "lag of both, ms",
    "handshakes/new connection",
    "descriptors",
)


def connections(program: Path, mode: str, levels: Sequence[int], room: Room, seconds: float) -> str:
    """The table, and below it each of `levels` that was not reached, and why.

    No level is begun, or waited for, later than `seconds` after the first.
    """
    rows: list[tuple[object, ...]] = []
    missed = [room.missed(levels)]
    with pair(program, mode, room.workers) as sidecars:
        # The memory of what is open beside the idle ones is there before they are.
        sidecars.run("rr", BUSY, _WARM)
        sidecars.run("crr", _AT_ONCE, _WARM)
        before, opened = sidecars.memory(), 0
        reachable = room.reachable(levels)
        ends = time.monotonic() + seconds
        for level in reachable:
            try:
                left = ends - time.monotonic()
                if left <= 0:
                    raise LoadFailed(f"the {seconds:g} s that this table may take were over")
                sidecars.hold(level - opened, at_most=room.files // 2, within=left)
                opened = level
                memory = (sidecars.memory() - before) / level
                rows.append((level, memory, *_costs(sidecars, level)))
            except (LoadFailed, TimeoutError) as error:
                which = ", ".join(f"{each:,}" for each in reachable[len(rows) :])
                missed.append(f"Not reached: {which}, for {error}.")
                break
    return "\n".join([table(_HEAD, rows).rstrip(), *filter(None, missed)]) + "\n"


def _costs(sidecars: Pair, idle: int) -> tuple[object, ...]:
    load_lag = LagWatch(sidecars)
    ping_pong = sidecars.run("rr", BUSY, _SECONDS)
    handshakes = sidecars.handshakes()
    new = sidecars.run("crr", _AT_ONCE, _SECONDS)
    handshakes = sidecars.handshakes() - handshakes
    lag = load_lag.worst()
    asking_lag = LagWatch(sidecars)
    scrape = min(scrape_seconds(sidecars) for _ in range(3))
    conns = min(conns_seconds(sidecars, idle) for _ in range(3))
    return (
        ping_pong.cpu_seconds / ping_pong.units * 1e6,
        new.cpu_seconds / new.units * 1e6,
        lag,
        scrape * 1000,
        conns * 1000,
        asking_lag.worst(),
        handshakes / new.opened,
        sidecars.most_descriptors(),
    )
