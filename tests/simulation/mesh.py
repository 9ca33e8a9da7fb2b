"""A simulated mesh: sidecars whose applications call, hosts that fail, and a mesh that is changed, by one seed."""

import itertools
import random
import socket
import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any, cast

import pytest
import trio
import trio.testing

from meshnet.codec.mesh import read_mesh
from meshnet.model.address import Address
from meshnet.model.connection import Direction
from meshnet.model.snapshot import Snapshot
from meshnet.proxy import attempt, outbound
from meshnet.proxy import record as record_module
from meshnet.proxy.passed import Passed
from meshnet.proxy.record import Record
from meshnet.proxy.standing_order import Before
from meshnet.proxy.state import ProxyState
from meshnet.proxy.upkeep import Upkeep
from tests.proxy.test_state import a_state
from tests.simulation.network import CALLER, CONDITIONS, Network, Pool, Relay, Socket

HOSTS = [f"10.1.0.{number}" for number in range(1, 9)]
MOST = 12  # connections of a sidecar to one service
CALM = 900.0  # seconds without faults, after which everything has to work

_BALANCES = ("least_conn", "round_robin", "random", "maglev", "first")
_SERVICE = """
apiVersion: meshnet.dev/v1
kind: Service
metadata: {{name: {name}}}
spec: {{addresses: [10.96.0.{number}], ports: [{{port: 80}}], endpoints: [{endpoints}]}}
---
apiVersion: meshnet.dev/v1
kind: TrafficPolicy
metadata: {{name: {name}}}
spec:
  services: [{name}]
  balance: {balance}
  limits: {{maxConnections: {most}, maxPending: 6, queueTimeout: 2s}}
  timeouts: {{maxAge: {age}, maxAgeGrace: 30s, removed: 20s}}
  onEject: {on_eject}
"""


class Observer:
    """How often each record has ended, and why."""

    def __init__(self) -> None:
        self.ends: Counter[int] = Counter()
        self.reasons: Counter[str] = Counter()
        self.records: list[Record] = []

    def ended(self, record: Record) -> None:
        self.ends[id(record)] += 1
        self.reasons[str(record.reason)] += 1
        self.records.append(record)

    def passed(self, passed: Passed) -> None:
        raise AssertionError("nothing here goes by orders")


