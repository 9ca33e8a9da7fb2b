"""The mesh grows: choosing among endpoints, taking up many services, a scrape of their metrics.

Nothing is sent: the parts that could stall the event loop run in one, with real files, while a probe that wants to run
every millisecond notes how late it was.
"""

import gc
import random
import sys
import tempfile
import threading
import timeit
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from time import thread_time
from typing import NamedTuple, TextIO

import trio

from meshnet.decide.balance import Balancer
from meshnet.model.address import Address
from meshnet.model.service import Balance, Endpoint, Traffic
from meshnet.model.settings import MeshSection, Settings
from meshnet.model.snapshot import Snapshot
from meshnet.net.addresses import LocalAddresses
from meshnet.proxy.identity import Identity
from meshnet.proxy.in_force import MeshInForce
from meshnet.proxy.metrics import Metrics
from meshnet.proxy.registry import Registry
from meshnet.proxy.state import ProxyState
from meshnet.relay.ladder import best_relay
from meshnet.tunnel.pool import Pool
from tests.bench.figures import Limit, Spread, verdict
from tests.bench.growth.table import table
from tests.bench.report import number
from tests.proxy.own_orders import order_all

ENDPOINTS = (1, 2, 5, 10, 100, 1000, 10_000)
MESHES = ((1, 1), (100, 2), (1000, 2), (5000, 2), (1, 1000), (1, 10_000))
"""Services, and the endpoints of each."""

LAG_TARGET = Limit(5.0, set=True)
"""Milliseconds, while all services of the mesh with most of them change."""

_PROBE_EVERY = 0.001  # seconds


def endpoints() -> str:
    """What choosing one of them costs."""
    return table(("endpoints", *(f"{kind}, us" for kind in Balance)), [_choosing(count) for count in ENDPOINTS])


def services(meshes: Sequence[tuple[int, int]] = MESHES) -> str:
    """How long a change of all of them takes, and what the loop notices; below it, of most services, the verdict."""
    head = ("services", "endpoints of each", "orders", "to take up, s", "lag, ms", "scrape, ms", "its lag, ms")
    grown = {mesh: trio.run(_growing, *mesh) for mesh in meshes}
    rows = [(*mesh, *(max(figures) for figures in zip(*changes, strict=True))) for mesh, changes in grown.items()]
    most, _ = largest = max(meshes)
    return f"{table(head, rows)}\n{lag_verdict(most, [change.lag for change in grown[largest]])}\n"


def lag_verdict(services: int, lags: Sequence[float]) -> str:
    """What LAG_TARGET says to the lag, in ms, of each change of so many services."""
    said = verdict(Spread.of(lags), LAG_TARGET, lower_is_better=True)
    told = ", ".join(map(number, lags))
    return f"Target: a lag of at most {LAG_TARGET.value:g} ms while {services:,} services change. {told} ms: {said}."


class _Alike:
    """Every endpoint has one connection and is as good as any."""

    warming = False

    def __call__(self, _: Endpoint) -> int:
        return 1

    def warmth(self, _: Endpoint) -> float:
        return 1.0

    def connect_time(self, _: Endpoint) -> None:
        return None


_ALIKE = _Alike()


def _choosing(count: int) -> tuple[object, ...]:
    """CPU time of one choice, nobody being out."""
    endpoints = tuple(Endpoint(address=_address(number)) for number in range(count))
    dice = random.Random(1)

    def cost(kind: Balance) -> float:
        balancer, traffic = Balancer(), Traffic(balance=kind)
        choices = timeit.Timer(
            lambda: balancer.pick(traffic, endpoints, _ALIKE, dice, source=lambda: "a"), timer=thread_time
        )
        return round(min(choices.repeat(repeat=5, number=10_000)) / 10_000 * 1e6, 2)

    return count, *map(cost, Balance)


class _Change(NamedTuple):
    """Of all services, and then a scrape."""

    orders: int  # in force before
    seconds: float
    lag: float  # the rest in ms
    scrape: float
    its_lag: float


