"""A crowd of clients at once: idle ones, slow ones and stuck ones, and one that means well in the midst of them.

MESHNET_CROWD=1 has all 20,000 idle, 5,000 slow and 1,000 stuck; without it there is a part of each. What was measured,
and how many there were, is in the summary of the run.
"""

import math
import os
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from meshnet.model.connection import Connection
from tests.bench.load import Result, build, pss
from tests.faults.books import Books
from tests.faults.causes import SECRET
from tests.faults.test_storms import small_buffers
from tests.proxy.programs import echo, read, read_all
from tests.traffic.conftest import Name, traffic
from tests.world import Host, Mesh, Process, Sidecar, World, into_the_mesh, still_alive, wait_for

pytestmark = [pytest.mark.netns, pytest.mark.timeout(2400)]

FULL = {"hold": 20_000, "slow": 5_000, "stuck": 1_000}  # by the generator's names for them
PART = float(os.environ.get("MESHNET_CROWD", "0.15"))
MOST = {"hold": 32, "slow": 96, "stuck": 96}  # KiB of a sidecar's memory for each, whatever it is that it does not read
KERNELS = 160_000  # pages that the kernel has for TCP when all of them are there: 151,041 were seen
DESCRIPTORS = 2  # of a sidecar for each connection
SPARE = 500  # for what a process holds beside
UNEVEN = 1.5
PATIENCE = 900.0  # seconds for a crowd to come, or to go, and for who means well


