"""Open connections grow: what a request, a new one, a scrape and `meshnet conns` cost while all others are idle."""

from collections.abc import Sequence
from pathlib import Path

from tests.bench.growth.sidecars import LagWatch, Pair, conns_seconds, pair, scrape_seconds
from tests.bench.growth.table import table
from tests.bench.load import LoadFailed
from tests.bench.tests import MTLS, PLAIN

LEVELS = {PLAIN: (1, 100, 1_000, 5_000, 10_000, 20_000), MTLS: (1, 100, 1_000, 5_000)}
"""Of mTLS fewer: each takes a handshake, and they are there to show the same."""

_BUSY = 64  # connections that play ping-pong, beside the idle ones
_AT_ONCE = 8  # new connections
_SECONDS = 1.0
_OTHER_FILES = 200  # of a sidecar, beside those of connections


def connections(program: Path, mode: str, levels: Sequence[int], files: int) -> str:
    """`files`: how many descriptors a process may have."""
    head = (
        "open",
        "KiB/connection",
        "CPU us/request",
        "CPU us/new connection",
        "lag, ms",
        "scrape, ms",
        "conns, ms",
        "lag of both, ms",
    )
    rows: list[tuple[object, ...]] = []
    with pair(program, mode) as sidecars:
        before, opened = sidecars.memory(), 0
        for level in _reachable(levels, files):
            try:
                sidecars.hold(level - opened)
                opened = level
                memory = (sidecars.memory() - before) / level
                rows.append((level, memory, *_costs(sidecars)))
            except (LoadFailed, TimeoutError) as error:
                rows.append((level, f"not reached: {error}", *[""] * (len(head) - 2)))
                break
    missed = [f"{level:,}" for level in levels if _descriptors(level) > files]
    why = f"Not reached: {', '.join(missed)}, for a process may have {files:,} descriptors here.\n" if missed else ""
    return table(head, rows) + why


def _descriptors(level: int) -> int:
    """What a sidecar needs."""
    return 2 * (level + _BUSY) + _OTHER_FILES


def _reachable(levels: Sequence[int], files: int) -> list[int]:
    """Those that `files` descriptors are enough for, and the most they allow when that is less than the last."""
    fitting = [level for level in levels if _descriptors(level) <= files]
    return fitting if len(fitting) == len(levels) else [*fitting, (files - _OTHER_FILES) // 2 - _BUSY]


def _costs(sidecars: Pair) -> tuple[object, ...]:
    load_lag = LagWatch(sidecars)
    ping_pong = sidecars.run("rr", _BUSY, _SECONDS)
    new = sidecars.run("crr", _AT_ONCE, _SECONDS)
    lag = load_lag.worst()
    asking_lag = LagWatch(sidecars)
    scrape = min(scrape_seconds(sidecars) for _ in range(3))
    conns = min(conns_seconds(sidecars) for _ in range(3))
    return (
        ping_pong.cpu_seconds / ping_pong.units * 1e6,
        new.cpu_seconds / new.units * 1e6,
        lag,
        scrape * 1000,
        conns * 1000,
        asking_lag.worst(),
    )
