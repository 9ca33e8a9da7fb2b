"""A change of the mesh, in a state of its own: what is in force when, what is seen at once and what is forgotten."""

import gc
import random
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise

import pytest
import trio
import trio.testing
from trio.abc import Instrument

from meshnet.codec.mesh import read_mesh
from meshnet.decide.access import Call
from meshnet.errors import EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Direction
from meshnet.model.service import BreakerSettings, Endpoint, Outlier
from meshnet.model.settings import Settings
from meshnet.model.snapshot import Snapshot
from meshnet.net.addresses import LocalAddresses
from meshnet.proxy.identity import Identity
from meshnet.proxy.metrics import Metrics
from meshnet.proxy.record import Record
from meshnet.proxy.registry import Registry
from meshnet.proxy.state import EndpointState, ProxyState
from meshnet.relay.ladder import best_relay
from meshnet.tunnel.pool import Pool

MESH = """\
apiVersion: meshnet.dev/v1
kind: MeshConfig
metadata: {name: mesh}
spec: {defaultAction: %(action)s}
---
apiVersion: meshnet.dev/v1
kind: Service
metadata: {name: %(name)s}
spec: {ports: [{port: 80}], endpoints: [{address: 10.1.0.1}]}
---
apiVersion: meshnet.dev/v1
kind: TrafficPolicy
metadata: {name: limits}
spec: {services: [%(name)s], limits: {maxConnections: %(most)d}, breaker: {failures: %(most)d}}
"""

SERVICE = """\
apiVersion: meshnet.dev/v1
kind: Service
metadata: {name: %(name)s}
spec: {ports: [{port: 80}], endpoints: [{address: 10.1.0.%(last)d}, {address: 10.2.0.%(last)d}]}
"""


def mesh(version: int, name: str = "api", action: str = "ALLOW", most: int = 1) -> Snapshot:
    return read_mesh([("mesh.yaml", MESH % {"name": name, "action": action, "most": most})], version)


@asynccontextmanager
async def a_state(
    snapshot: Snapshot, relay: str = "python", settings: Settings | None = None
) -> AsyncIterator[ProxyState]:
    settings, metrics = settings or Settings(), Metrics()
    async with best_relay(relay, 1) as relays:
        with LocalAddresses() as addresses:
            metrics.state = ProxyState(
                settings,
                snapshot,
                identity=Identity(settings.identity, relays.tls),
                metrics=metrics,
                registry=Registry(memory=1 << 20, observer=metrics, log=None),
                relays=relays,
                pool=Pool(lambda: None, relays.tls, mark=0, idle_timeout=1.0, max_idle=1),
                addresses=addresses,
                mark=0,
            )
            yield metrics.state


def called(state: ProxyState, number: int) -> Record:
    """A connection that access has let in."""
    record = state.registry.life(Direction.INBOUND, Address("10.9.0.1", 1 + number), None)
    record.__enter__()
    record.call = Call(identity="", address="10.9.0.1", port=80)
    return record


async def test_everything_of_a_snapshot_comes_into_force_in_one_step() -> None:
    old, new = mesh(1), mesh(2, action="DENY", most=2)
    async with a_state(old) as state:
        (service,) = old.services
        held = state.service(service)
        seen = set()
        done = False

        async def look() -> None:
            while not done:
                denies = state.access.decide(CALL).by == "default-deny"
                seen.add((state.snapshot.version, held.limiter.settings.max_connections, denies))
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await trio.lowlevel.checkpoint()
            await state.apply(new)
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            done = True
    assert seen == {(1, 1, False), (2, 2, True)}


CALL = Call(identity="", address="10.9.0.1", port=80)


async def test_thousands_of_connections_are_reviewed_while_other_tasks_have_their_turns() -> None:
    async with a_state(mesh(1)) as state:
        records = [called(state, number) for number in range(3000)]
        turns = 0
        most = 0

        async def others() -> None:
            nonlocal turns, most
            before = 0
            while True:
                aborted = sum(record.abort_reason is not None for record in records)
                turns, most, before = turns + 1, max(most, aborted - before), aborted
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(others)
            await trio.lowlevel.checkpoint()
            await state.apply(mesh(2, action="DENY"))
            nursery.cancel_scope.cancel()
    assert {record.abort_reason for record in records} == {Reason.AUTHZ_REVOKED}
    assert most <= 512  # two slices at most between two turns


async def test_a_great_mesh_that_is_gone_is_let_go_while_other_tasks_have_their_turns() -> None:
    services = [SERVICE % {"name": f"api-{number}", "last": number % 256} for number in range(1000)]
    seen: list[int] = []  # of memory's blocks; a thread frees some of them between two steps, and the loop has to wait

    class Steps(Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            seen.append(sys.getallocatedblocks())

        def after_task_step(self, task: trio.lowlevel.Task) -> None:
            seen.append(sys.getallocatedblocks())

    async with a_state(mesh(1)) as state:
        await state.apply(read_mesh([("mesh.yaml", "---\n".join(services))], 2))
        gc.collect()  # what reading has left is not to be counted
        trio.lowlevel.add_instrument(steps := Steps())
        await state.apply(mesh(3))
        trio.lowlevel.remove_instrument(steps)
    freed = [before - after for before, after in pairwise(seen)]
    assert sum(freed) > 5_000
    assert max(freed) < sum(freed) / 4


async def test_who_waits_for_a_limit_goes_on_when_it_is_raised() -> None:
    async with a_state(mesh(1)) as state:
        (service,) = state.snapshot.services
        held = state.service(service)
        await state.enter(held)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(state.enter, held))
            await trio.testing.wait_all_tasks_blocked()
            assert held.limiter.pending == 1
            await state.apply(mesh(2, most=2))
        assert (held.limiter.open, held.limiter.pending) == (2, 0)


