"""How a mesh comes into force: from the files, or from before a restart, with the addresses that its names have."""

import logging
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping

import trio
from msgspec import structs

from meshnet.decide.names import Hosts, NamedMesh, addresses_in
from meshnet.decide.share import share_of_mesh
from meshnet.errors import ConfigError
from meshnet.model.snapshot import Snapshot
from meshnet.proxy import last_good
from meshnet.proxy.follow import follow
from meshnet.proxy.state import ProxyState
from meshnet.proxy.status import count_services

_log = logging.getLogger("meshnet.proxy")


class MeshInForce:
    """`looked` is called when it is known what is meshed, or that nothing can be."""

    def __init__(self, state: ProxyState, looked: Callable[[], None]) -> None:
        self._state = state
        self._looked = looked
        self._mesh = NamedMesh(state.snapshot)
        self._addresses: dict[str, Hosts] = {}  # of its names, as they are in force
        self._turn = trio.Lock()

    async def run(self, reload: AsyncIterable[object]) -> None:
        """Follows the files and the names in them until it is cancelled."""
        state = self._state
        async with trio.open_nursery() as nursery:
            await nursery.start(state.names.run)
            nursery.start_soon(self._follow_names)
            directory = state.settings.mesh.directory
            reload = self._asking_again(reload)
            await follow(
                directory,
                state.snapshot.version,
                self._apply,
                self._refused,
                nothing_to_lose=self._knows_no_mesh,
                reload=reload,
            )

    def _knows_no_mesh(self) -> bool:
        """Whether there was none before the restart: files that are gone since then are no reason for plain text."""
        return last_good.load(self._state.settings.mesh.last_good, 0) in (None, Snapshot(version=0))

    async def _asking_again(self, reload: AsyncIterable[object]) -> AsyncIterator[object]:
        """Who asks to have the files read again means what their names stand for, too."""
        async for each in reload:
            self._state.names.ask_again()
            yield each

    async def _apply(self, written: Snapshot) -> None:
        mesh = await trio.to_thread.run_sync(NamedMesh, written)
        await self._put_in_force(mesh, await self._from_before(mesh))
        self._state.config_problem = ""
        snapshot = self._state.snapshot
        _log.info("mesh version %d: %d services", snapshot.version, count_services(snapshot))
        self._looked()

    async def _refused(self, problem: ConfigError) -> None:
        state = self._state
        if state.snapshot.version == 0:
            file = state.settings.mesh.last_good
            stored = await trio.to_thread.run_sync(last_good.load, file, 0)
            if stored is not None:
                mesh = await trio.to_thread.run_sync(NamedMesh, stored)
                await self._put_in_force(mesh, addresses_in(stored))
                _log.warning("going on with the mesh that was good before the restart, from %s", file)
        state.config_problem = str(problem)
        state.metrics.config_refused += 1
        _log.error("mesh files refused, the last good state stays: %s", problem)
        self._looked()

    async def _follow_names(self) -> None:
        names = self._state.names
        while True:
            await names.changed.wait()
            names.changed = trio.Event()
            async with self._turn:
                if self._addresses != names.addresses():
                    await self._refresh()

    async def _from_before(self, mesh: NamedMesh) -> Mapping[str, Hosts]:
        """The addresses of names that were in force before a restart, for the first mesh after it."""
        if not mesh.names or self._state.snapshot.version:
            return {}
        stored = await trio.to_thread.run_sync(last_good.load, self._state.settings.mesh.last_good, 0)
        return addresses_in(stored) if stored is not None else {}

    async def _put_in_force(self, mesh: NamedMesh, before: Mapping[str, Hosts]) -> None:
        async with self._turn:
            await self._state.names.follow(mesh.names, before)
            self._mesh = mesh
            await self._refresh()

    async def _refresh(self) -> None:
        """Puts in force what the mesh is now; nothing that is open notices, but for what access now denies."""
        state, settings = self._state, self._state.settings
        self._addresses = state.names.addresses()
        snapshot = await trio.to_thread.run_sync(self._mesh.with_addresses, self._addresses)
        snapshot = structs.replace(snapshot, version=state.snapshot.version + 1)
        try:
            # First, so that whatever has been in force is so after a restart too.
            await trio.to_thread.run_sync(last_good.save, snapshot, settings.mesh.last_good)
        except OSError as error:
            _log.warning("the mesh could not be kept for a restart: %s", error)
        if settings.proxy.workers > 1:
            snapshot = await trio.to_thread.run_sync(share_of_mesh, snapshot, settings.proxy.workers)
        await state.apply(snapshot)
