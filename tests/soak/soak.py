"""One soak from its beginning to the report."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

from meshnet.model.connection import Connection, Direction
from meshnet_cli.demo.wire import Capture
from meshnet_cli.demo.world import Host, World, wait_for
from tests.bench.load import pss
from tests.faults.books import access_lines, held
from tests.faults.causes import small_disk
from tests.soak.clients import Clients
from tests.soak.faults import Faults
from tests.soak.judge import idle_clients, summary, unexplained
from tests.soak.kind import GREETERS
from tests.soak.stage import GREETER, Stage
from tests.soak.talk import SECRET

_MOST_GROWTH = 48 << 10  # KiB of PSS, of one sidecar
_PATIENCE = 20.0  # seconds for what is left to end


@dataclass(frozen=True, slots=True)
class Report:
    lines: list[str]
    wrong: list[str]


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a sidecar: KiB of memory, descriptors and threads."""

    memory: int
    held: Counter[str]

    @classmethod
    def of(cls, pid: int) -> Self:
        return cls(pss([pid]), held(pid))


def soak(seconds: float, seed: int, tell: Callable[[str], None], only: str = "") -> Report:
    """Raises ProgramFailed or TimeoutError when something does not come up, or does not come back."""
    tell(f"seed {seed}")
    with World() as world, small_disk(world.directory / "disk") as disk, Stage(world, disk) as stage:
        with Capture(world.switch, SECRET) as wire:
            faults = Faults(stage, wire, random.Random(seed), tell, only)
            with Clients(stage) as clients:
                wait_for(lambda: not idle_clients(clients.calls, clients.names), timeout=60.0, what="all are served")
                end = time.monotonic() + seconds
                before = {host.name: Usage.of(stage.pid(host)) for host in stage.hosts}
                faults.go_on_until(end)
        calls = clients.calls
        wrong = [*unexplained(calls, faults.so_far), *idle_clients(calls, clients.names)]
        for host in stage.hosts:
            wrong += _account(stage, host, clients, faults)
            wrong += _growth(stage, host, before[host.name])
    if plain := wire.with_marker - faults.uncovered:
        wrong.append(f"{plain} frames between hosts had in plain text what was for an endpoint")
    told = f"{faults.uncovered} frames in plain text while there were no rules"
    return Report([f"seed {seed}", *summary(calls, faults.so_far), told], wrong)


def _account(stage: Stage, host: Host, clients: Clients, faults: Faults) -> Iterator[str]:
    """Of the sidecar that runs there now, since it was started: one line of the log for each connection."""
    sidecar = stage.sidecar(host)

    def lines() -> list[Connection]:
        assert sidecar.process is not None
        return access_lines(sidecar.process.output.rpartition("listening: ")[2])

    def balanced() -> bool:
        status = sidecar.status()
        return not status.open_connections and len(lines()) == status.opened_total

    try:
        wait_for(balanced, timeout=_PATIENCE)
    except TimeoutError:
        status = sidecar.status()
        yield (
            f"{host.name}: {status.open_connections} connections are still open, and of {status.opened_total} "
            f"that were opened {len(lines())} are in the log"
        )
    told = lines()
    ids = Counter(line.id for line in told if line.direction is Direction.OUTBOUND)
    yield from (f"{host.name}: {id} was told {count} times" for id, count in ids.items() if count > 1)
    bugs = [line for line in told if line.reason is not None and line.reason.code == "internal"]
    yield from (f"{host.name}: {line.id} ended by a fault of the sidecar: {line.reason}" for line in bugs)
    if host is stage.web:
        yield from _greetings(told, clients, faults.sidecars.started.get(host.name))


def _greetings(told: list[Connection], clients: Clients, started: tuple[float, float] | None) -> Iterator[str]:
    """Each call of who waits for its server to speak is one connection, which the log has as it was for its client."""
    well = [call for call in clients.calls if call.client in GREETERS and not call.error]
    recorded = sum(
        line.destination.service == f"port-{GREETER}:{GREETER}" and line.reason is not None and line.reason.code == "ok"
        for line in told
        if line.direction is Direction.OUTBOUND
    )
    # One that gave up has ended its connection in order, whatever it had not heard.
    gave_up = [call for call in clients.calls if call.client in GREETERS and call.error.startswith("TimeoutError")]
    fewest = sum(started is None or call.began >= started[1] for call in well)
    most = sum(started is None or call.ended >= started[0] for call in (*well, *gave_up))
    if not fewest <= recorded <= most:
        yield f"{fewest} to {most} calls of clients that hear first went well, and {recorded} are in the log"


def _growth(stage: Stage, host: Host, before: Usage) -> Iterator[str]:
    pid = stage.pid(host)
    try:
        wait_for(lambda: held(pid) <= before.held, timeout=_PATIENCE)
    except TimeoutError:
        yield f"{host.name}: {dict(held(pid) - before.held)} more than in the beginning"
    grown = pss([pid]) - before.memory
    if grown > _MOST_GROWTH:
        yield f"{host.name}: {grown} KiB more than in the beginning"