async def test_a_dial_goes_by_the_breaker_settings_of_its_own_service() -> None:
    old, new = mesh(1), mesh(2, most=7)
    async with a_state(old) as state:
        (service,), (changed,) = old.services, new.services
        known = state.endpoint(service.endpoints[0], service)
        await state.apply(new)
        assert state.endpoint(changed.endpoints[0], changed) is known
        assert known.breaker.settings.failures == 7


async def test_what_is_gone_is_forgotten_unless_a_connection_has_to_do_with_it() -> None:
    async with a_state(mesh(1)) as state:
        (service,) = state.snapshot.services
        known = state.endpoint(service.endpoints[0], service)
        held = state.service(service)
        balancer = state.balancer(service)
        await state.enter(held)
        known.open = 1
        gone = Snapshot(version=2)
        await state.apply(gone)
        assert state.endpoint(service.endpoints[0], service) is known
        assert state.service(service) is held
        known.open = 0
        state.leave(held)
        await state.apply(gone)
        assert (state.endpoints, state.services) == ({}, {})
        assert state.balancer(service) is not balancer


def open_breaker(known: EndpointState) -> None:
    """For a minute, and a minute later it is forgotten."""
    known.breaker.settings = BreakerSettings(failures=1, open_time=60.0, reset_after=60.0, jitter=0.0)
    assert known.breaker.admit(time.monotonic())
    known.breaker.failed(time.monotonic(), random.Random(1))


def fail_once(known: EndpointState) -> None:
    """Which opens nothing yet."""
    known.breaker.settings = BreakerSettings(failures=5, reset_after=60.0)
    assert known.breaker.admit(time.monotonic())
    known.breaker.failed(time.monotonic(), random.Random(1))


def fail_within_a_window(known: EndpointState) -> None:
    known.outcomes.note(False, 40.0, time.monotonic())


def eject(known: EndpointState) -> None:
    """For 45 s, and for another 90 the next one would be for as long."""
    known.outcomes.eject(Outlier(ejection_time=45.0, jitter=0.0), time.monotonic(), random.Random(1))


@pytest.mark.parametrize(
    ("spoil", "lasts"), [(open_breaker, 120.0), (fail_once, 60.0), (fail_within_a_window, 40.0), (eject, 135.0)]
)
async def test_an_endpoint_that_was_away_comes_back_to_what_it_did_as_long_as_that_counts(
    spoil: Callable[[EndpointState], None], lasts: float
) -> None:
    here, away = mesh(1), Snapshot(version=2)
    async with a_state(here) as state:
        (service,) = here.services
        (endpoint,) = service.endpoints
        known = state.endpoint(endpoint, service)
        spoil(known)
        now = time.monotonic()
        await state.apply(away)
        await state.apply(here)
        assert state.endpoint(endpoint, service) is known
        await state.apply(away)
        await state.forget_gone(now + lasts - 20)
        assert state.endpoints == {endpoint.address: known}
        await state.forget_gone(now + lasts + 1)
        assert (state.endpoints, state.gone) == ({}, set())


async def test_the_slow_start_of_one_that_comes_back_begins_when_its_ejection_is_over() -> None:
    both = read_mesh([("mesh.yaml", SERVICE % {"name": "api", "last": 1})], 3)
    (service,) = both.services
    _, second = service.endpoints
    async with a_state(both) as state:
        known = state.endpoint(second, service)
        eject(known)
        await state.apply(mesh(2))  # which has the first alone
        await state.apply(both)
        assert state.warming == {second.address: known.outcomes.ejected_until}


async def test_of_thousands_that_are_gone_few_are_kept() -> None:
    async with a_state(mesh(1)) as state:
        (service,) = state.snapshot.services
        for number in range(3000):
            address = Address(f"10.{number >> 8}.{number & 255}.9", 80)
            open_breaker(state.endpoint(Endpoint(address=address), service))
        await state.apply(Snapshot(version=2))
        assert len(state.endpoints) == 1024


async def test_a_scrape_counts_each_connection_once_though_it_ends_meanwhile() -> None:
    async with a_state(mesh(1)) as state:
        records = [called(state, number) for number in range(1000)]
        for record in records:
            record.connected = record.opened

        async def end() -> None:
            for record in records:
                record.end(Reason.OK, EndedBy.CLIENT, "")
                record.__exit__(None, None, None)
                if len(state.registry.open) % 100 == 0:
                    await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(end)
            counted = [opened(await state.metrics.scrape()) for _ in range(5)]
        counted.append(opened(await state.metrics.scrape()))
    assert counted == [1000] * 6


def opened(text: bytes) -> int:
    lines = text.decode().splitlines()
    return int(
        sum(float(line.split()[-1]) for line in lines if line.startswith("meshnet_tcp_connections_opened_total"))
    )
