"""Two real sidecars with a client and a server, what they tell of themselves, and how long it takes them."""

import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from meshnet.model.admin import ConnectionListMetadata, ListConnections
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

    def hold(self, count: int, *, at_most: int, within: float) -> None:
        """Opens that many, `at_most` of them in a process, and leaves them open until the pair ends.

        Raises LoadFailed, also when they are not all open `within` seconds.
        """
        host, port = self.subject.target
        client = self.subject.client
        holders = []
        for begun in range(0, count, at_most):
            command = (self.program, "hold", host, str(port), str(min(at_most, count - begun)), "0", "0")
            holders.append(client.spawn(*command, name=f"hold-{len(client.processes)}"))
        try:
            wait_for(lambda: all("held" in one.output or not one.alive for one in holders), timeout=within)
        except TimeoutError:
            raise load.LoadFailed(f"{count:,} more were not open in the {within:.0f} s that were left") from None
        for holder in holders:
            if not holder.alive:
                raise load.LoadFailed(f"{count:,} more could not be opened: {holder.output.strip()[-500:]}")

    def handshakes(self) -> int:
        """Of tunnels, since the sidecars were started."""
        return int(metrics.value(self.web.host, "meshnet_tls_handshake_seconds_count"))

    def most_descriptors(self) -> int:
        """Of the process of a sidecar that has most."""
        return max(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.subject.pids())


@contextmanager
def pair(program: Path, mode: str, workers: int = 1) -> Iterator[Pair]:
    """Built, and proven by a connection. Raises as the subjects of the bench do.

    There are as many servers as each sidecar has workers, and connections are spread among them: a server takes one
    descriptor for each where a sidecar takes two.
    """
    with World() as world:
        web, api = world.host("web"), world.host("api")
        for host in (web, api):
            allow_many_short_connections(host)
        servers = [api.spawn(program, "serve", str(PORT), name=f"server-{number}") for number in range(workers)]
        wait_for(lambda: _listeners(api, PORT) == workers, what="the servers")
        mesh = Mesh(world, DOMAIN)
        subject = meshnet.build(web, api, mesh, servers[0], mode, workers)
        built = Pair(program, mesh.sidecars[web.name], mesh.sidecars[api.name], subject)
        built.run("rr", 1, 0.3)
        subject.says = meshnet.check(mesh, web, api, mode)
        yield built


def _listeners(host: Host, port: int) -> int:
    with host.entered():
        lines = Path("/proc/thread-self/net/tcp").read_text().splitlines()
    return sum(f":{port:04X} 00000000:0000 0A" in line for line in lines)


class LagWatch:
    """The lag of both loops between two looks at their metrics."""

    def __init__(self, sidecars: Pair) -> None:
        self._hosts = [sidecar.host for sidecar in sidecars.both]
        self._before = [_lags(host) for host in self._hosts]

    def worst(self) -> str:
        """Milliseconds, as a bound: the lag of each turn of a loop is counted in buckets."""
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


def conns_seconds(sidecars: Pair, at_least: int) -> float:
    """How long the admin socket takes to say all connections, of the slower sidecar.

    Raises LoadFailed when it tells of fewer that are open than `at_least`.
    """
    return max(_seconds(partial(_conns, sidecar.settings.admin.socket, at_least)) for sidecar in sidecars.both)


class _Head(msgspec.Struct):
    """What an answer says of itself."""

    metadata: ConnectionListMetadata


def _conns(path: str, at_least: int) -> None:
    with socket.socket(socket.AF_UNIX) as admin:
        admin.settimeout(_PATIENCE)
        admin.connect(path)
        admin.sendall(msgspec.json.encode(ListConnections()) + b"\n")
        parts: list[bytes] = []
        while not parts or not parts[-1].endswith(b"\n"):
            parts.append(admin.recv(1 << 20))
            if not parts[-1]:
                raise load.LoadFailed(f"{path} hung up")
    # Only the head is decoded: the rest is what `meshnet conns` would do with it.
    told = msgspec.json.decode(b"".join(parts), type=_Head).metadata
    if told.open < at_least:
        raise load.LoadFailed(
            f"{path} tells of {told.open:,} open connections, and {told.silent_workers} workers of none"
        )


def _seconds(ask: Callable[[], object]) -> float:
    began = time.monotonic()
    ask()
    return time.monotonic() - began