class Simulation:
    """`story` is what happened, for two runs of one seed to be compared."""

    def __init__(self, seed: int, hours: float) -> None:
        self.dice = random.Random(seed)
        self.seconds = hours * 3600
        self.network = Network(HOSTS, self.dice)
        self.states: list[ProxyState] = []
        self.observers: list[Observer] = []
        self.called = 0
        self.story: list[tuple[float, str]] = []
        self.endpoints = {"mesh": HOSTS[:5], "plain": HOSTS[5:]}
        self.version = 0

    async def run(self, stack: AsyncExitStack, sidecars: int = 2) -> None:
        for number in range(sidecars):
            state = await stack.enter_async_context(a_state(Snapshot(version=0)))
            observer, pool, relay = Observer(), Pool(self.network), Relay(self.network)
            state.registry._observer = observer
            state.dice = random.Random(self.dice.random())
            relay.lasts = lambda: self.dice.expovariate(1 / 40)
            state.relays.available[:] = [cast(Any, relay)]
            state.pool = cast(Any, pool)
            self.states.append(state)
            self.observers.append(observer)
            await state.apply(self.mesh())
            self.story.append((trio.current_time(), f"sidecar {number}"))
        async with trio.open_nursery() as background:
            for state in self.states:
                background.start_soon(Upkeep(state).run)
            async with trio.open_nursery() as calls:
                async with trio.open_nursery() as faults:
                    for state in self.states:
                        faults.start_soon(self._call, state, calls, self.seconds, 12.0)
                    faults.start_soon(self._break)
                    faults.start_soon(self._change)
                for host in self.network.hosts.values():
                    host.become("well")
                await trio.sleep(CALM)
                await self._all_works(calls)
            background.cancel_scope.cancel()

    def mesh(self) -> Snapshot:
        self.version += 1
        text = "---".join(
            _SERVICE.format(
                name=name,
                number=number,
                endpoints=", ".join(self._endpoint(name, host) for host in hosts),
                balance=self.dice.choice(_BALANCES),
                most=MOST,
                age=self.dice.choice(["0s", "60s"]),
                on_eject=self.dice.choice(["keep", "close"]),
            )
            for number, (name, hosts) in enumerate(self.endpoints.items(), 1)
        )
        return read_mesh([("mesh.yaml", text)], self.version)

    def _endpoint(self, name: str, host: str) -> str:
        meshed = ", tunnel: meshnet, identity: 'spiffe://local/ns/default/sa/x'" if name == "mesh" else ""
        return f"{{address: {host}, weight: {self.dice.randint(1, 3)}{meshed}}}"

    async def _call(self, state: ProxyState, calls: trio.Nursery, seconds: float, every: float) -> None:
        until = trio.current_time() + seconds
        while trio.current_time() < until:
            await trio.sleep(self.dice.expovariate(1 / every))
            for _ in range(self.dice.choice([1, 1, 1, 4, 30])):  # a burst now and then
                calls.start_soon(self._one, state, self.dice.choice(["10.96.0.1", "10.96.0.2"]))

    async def _one(self, state: ProxyState, service: str) -> None:
        CALLER.set(state)
        self.called += 1
        client = cast(socket.socket, Socket())
        source = Address("10.0.0.1", 1024 + self.called % 60000)
        record = state.registry.life(Direction.OUTBOUND, source, client)
        record.original = Address(service, 80)
        await outbound.carry_on(record, Before(), state)
        self.story.append((round(trio.current_time(), 6), f"{record.endpoint} {record.reason}"))

    async def _break(self) -> None:
        """One host after another becomes something else, stays so for a while, or dies with all that is open to it."""
        until = trio.current_time() + self.seconds
        while trio.current_time() < until:
            await trio.sleep(self.dice.expovariate(1 / 40))
            host = self.network.hosts[self.dice.choice(HOSTS)]
            host.become(self.dice.choice(["well"] * 6 + list(CONDITIONS)))
            if self.dice.random() < 0.3:
                host.die()

    async def _change(self) -> None:
        """Endpoints come and go, policies change; a service may lose all of them for a while."""
        until = trio.current_time() + self.seconds
        everybody = {"mesh": HOSTS[:5], "plain": HOSTS[5:]}
        while trio.current_time() < until:
            await trio.sleep(self.dice.expovariate(1 / 120))
            for name, hosts in everybody.items():
                self.endpoints[name] = self.dice.sample(hosts, self.dice.randint(0, len(hosts)))
            snapshot = self.mesh()
            for state in self.states:
                await state.apply(snapshot)
        self.endpoints = everybody
        snapshot = self.mesh()
        for state in self.states:
            await state.apply(snapshot)

    async def _all_works(self, calls: trio.Nursery) -> None:
        """A while after the last fault nobody is refused."""
        before = [Counter(observer.reasons) for observer in self.observers]
        for state in self.states:
            await self._call(state, calls, 120.0, 20.0)
        await trio.sleep(300)
        late = [observer.reasons - reasons for observer, reasons in zip(self.observers, before, strict=True)]
        told = {reason for reasons in late for reason in reasons}
        # A burst may be more than the limits let in, and old ones are ended by policy.
        if not told <= {"ok", "max_age", "limit.connections", "limit.queue_timeout"}:
            self.network.broken.append(f"after {CALM:g} s of calm: {late}")


def simulate(seed: int, hours: float, monkeypatch: pytest.MonkeyPatch) -> Simulation:
    """Runs it to its end in virtual time."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    simulation = Simulation(seed, hours)

    async def at_once(function: Any, *arguments: Any, **_: Any) -> Any:
        return function(*arguments)  # a thread would be in no virtual time

    async def everything() -> None:
        async with AsyncExitStack() as stack:
            await simulation.run(stack)

    with monkeypatch.context() as patch:
        patch.setattr(trio.to_thread, "run_sync", at_once)
        patch.setattr(attempt.sockets, "connect", simulation.network.connect)
        patch.setattr(time, "monotonic", clock.current_time)
        patch.setattr(time, "time", clock.current_time)  # ids are made of it, and ages differ by ids
        patch.setattr(record_module, "_sequence", itertools.count())
        # Trio shuffles which of the tasks that could run is first, and lets tests say how.
        patch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        trio._core._run._r.seed(seed)
        trio.run(everything, clock=clock)
    return simulation
