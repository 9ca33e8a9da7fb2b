"""How many open connections there is room for, and why not for more. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

MOST_WORKERS = 8  # with more, what is measured is the workers
BUSY = 64  # connections that are opened beside the idle ones, to measure: no more than this at a time

_OTHER_FILES = 200  # of a sidecar's process, beside those of connections
_UNEVEN = 1.25  # what the fullest worker may have by what they have on average
_KIB = 128  # a connection at most: both sidecars, client and server, and the kernel's part of each


@dataclass(frozen=True, slots=True)
class Room:
    """What connections take of what a machine may run out of.

    `files` is how many descriptors a process may have, `memory` how many KiB are free, `workers` the processes of each
    sidecar, which share its connections.
    """

    files: int
    memory: int
    workers: int = 1

    @property
    def by_files(self) -> int:
        """How many connections the descriptors are enough for: two for each in a sidecar."""
        shares = 1.0 if self.workers == 1 else self.workers / _UNEVEN
        return max(0, int((self.files - _OTHER_FILES) * shares / 2) - BUSY)

    @property
    def by_memory(self) -> int:
        """How many connections half of the free memory is enough for: the rest is for others."""
        return self.memory // 2 // _KIB

    @property
    def processes(self) -> str:
        return "one process" if self.workers == 1 else f"{self.workers} workers"

    def reachable(self, levels: Sequence[int]) -> list[int]:
        """Those that there is room for, and the most there is room for when that is less than the last of `levels`."""
        most = min(self.by_files, self.by_memory)
        fitting = [level for level in levels if level <= most]
        return fitting if len(fitting) == len(levels) else [*fitting, *[most] * (most > max(fitting, default=0))]

    def missed(self, levels: Sequence[int]) -> str:
        """Which of `levels` there is no room for, and why, as a sentence; empty when there is for all."""
        missed = [level for level in levels if level > min(self.by_files, self.by_memory)]
        if not missed:
            return ""
        which = ", ".join(f"{level:,}" for level in missed)
        if self.by_memory < self.by_files:
            return f"Not reached: {which}, for {self.memory // 1024:,} MiB are free, and half of them are ours."
        return (
            f"Not reached: {which}, for a process may have {self.files:,} descriptors here (`ulimit -Hn`), "
            f"and a sidecar of {self.processes} needs two for each connection."
        )


def rooms(most: int, files: int, memory: int) -> list[Room]:
    """A sidecar of one process; and when its descriptors are not enough for `most`, also one of so many that they are.

    Of no more than MOST_WORKERS, enough or not.
    """
    found = [Room(files, memory)]
    while found[-1].by_files < most and found[-1].workers < MOST_WORKERS:
        found = [found[0], Room(files, memory, found[-1].workers + 1)]
    return found
