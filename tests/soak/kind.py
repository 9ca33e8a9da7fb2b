"""A kind of fault, and who calls while it is there."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from meshnet_cli.demo.world import Host

GREETERS = frozenset(f"server first {number}" for number in range(1, 5))
"""They are served by `api` and by `twin`; whoever else calls is served by `api` alone."""
LONG_TALK, CACHE_CLIENT = "long talk", "redis"
EVERYBODY = GREETERS | {LONG_TALK, CACHE_CLIENT, "curl", "postgres", "iperf3", "ssh", "websocket"}
NOBODY: frozenset[str] = frozenset()

HOSTS = ("web", "api", "twin")
SERVERS = HOSTS[1:]


@dataclass(frozen=True, slots=True)
class Kind:
    """`do` returns when it is over. It raises when somebody is hurt by it who may not be."""

    what: str
    do: Callable[[Host], None]
    noticed_by: frozenset[str] = NOBODY
    """The clients that may fail by it."""
    where: tuple[str, ...] = HOSTS
    uncovers: bool = False
    """Whether what is open leaves as its client sends it: without rules the kernel no longer turns it."""

    def excuses(self, host: Host) -> frozenset[str]:
        """Of those that may notice, who has to do with this host."""
        return self.noticed_by & GREETERS if host.name == "twin" else self.noticed_by


def last(seconds: float) -> None:
    """A fault is there for so long."""
    threading.Event().wait(seconds)
