"""A simulated sidecar over its restarts. It follows real files; who calls while it is down waits, as at a listener."""

import random
import socket
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self, cast

import trio

from meshnet.errors import EndedBy
from meshnet.model.address import Address
from meshnet.model.connection import Direction
from meshnet.model.settings import MeshSection, Settings
from meshnet.model.snapshot import Snapshot
from meshnet.proxy import inbound, outbound
from meshnet.proxy import sidecar as real
from meshnet.proxy.in_force import MeshInForce
from meshnet.proxy.passed import Passed
from meshnet.proxy.record import Record
from meshnet.proxy.standing_order import Before
from meshnet.proxy.state import ProxyState
from meshnet.proxy.upkeep import Upkeep
from tests.proxy.test_state import a_state
from tests.simulation.network import CALLER, Network, Socket
from tests.simulation.relay import Relay
from tests.simulation.tunnels import CREDENTIALS, Channel, Pool

DRAIN = 5.0  # seconds
LOOKED = 1.0  # seconds after which a change of the files is in force, or refused


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


class Files:
    """The mesh files, which all sidecars follow."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "mesh.d"
        self.directory.mkdir()
        self.changes = 0
        self.changed = trio.Event()

    def write(self, text: str | None) -> None:
        """None: they are gone."""
        file = self.directory / "mesh.yaml"
        if text is None:
            file.unlink(missing_ok=True)
        else:
            file.write_text(text)
        self.changes += 1
        self.changed.set()
        self.changed = trio.Event()

    def watch(self, folders: Iterable[str]) -> "Watch":
        return Watch(self)


class Watch:
    """In the place of Inotify, whose descriptor would be in no virtual time."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._seen = files.changes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    async def changed(self) -> set[str]:
        while self._seen == self._files.changes:
            await self._files.changed.wait()
        self._seen = self._files.changes
        return {str(self._files.directory / "mesh.yaml")}


class Sidecar:
    """`states` has one for each start of it. It serves tunnels to applications of `host`, if that is said."""

    def __init__(self, name: str, files: Files, network: Network, dice: random.Random, host: str = "") -> None:
        self.observer = Observer()
        self.states: list[ProxyState] = []
        self.name = name
        self._host = host
        self._files = files
        self._network = network
        self._dice = dice
        self._ready = trio.Event()
        self._to_end = trio.Event()

    @property
    def state(self) -> ProxyState:
        return self.states[-1]

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self._live()

    async def restart(self) -> None:
        """In order, with a drain. What was in force before is so afterwards, also if the files are no good by then."""
        before, problem = self.state.snapshot, self.state.config_problem
        self._to_end.set()
        await trio.sleep(DRAIN + LOOKED)
        await self._ready.wait()
        if meaning(self.state.snapshot) != meaning(before):
            self._network.broken.append(f"{self.name} has lost its mesh by a restart; its files: {problem or 'good'}")

    async def is_up(self) -> None:
        await self._ready.wait()

    def serve(self, channel: Channel) -> None:
        """The other end of a tunnel."""
        self._serving.start_soon(self._serve, channel, self.state)

    async def _serve(self, channel: Channel, state: ProxyState) -> None:
        CALLER.set(state)
        await inbound.serve_tunnel(cast(Any, channel), Address("10.0.0.1", 1), state)

    async def call(self, service: str, source: Address) -> Record:
        await self._ready.wait()
        state = self.state
        CALLER.set(state)
        client = cast(socket.socket, Socket())
        record = state.registry.life(Direction.OUTBOUND, source, client)
        record.original = Address(service, 80)
        await outbound.carry_on(record, Before(), state)
        return record

    async def _live(self) -> None:
        self._to_end = trio.Event()
        kept = self._files.directory.with_name(self.name)
        mesh = MeshSection(directory=str(self._files.directory), last_good=str(kept))
        async with a_state(Snapshot(version=0), settings=Settings(mesh=mesh)) as state:
            pool, relay = Pool(self._network), Relay(self._network)
            state.registry._observer = self.observer
            state.dice = random.Random(self._dice.random())
            relay.lasts = lambda: self._dice.expovariate(1 / 40)
            state.relays.available[:] = [cast(Any, relay)]
            state.pool = cast(Any, pool)
            state.identity.credentials = CREDENTIALS
            if self._host:
                state.addresses = cast(Any, {self._host})
            self.states.append(state)
            looked = trio.Event()
            never, reloads = trio.open_memory_channel[None](0)
            async with never, trio.open_nursery() as nursery:
                nursery.start_soon(MeshInForce(state, looked.set).run, reloads)
                nursery.start_soon(Upkeep(state).run)
                self._serving = nursery
                await looked.wait()
                self._ready.set()
                await self._to_end.wait()
                await self._drain(state)
                nursery.cancel_scope.cancel()

    async def _drain(self, state: ProxyState) -> None:
        began, before = trio.current_time(), len(self.observer.records)
        draining = real.Sidecar(state, cast(Any, {}))
        draining.ask_drain(DRAIN)

        async def stop_taking() -> None:
            await draining._last_call.wait()
            self._ready = trio.Event()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop_taking)
            await draining._drain()
        for record in self.observer.records[before:]:
            if record.ended_by is EndedBy.DRAIN and record.ended is not None and record.ended < began + DRAIN:
                self._network.broken.append(f"{self.name} has reset {record.id} before its time to drain was over")
        if state.registry.open:
            self._network.broken.append(f"{self.name} ended with {len(state.registry.open)} connections open")


def meaning(snapshot: Snapshot) -> Any:
    """Without what counts on by one."""
    return snapshot.services, snapshot.policies, snapshot.default_action
