"""A simulated mesh: sidecars whose applications call, hosts that fail, and a mesh that is changed, by one seed."""

import itertools
import random
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio
import trio.testing

from meshnet.codec.mesh import read_mesh
from meshnet.model.address import Address
from meshnet.proxy import attempt, follow
from meshnet.proxy import record as record_module
from meshnet.proxy.state import ProxyState
from tests.simulation.network import CONDITIONS, Network
from tests.simulation.sidecar import LOOKED, Files, Observer, Sidecar, meaning
from tests.simulation.tunnels import IDENTITY

HOSTS = [f"10.1.0.{number}" for number in range(1, 9)]
MESHED = HOSTS[:5]  # those with a sidecar
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
_CLOSED = """---
apiVersion: meshnet.dev/v1
kind: AccessPolicy
metadata: {name: closed}
spec: {action: DENY, services: [mesh], rules: [{from: {principals: ["spiffe://local/*"]}}]}
"""
_NO_GOOD = ("kind: Nonsense\n", "spec: [\n", "kind: Service\nspec: {}\n", None)  # None: there are none


class Simulation:
    """`story` is what happened, for two runs of one seed to be compared."""

    def __init__(self, seed: int, hours: float, directory: Path, callers: int = 2) -> None:
        self.dice = random.Random(seed)
        self.seconds = hours * 3600
        self.network = Network(HOSTS, self.dice)
        self.files = Files(directory)
        self.callers = [Sidecar(f"caller-{n}", self.files, self.network, self.dice) for n in range(callers)]
        self.servers = [Sidecar(f"server-{host}", self.files, self.network, self.dice, host) for host in MESHED]
        self.sidecars = self.callers + self.servers
        for host, server in zip(MESHED, self.servers, strict=True):
            self.network.hosts[host].sidecar = server
        self.is_closed = False  # policy lets nobody call the service `mesh`
        self.called = 0
        self.refused = self.restarts = 0  # files that were no good, and sidecars
        self.story: list[tuple[float, str]] = []
        self.endpoints = {"mesh": MESHED, "plain": HOSTS[5:]}

    @property
    def states(self) -> list[ProxyState]:
        """Of every start of every sidecar."""
        return [state for sidecar in self.sidecars for state in sidecar.states]

    @property
    def observers(self) -> list[Observer]:
        """Of those who call."""
        return [caller.observer for caller in self.callers]

    async def run(self) -> None:
        self.files.write(self.mesh())
        async with trio.open_nursery() as background:
            for sidecar in self.sidecars:
                background.start_soon(sidecar.run)
            async with trio.open_nursery() as calls:
                async with trio.open_nursery() as faults:
                    for caller in self.callers:
                        faults.start_soon(self._call, caller, calls, self.seconds, 12.0)
                    faults.start_soon(self._break)
                    faults.start_soon(self._change)
                for host in self.network.hosts.values():
                    host.become("well")
                await trio.sleep(CALM)
                await self._all_works(calls)
            background.cancel_scope.cancel()

    def mesh(self) -> str:
        services = "---".join(
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
        return services + (_CLOSED if self.is_closed else "")

    def _endpoint(self, name: str, host: str) -> str:
        meshed = f", tunnel: meshnet, identity: '{IDENTITY}'" if name == "mesh" else ""
        return f"{{address: {host}, weight: {self.dice.randint(1, 3)}{meshed}}}"

    async def _call(self, sidecar: Sidecar, calls: trio.Nursery, seconds: float, every: float) -> None:
        until = trio.current_time() + seconds
        while trio.current_time() < until:
            await trio.sleep(self.dice.expovariate(1 / every))
            for _ in range(self.dice.choice([1, 1, 1, 4, 30])):  # a burst now and then
                calls.start_soon(self._one, sidecar, self.dice.choice(["10.96.0.1", "10.96.0.2"]))

    async def _one(self, sidecar: Sidecar, service: str) -> None:
        self.called += 1
        record = await sidecar.call(service, Address("10.0.0.1", 1024 + self.called % 60000))
        self.story.append((round(trio.current_time(), 6), f"{record.endpoint} {record.reason}"))

    async def _break(self) -> None:
        """One host after another becomes something else, stays so for a while, or dies with all that is open to it."""
        until = trio.current_time() + self.seconds
        while trio.current_time() < until:
            await trio.sleep(self.dice.expovariate(1 / 40))
            host = self.network.hosts[self.dice.choice(HOSTS)]
            host.become(self.dice.choice(["well"] * 6 + list(CONDITIONS)))
            match self.dice.randrange(10):
                case 0 | 1 | 2:
                    host.die()
                case 3:
                    host.cut()

    async def _change(self) -> None:
        """Endpoints come and go, policies change; a service may lose all of them for a while. Files are no good now and
        then, and stay so for a while; sidecars are restarted whatever the files are.
        """
        until = trio.current_time() + self.seconds
        everybody = {"mesh": MESHED, "plain": HOSTS[5:]}
        while trio.current_time() < until:
            await trio.sleep(self.dice.expovariate(1 / 100))
            is_good = self.dice.random() > 0.2
            if is_good:
                for name, hosts in everybody.items():
                    self.endpoints[name] = self.dice.sample(hosts, self.dice.randint(0, len(hosts)))
                self.is_closed = self.dice.random() < 0.15
                await self._put_in_force(self.mesh())
            else:
                await self._spoil_files()
            if self.dice.random() < (0.1 if is_good else 0.5):
                self.restarts += 1
                await self.dice.choice(self.sidecars).restart()
        self.endpoints, self.is_closed = everybody, False
        await self._put_in_force(self.mesh())

    async def _put_in_force(self, text: str) -> None:
        self.files.write(text)
        await trio.sleep(LOOKED)
        for sidecar in self.sidecars:
            if meaning(sidecar.state.snapshot) != meaning(read_mesh([("mesh.yaml", text)], 1)):
                self.network.broken.append(f"{sidecar.name} has another mesh than its files say")

    async def _spoil_files(self) -> None:
        """What is in force is not touched, so nothing that is open can be."""
        self.refused += 1
        before = [sidecar.state.snapshot for sidecar in self.sidecars]
        self.files.write(self.dice.choice(_NO_GOOD))
        await trio.sleep(LOOKED)
        for sidecar, snapshot in zip(self.sidecars, before, strict=True):
            if sidecar.state.snapshot is not snapshot or not sidecar.state.config_problem:
                self.network.broken.append(f"{sidecar.name} has taken files that are no good")

    async def _all_works(self, calls: trio.Nursery) -> None:
        """A while after the last fault nobody is refused."""
        before = [Counter(observer.reasons) for observer in self.observers]
        for caller in self.callers:
            await self._call(caller, calls, 120.0, 20.0)
        await trio.sleep(300)
        late = [observer.reasons - reasons for observer, reasons in zip(self.observers, before, strict=True)]
        told = {reason for reasons in late for reason in reasons}
        # A burst may be more than the limits let in, and old ones are ended by policy.
        if not told <= {"ok", "max_age", "limit.connections", "limit.queue_timeout"}:
            self.network.broken.append(f"after {CALM:g} s of calm: {late}")


def simulate(seed: int, hours: float, monkeypatch: pytest.MonkeyPatch) -> Simulation:
    """Runs it to its end in virtual time."""
    clock = trio.testing.MockClock(autojump_threshold=0)

    async def at_once(function: Any, *arguments: Any, **_: Any) -> Any:
        return function(*arguments)  # a thread would be in no virtual time

    with TemporaryDirectory(dir="/dev/shm") as directory, monkeypatch.context() as patch:  # where fsync costs nothing
        simulation = Simulation(seed, hours, Path(directory))
        patch.setattr(trio.to_thread, "run_sync", at_once)
        patch.setattr(attempt.sockets, "connect", simulation.network.connect)
        patch.setattr(follow, "Inotify", simulation.files.watch)
        patch.setattr(time, "monotonic", clock.current_time)
        patch.setattr(time, "time", clock.current_time)  # ids are made of it, and ages differ by ids
        patch.setattr(record_module, "_sequence", itertools.count())
        # Trio shuffles which of the tasks that could run is first, and lets tests say how.
        patch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        trio._core._run._r.seed(seed)
        trio.run(simulation.run, clock=clock)
    return simulation