async def _growing(services: int, endpoints: int) -> list[_Change]:
    """Three changes of the whole mesh, every endpoint of which is known, and as many orders in force as may be."""
    sys.setswitchinterval(0.0005)  # all three as a sidecar does
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    looked, looks = trio.open_memory_channel[None](1)
    reload, reloads = trio.open_memory_channel[None](1)
    changes: list[_Change] = []
    with tempfile.TemporaryDirectory(prefix="meshnet-growth-") as directory:
        async with _state(Path(directory)) as state, trio.open_nursery() as nursery, reload:
            in_force = MeshInForce(state, lambda: looked.send_nowait(None))
            nursery.start_soon(in_force.run, reloads)
            await looks.receive()
            for revision in range(4):
                orders = len(state.orders)
                _write(Path(directory), services, endpoints, revision)
                async with _probe() as lags:
                    started = trio.current_time()
                    await looks.receive()
                assert not state.config_problem, state.config_problem
                taken = trio.current_time() - started
                for service in state.snapshot.services:
                    for endpoint in service.endpoints:
                        state.endpoint(endpoint, service)
                order_all(state)
                async with _probe() as scrape_lags:
                    started = trio.current_time()
                    await state.metrics.scrape()
                scraped = trio.current_time() - started
                if revision:  # before the first there was nothing that could change
                    figures = (each * 1000 for each in (max(lags), scraped, max(scrape_lags)))
                    changes.append(_Change(orders, taken, *figures))
            nursery.cancel_scope.cancel()
    return changes


@asynccontextmanager
async def _state(directory: Path) -> AsyncIterator[ProxyState]:
    mesh = MeshSection(directory=str(directory), last_good=str(directory / "kept" / "last-good.json"))
    settings, metrics = Settings(mesh=mesh), Metrics()
    with ExitStack() as stack:
        async with best_relay(settings.proxy.relay, 1) as relays:
            metrics.state = ProxyState(
                settings,
                Snapshot(version=0),
                identity=Identity(settings.identity, relays.tls),
                metrics=metrics,
                registry=Registry(memory=1 << 20, observer=metrics, log=None),
                relays=relays,
                pool=Pool(lambda: None, relays.tls, mark=0, idle_timeout=1.0, max_idle=1),
                addresses=stack.enter_context(LocalAddresses()),
                mark=0,
            )
            yield metrics.state


@asynccontextmanager
async def _probe() -> AsyncIterator[list[float]]:
    """By how many seconds a task was late that wanted to run every millisecond, and not for want of a processor."""
    lags = [0.0]

    async def run() -> None:
        with open(f"/proc/self/task/{threading.get_native_id()}/schedstat", buffering=1) as schedstat:
            while True:
                due, queued = trio.current_time() + _PROBE_EVERY, _queued(schedstat)
                await trio.sleep_until(due)
                lags.append(trio.current_time() - due - (_queued(schedstat) - queued))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        yield lags
        nursery.cancel_scope.cancel()


def _queued(schedstat: TextIO) -> float:
    """Seconds for which this thread has waited for a processor (the kernel's sched-stats.rst)."""
    schedstat.seek(0)
    return int(schedstat.read().split()[1]) / 1e9


def _write(directory: Path, services: int, endpoints: int, revision: int) -> None:
    """At once, as a rename: half a file would be read too."""
    documents = [_service(f"service-{number}", number * endpoints, endpoints) for number in range(services)]
    documents.append(_service(f"revision-{revision}", services * endpoints, 1))
    draft = directory / ".draft"
    draft.write_text("---\n".join(documents))
    draft.rename(directory / "mesh.yaml")


def _service(name: str, first: int, endpoints: int) -> str:
    lines = [
        "apiVersion: meshnet.dev/v1",
        "kind: Service",
        f"metadata: {{name: {name}}}",
        "spec:",
        "  ports: [{port: 80}]",
        "  endpoints:",
    ]
    for endpoint in range(first, first + endpoints):
        lines.append(f"  - address: {_address(endpoint).host}")
        lines.append("    tunnel: meshnet")
        lines.append(f"    identity: spiffe://prod/ns/default/sa/{name}")
    return "\n".join(lines) + "\n"


def _address(number: int) -> Address:
    return Address(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 80)