def shares(count: int, allowed: int) -> list[int]:
    """Of so many descriptors, for processes that may have `allowed` each and do not divide them evenly."""
    processes = 1 if count <= allowed - SPARE else math.ceil(UNEVEN * count / (allowed - SPARE))
    return [count // processes + (number < count % processes) for number in range(processes)]


def test_a_crowd_is_never_made_smaller_but_shared_by_more_processes() -> None:
    assert shares(9_000, 20_000) == [9_000]
    assert shares(52_001, 20_000) == [10_401, 10_400, 10_400, 10_400, 10_400]


def test_a_crowd_of_idle_slow_and_stuck_clients_costs_little_memory_each_and_who_means_well_nothing(
    world: World, mesh: Mesh, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    # With fewer the kernel resets connections, of whomever: seen with 110,000, and none of it was the sidecars'.
    # Its own share is 3/32 of memory (tcp_init_mem); from within a namespace tcp_mem cannot be read.
    may_have = os.sysconf("SC_PHYS_PAGES") * 3 // 32
    assert may_have > KERNELS * PART, f"MESHNET_CROWD={may_have / KERNELS:.2f} at most: see net.ipv4.tcp_mem"
    web, api = world.host("web"), world.host("api")
    load = build(world.directory)
    names = {
        kind: Name(kind, f"10.96.1.{number}", f"fd96::1:{number}", 7000 + number)
        for number, kind in enumerate([*FULL, "quick"])
    }
    quick = names["quick"]
    patience = {"attemptTimeout": "60s", "totalTimeout": "60s"}
    mesh.write(
        *(mesh.service(name.name, [name.port], [api], addresses=[name.address]) for name in names.values()),
        *(traffic(names[kind], limits={"maxConnections": 0}, connect=patience) for kind in FULL),
    )
    crowd = {kind: round(count * PART) for kind, count in FULL.items()}
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    workers = len(shares(DESCRIPTORS * sum(crowd.values()), allowed))
    into_the_mesh(mesh, (web, api), proxy={"workers": workers})
    for kind, count in crowd.items():
        for number, _ in enumerate(shares(count, allowed)):
            api.spawn(load, "serve", str(names[kind].port), name=f"serve-{kind}-{number}")
        wait_for(lambda kind=kind: api.listens(names[kind].port))
    sidecars = [mesh.sidecars[host.name] for host in (web, api)]
    books = [Books(sidecar) for sidecar in sidecars]
    told, waits = [], []

    def well() -> None:
        began = time.monotonic()
        assert ask(web, quick) == SECRET
        lasting.sendall(SECRET)
        assert read(lasting, len(SECRET)) == SECRET
        waits.append(time.monotonic() - began)

    with (
        small_buffers(web, api),
        echo(api, quick.port),
        web.connect(quick.address, quick.port, timeout=PATIENCE) as lasting,
    ):
        well()
        holders = []
        for kind, count in crowd.items():
            before, began = memory(sidecars), time.monotonic()
            holders += gathered(web, load, names[kind], shares(count, allowed), well)
            took = time.monotonic() - began
            grown = [(now - was) / count for now, was in zip(settled(sidecars), before, strict=True)]
            told.append(f"{count} {kind} in {took:.0f} s: {grown[0]:.1f} and {grown[1]:.1f} KiB each")
            assert max(grown) < MOST[kind], told
        here = [sidecar.status().open_connections for sidecar in sidecars]
        assert min(here) > sum(crowd.values()), (here, *map(ends_of, books))
        whole = [kib >> 10 for kib in memory(sidecars)]
        for holder in holders:
            well()
            has_ended_well(holder)
        well()
    told.append(f"sidecars of {whole[0]} and {whole[1]} MiB; the longest wait of who meant well was {max(waits):.2f} s")
    told.append(f"{workers} workers, with {allowed} descriptors each")
    record_property("measured", "; ".join(told))
    for each in books:
        each.balance()
        assert ends_of(each) == {(names[kind].port, "ok"): count for kind, count in crowd.items()} | {
            (quick.port, "ok"): len(waits) + 1,
        }
    still_alive(mesh, request)


def ask(web: Host, name: Name) -> bytes:
    """As anybody does, and with patience."""
    with web.connect(name.address, name.port, timeout=PATIENCE) as client:
        client.sendall(SECRET)
        client.shutdown(socket.SHUT_WR)
        return read_all(client)


@dataclass(frozen=True)
class Holder:
    process: Process
    kind: str
    count: int


def gathered(
    web: Host, load: Path, name: Name, counts: Sequence[int], meanwhile: Callable[[], None]
) -> Sequence[Holder]:
    """So many clients of one kind, in as many programs, and each client has been served once."""
    there = (name.address, str(name.port))
    holders = [
        Holder(web.spawn(load, name.name, *there, str(count), "0", "0", name=f"{name.name}-{number}"), name.name, count)
        for number, count in enumerate(counts)
    ]

    def all_here() -> bool:
        meanwhile()
        return all("held" in each.process.output or not each.process.alive for each in holders)

    wait_for(all_here, timeout=PATIENCE, what=f"{sum(counts)} {name.name}")
    assert [each.process.output for each in holders if not each.process.alive] == []
    return holders


def has_ended_well(holder: Holder) -> None:
    """Each client reads what there is to read, to the end, and no connection was lost meanwhile."""
    holder.process.popen.terminate()
    assert holder.process.popen.wait(PATIENCE) == 0, holder.process.output
    result = msgspec.json.decode(holder.process.output.splitlines()[-1], type=Result)
    assert (result.units, result.opened, result.errors) == (holder.count, holder.count, 0), result
    assert (result.bytes > 0) == (holder.kind == "slow")


def memory(sidecars: Sequence[Sidecar]) -> list[int]:
    """KiB of each, with all its workers."""
    found = [sidecar.status() for sidecar in sidecars]
    return [pss([status.pid, *(worker.pid for worker in status.workers)]) for status in found]


def settled(sidecars: Sequence[Sidecar]) -> list[int]:
    """The memory of each, once it has grown by no more than a hundredth for a second."""
    most, since = memory(sidecars), time.monotonic()

    def still() -> bool:
        nonlocal most, since
        now = memory(sidecars)
        if any(each > 1.01 * was for each, was in zip(now, most, strict=True)):
            most, since = now, time.monotonic()
        return time.monotonic() - since > 1.0

    wait_for(still, timeout=PATIENCE, what="that no memory grows")
    return memory(sidecars)


def ends_of(books: Books) -> Counter[tuple[int, str]]:
    """By the service's port, and why."""
    return Counter((port_of(line), str(line.reason.code)) for line in books.told() if line.reason is not None)


def port_of(line: Connection) -> int:
    return int(line.original_destination.rpartition(":")[2])
