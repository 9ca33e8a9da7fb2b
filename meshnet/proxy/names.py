"""The addresses of the names by which endpoints are given, kept up to date: each name is asked for as its TTL says."""

import logging
import random
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING

import trio

from meshnet.decide.names import Hosts, KnownName, Lookup
from meshnet.model.settings import MeshSection

if TYPE_CHECKING:
    from meshnet.net.resolver import Resolver

_log = logging.getLogger("meshnet.names")

_AT_ONCE = 32  # questions under way
_FIRST_ANSWERS = 2.0  # seconds that a mesh with new names waits for their addresses before it is put in force


class Names:
    """Every process of a sidecar has its own and asks by itself; the answers are the same but for the moment."""

    def __init__(self, settings: MeshSection, mark: int) -> None:
        self._settings = settings
        self._mark = mark
        self._resolver: Resolver | None = None
        self._dice = random.Random()
        self._turns = trio.Semaphore(_AT_ONCE)
        self._known: dict[str, KnownName] = {}
        self._asked: dict[str, trio.Event] = {}
        self._followed: dict[str, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None
        self._again = trio.Event()
        self.changed = trio.Event()
        """Set when a name has other addresses; whoever has seen that puts another in its place."""
        self.answered = self.failed = 0

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until it is cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    async def follow(self, names: Set[str], before: Mapping[str, Hosts]) -> None:
        """From now on these and no others. When it returns, new ones have been asked for, or that takes too long.

        `before`: what was known of some before a restart.
        """
        for name in self._followed.keys() - names:
            self._followed.pop(name).cancel()
            del self._known[name], self._asked[name]
        for name in names - self._followed.keys():
            self._known[name] = KnownName(before.get(name, ()))
            self._asked[name] = trio.Event()
            self._followed[name] = trio.CancelScope()
            assert self._nursery is not None
            self._nursery.start_soon(self._keep, name, self._known[name], self._asked[name], self._followed[name])
        with trio.move_on_after(_FIRST_ANSWERS):
            for asked in list(self._asked.values()):
                await asked.wait()

    def ask_again(self) -> None:
        """All of them at once, whatever their TTLs say."""
        self._again.set()
        self._again = trio.Event()

    def addresses(self) -> dict[str, Hosts]:
        return {name: known.hosts for name, known in self._known.items() if known.hosts}

    def problem(self, name: str) -> str:
        """Why it could not be asked for the last time; empty if it could, and for no name."""
        known = self._known.get(name)
        return known.problem if known else ""

    def failing(self) -> int:
        """How many could not be asked for the last time; any thread may ask."""
        return sum(bool(known.problem) for known in list(self._known.values()))

    async def _keep(self, name: str, known: KnownName, asked: trio.Event, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                async with self._turns:
                    lookup = await self._look_up(name)
                pause = self._learn(name, known, lookup)
                asked.set()
                with trio.move_on_after(pause):
                    await self._again.wait()

    async def _look_up(self, name: str) -> Lookup:
        try:
            if self._resolver is None:
                self._resolver = await trio.to_thread.run_sync(_resolver, self._settings, self._mark)
            return await self._resolver.look_up(name)
        except Exception as error:
            _log.exception("asking for %s failed inside the proxy", name)
            return Lookup(problem=f"{type(error).__name__}: {error}")

    def _learn(self, name: str, known: KnownName, lookup: Lookup) -> float:
        hosts, problem = known.hosts, known.problem
        pause = known.learned(lookup, self._dice)
        found = ", ".join(lookup.hosts) or lookup.problem
        _log.debug("asked for %s: %s, for %g s; again in %.1f s", name, found, lookup.ttl, pause)
        self.answered += not lookup.problem
        self.failed += bool(lookup.problem)
        if known.hosts != hosts:
            self.changed.set()
            _log.info("%s is %s%s", name, ", ".join(known.hosts), f"; it was {', '.join(hosts)}" if hosts else "")
        if known.problem and not problem:
            stay = f"it stays {', '.join(known.hosts)}" if known.hosts else "no address of it is known"
            _log.warning("%s cannot be resolved: %s; %s", name, known.problem, stay)
        elif problem and not known.problem:
            _log.info("%s can be resolved again", name)
        return pause


def _resolver(settings: MeshSection, mark: int) -> "Resolver":
    # What it needs takes 4 MB and a sixth of a second: only where there are names, and not in trio's thread.
    from meshnet.net.resolver import Resolver

    return Resolver(settings.resolv_conf, settings.hosts_file, mark)
