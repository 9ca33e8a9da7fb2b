"""What a host runs out of: descriptors, ports, places to track connections, memory, disk.

How many connections may be tracked (nf_conntrack_max) is the machine's, and only its first network namespace may change
it. But each is held to it by its own count: a table is full because it is filled (tests/faults/tracked.py). A namespace
has no memory of its own: what runs short is the address space of one sidecar (RLIMIT_AS).
"""

import random
from collections.abc import Iterator

from meshnet_cli.demo.world import Host, wait_for
from tests.faults.causes import answers, descriptors, full, is_over, memory, ports
from tests.faults.tracked import full_table
from tests.soak.kind import EVERYBODY, Kind, last
from tests.soak.sidecars import Sidecars
from tests.soak.stage import Stage

_FEW = 50000, 50000  # ports, first and last: one for each peer
_MORE_MEMORY = 1 << 18  # bytes, beyond what the sidecar has


class Shortages:
    def __init__(self, stage: Stage, dice: random.Random, sidecars: Sidecars) -> None:
        self._stage = stage
        self._dice = dice
        self._sidecars = sidecars

    def kinds(self) -> Iterator[Kind]:
        yield Kind("no descriptor left for a moment", self._lack_descriptors, EVERYBODY)
        yield Kind("hardly a port left for a moment", self._lack_ports, EVERYBODY)
        yield Kind("table of tracked connections full", self._fill_table, EVERYBODY)
        yield Kind("no memory left for a moment", self._lack_memory, EVERYBODY)
        yield Kind("disk full while the mesh changes", self._fill_disk)

    def _lack_descriptors(self, host: Host) -> None:
        with descriptors(self._stage.sidecar(host), 0):
            last(self._dice.uniform(0.2, 1.0))

    def _lack_ports(self, host: Host) -> None:
        """For the sidecar's legs; where clients are, for theirs as well."""
        with ports(host, *_FEW):
            last(self._dice.uniform(0.2, 1.0))

    def _fill_table(self, host: Host) -> None:
        """What is open goes on; the packet that would open another connection is dropped."""
        with full_table(host) as table:
            last(self._dice.uniform(0.2, 0.5))
            table.fill()  # some have ended meanwhile
            last(self._dice.uniform(0.2, 0.5))

    def _lack_memory(self, host: Host) -> None:
        """It refuses what it cannot serve, or it ends, and what looks after it starts another."""
        sidecar = self._stage.sidecar(host)
        with memory(sidecar, _MORE_MEMORY):
            last(self._dice.uniform(0.2, 1.0))
        wait_for(lambda: is_over(sidecar) or answers(sidecar), timeout=30.0, what="it ends, or it is there")
        if is_over(sidecar):
            self._sidecars.start(host)

    def _fill_disk(self, host: Host) -> None:
        """The mesh is in force all the same."""
        with full(self._stage.disk):
            self._stage.write()
            self._stage.wait_until_in_force()
            last(self._dice.uniform(0.1, 1.0))
        self._stage.write()
        self._stage.wait_until_in_force()
