"""Open connections grow: what a request, a new one, a scrape and `meshnet conns` cost while all others are idle."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.bench.figures import Limit, Spread, verdict
from tests.bench.growth.room import BUSY, Room
from tests.bench.growth.sidecars import LagWatch, Pair, conns_seconds, pair, scrape_seconds
from tests.bench.growth.table import table
from tests.bench.load import LoadFailed
from tests.bench.report import number

LEVELS = (1, 10, 100, 1_000, 10_000, 20_000)

GROWTH_TARGET = Limit(1.25, set=True)
"""What a request and a new connection cost with most open ones, by what they cost with _FEW."""

_FEW = 100  # with less the machine is not yet at work
_AT_ONCE = 8  # new connections
_TIMES = 3
_SECONDS = 0.5  # each time
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


class Spent(NamedTuple):
    """Microseconds of CPU, each time that it was measured."""

    request: Sequence[float]
    new_connection: Sequence[float]


def connections(program: Path, mode: str, levels: Sequence[int], room: Room, seconds: float) -> str:
    """The table, what the target says to it, and each of `levels` that was not reached, and why.

    No level is begun, or waited for, later than `seconds` after the first.
    """
    rows: list[tuple[object, ...]] = []
    spent: dict[int, Spent] = {}
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
                spent[level], others = _costs(sidecars, level)
                rows.append((level, memory, *map(statistics.median, spent[level]), *others))
            except (LoadFailed, TimeoutError) as error:
                which = ", ".join(f"{each:,}" for each in reachable[len(rows) :])
                missed.append(f"Not reached: {which}, for {error}.")
                break
    return "\n".join([table(_HEAD, rows).rstrip(), *growth_verdicts(spent), *filter(None, missed)]) + "\n"


def growth_verdicts(spent: Mapping[int, Spent]) -> Iterator[str]:
    """What GROWTH_TARGET says to the most open connections; nothing where there are no more than few."""
    few, most = min((level for level in spent if level >= _FEW), default=0), max(spent, default=0)
    if not few or few == most:
        return
    for name in Spent._fields:
        base = statistics.median(getattr(spent[few], name))
        ratios = [each / base for each in getattr(spent[most], name)]
        said = verdict(Spread.of(ratios), GROWTH_TARGET, lower_is_better=True)
        what = f"a {name.replace('_', ' ')} at {most:,} at most {GROWTH_TARGET.value:g} times what it costs at {few:,}"
        yield f"\nTarget: {what}. {', '.join(map(number, ratios))}: {said}."


def _costs(sidecars: Pair, idle: int) -> tuple[Spent, tuple[object, ...]]:
    load_lag = LagWatch(sidecars)
    ping_pong = [sidecars.run("rr", BUSY, _SECONDS) for _ in range(_TIMES)]
    handshakes = sidecars.handshakes()
    new = [sidecars.run("crr", _AT_ONCE, _SECONDS) for _ in range(_TIMES)]
    handshakes = sidecars.handshakes() - handshakes
    lag = load_lag.worst()
    asking_lag = LagWatch(sidecars)
    scrape = min(scrape_seconds(sidecars) for _ in range(3))
    conns = min(conns_seconds(sidecars, idle) for _ in range(3))
    spent = Spent(*([each.cpu_seconds / each.units * 1e6 for each in runs] for runs in (ping_pong, new)))
    return spent, (
        lag,
        scrape * 1000,
        conns * 1000,
        asking_lag.worst(),
        handshakes / sum(each.opened for each in new),
        sidecars.most_descriptors(),
    )
