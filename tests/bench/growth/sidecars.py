"""Two real sidecars with a client and a server, what they tell of themselves, and how long it takes them."""

import math
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from meshnet.model.admin import ListConnections
from meshnet_cli.demo.mesh import Mesh, Sidecar
from meshnet_cli.demo.world import Host, World, wait_for
from tests.bench import load
from tests.bench.load import Subject
from tests.bench.subjects import allow_many_short_connections, meshnet
from tests.bench.subjects.hops import DOMAIN, PORT
from tests.proxy import metrics

_PATIENCE = 60.0  # seconds
_LAG = "meshnet_event_loop_lag_seconds_bucket"


@dataclass(frozen=True, slots=True)
class Pair:
    """The sidecar of the client and that of the server, and what load is put on."""

    program: Path
    web: Sidecar
    api: Sidecar
    subject: Subject

    @property
    def both(self) -> tuple[Sidecar, Sidecar]:
        return self.web, self.api

    def memory(self) -> int:
        """KiB, of both."""
        return load.pss(self.subject.pids())

    def run(self, work: str, connections: int, seconds: float) -> load.Result:
        """Raises LoadFailed."""
        return load.run(self.program, work, self.subject, connections, warm=0.0, seconds=seconds)

    def hold(self, count: int) -> None:
        """Opens that many, and leaves them open until the pair ends. Raises LoadFailed."""
        host, port = self.subject.target
        command = (self.program, "hold", host, str(port), str(count), "0", "0")
        holder = self.subject.client.spawn(*command, name=f"hold-{count}")
        wait_for(
            lambda: "held" in holder.output or not holder.alive, timeout=_PATIENCE, what=f"{count} connections open"
        )
        if not holder.alive:
            raise load.LoadFailed(f"{count} connections could not be opened: {holder.output[-500:]}")


@contextmanager
def pair(program: Path, mode: str) -> Iterator[Pair]:
    """Built, and proven by a connection. Raises as the subjects of the bench do."""
    with World() as world:
        web, api = world.host("web"), world.host("api")
        for host in (web, api):
            allow_many_short_connections(host)
        server = api.spawn(program, "serve", str(PORT))
        wait_for(lambda: api.listens(PORT), what="the server")
        mesh = Mesh(world, DOMAIN)
        subject = meshnet.build(web, api, mesh, server, mode, 1)
        built = Pair(program, mesh.sidecars[web.name], mesh.sidecars[api.name], subject)
        built.run("rr", 1, 0.3)
        subject.says = meshnet.check(mesh, web, api, mode)
        yield built


class LagWatch:
    """The lag of both loops between two looks at their metrics."""

    def __init__(self, sidecars: Pair) -> None:
        self._hosts = [sidecar.host for sidecar in sidecars.both]
        self._before = [_lags(host) for host in self._hosts]

    def worst(self) -> str:
        """Milliseconds, as a bound: a loop's lag is looked at eight times a second, and counted in buckets."""
        worst = 0.0
        for host, before in zip(self._hosts, self._before, strict=True):
            now = _lags(host)
            seen = now[math.inf] - before[math.inf]
            # Each bucket has those of the smaller ones too.
            worst = max(worst, min(bound for bound in now if now[bound] - before[bound] == seen))
        return "over 1,000" if worst == math.inf else f"{worst * 1000:g}"


def _lags(host: Host) -> dict[float, float]:
    """By the bounds of the buckets, in seconds."""
    return {float(each.labels["le"]): each.value for each in metrics.samples(host) if each.name == _LAG}


def scrape_seconds(sidecars: Pair) -> float:
    """How long a scrape takes, of the slower sidecar."""
    return max(_seconds(partial(metrics.get, sidecar.host, "/metrics")) for sidecar in sidecars.both)


def conns_seconds(sidecars: Pair) -> float:
    """How long the admin socket takes to say all connections, of the slower sidecar."""
    return max(_seconds(partial(_conns, sidecar.settings.admin.socket)) for sidecar in sidecars.both)


def _conns(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as admin:
        admin.settimeout(_PATIENCE)
        admin.connect(path)
        admin.sendall(msgspec.json.encode(ListConnections()) + b"\n")
        while not (said := admin.recv(1 << 20)).endswith(b"\n"):
            if not said:
                raise load.LoadFailed(f"{path} hung up")


def _seconds(ask: Callable[[], object]) -> float:
    began = time.monotonic()
    ask()
    return time.monotonic() - began
