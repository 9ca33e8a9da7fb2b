"""Our port of an endpoint leg, as the far end of it sees it, and what the kernel says of that leg to who looks.

Connections are plain ones to `outside` and such as go through a tunnel to `api`; from `web`, whose relay is the native
one, and from `old`, whose relay is in Python.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from meshnet.model.connection import Connection, Direction
from meshnet.net.sock_diag import tcp_sockets_with_info
from tests.proxy.conftest import API, PLAIN, Hosts
from tests.proxy.programs import Records, accept, converse, listen, read
from tests.world import Host, Sidecar, wait_for

pytestmark = pytest.mark.netns

TUNNEL_PORT = 15108
MUCH = 200_000


@pytest.fixture(scope="module", params=["native", "python"])
def relay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["plain", "mtls"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@dataclass
class Way:
    """From `caller` to the application that listens at `server`, on the host `far`."""

    hosts: Hosts
    caller: Host
    far: Host
    address: str
    server: socket.socket

    @property
    def sidecar(self) -> Sidecar:
        return self.hosts.sidecar(self.caller)

    def open(self) -> tuple[socket.socket, socket.socket]:
        return self.caller.connect(self.address, self.server.getsockname()[1]), accept(self.server)

    def tunnels(self) -> dict[int, int]:
        """Bytes that `far` has received in each from `caller`, by the port it comes from."""
        with self.far.entered():
            return {
                it.remote_port: info.bytes_received
                for it, info in tcp_sockets_with_info()
                if info and it.local_port == TUNNEL_PORT and socket.inet_ntoa(it.remote) == self.caller.address
            }


@pytest.fixture
def way(hosts: Hosts, relay: str, mode: str) -> Iterator[Way]:
    caller = hosts.web
    if relay == "python":
        caller = hosts.world.hosts.get("old") or hosts.world.host("old")
        if "old" not in hosts.mesh.sidecars:
            hosts.mesh.sidecar(caller, proxy={"relay": "python"}).capture()
    far, address, port = (hosts.outside, PLAIN, 6000) if mode == "plain" else (hosts.api, API, 8080)
    with listen(far, port) as server:
        yield Way(hosts, caller, far, address, server)


def known(records: Records) -> Connection:
    """The one that is open, once its port is known."""
    (found,) = wait_for(lambda: [it for it in records.open() if it.leg_port is not None], what="the port of its leg")
    return found


def talk(client: socket.socket, app: socket.socket, size: int) -> None:
    """`client` says that much, which waits in buffers as long as the way is slow."""
    app.settimeout(60)
    client.sendall(bytes(size))
    assert read(app, size) == bytes(size)


def test_the_port_is_the_one_that_the_far_end_sees(way: Way, relay: str, mode: str) -> None:
    """The first connection is decided about and dialled in Python; the others by the native relay, under an order."""
    for number in range(3):
        records, before = Records(way.sidecar), way.tunnels()
        client, app = way.open()
        talk(client, app, MUCH)
        seen = known(records)
        assert (seen.tls.mode, seen.relay) == (mode, relay)
        if mode == "plain":
            assert seen.leg_port == app.getpeername()[1]
        else:
            grown = [port for port, received in way.tunnels().items() if received - before.get(port, 0) >= MUCH]
            assert grown == [seen.leg_port]
        explained = way.sidecar.meshnet("explain", seen.id)
        assert f"leg         from our port {seen.leg_port}  round trip " in explained
        assert ("order: decided before" in explained) is (relay == "native" and number > 0)
        (item,) = (it for it in json.loads(way.sidecar.meshnet("conns", "-o", "json"))["items"] if it["id"] == seen.id)
        assert item["process"]["pid"] == os.getpid()
        assert item["tcp"]["rttUs"] > 0
        converse(client, app)
        assert records.one().leg_port == seen.leg_port
        ended = way.sidecar.meshnet("conns", "--all", "-o", "jsonl")
        (item,) = (it for it in map(json.loads, ended.splitlines()) if it["id"] == seen.id)
        assert not {"tcp", "process"} & set(item)


def test_the_port_of_what_comes_in_is_the_one_that_the_application_sees(hosts: Hosts) -> None:
    sidecar = hosts.sidecar(hosts.api)
    with listen(hosts.api, 8080) as server:
        for caller, address in ((hosts.web, API), (hosts.outside, hosts.api.address)):
            for _ in range(2):
                came = Records(sidecar)
                client, app = caller.connect(address, 8080), accept(server)
                client.sendall(b"x")
                assert read(app, 1) == b"x"
                seen = known(came)
                assert (seen.direction, seen.leg_port) == (Direction.INBOUND, app.getpeername()[1])
                converse(client, app)
                assert came.one().leg_port == seen.leg_port


def test_a_slow_way_that_loses_is_told_from_a_good_one(way: Way, mode: str) -> None:
    records, came = Records(way.sidecar), Records(way.hosts.sidecar(way.hosts.api))
    client, app = way.open()
    with slow(way.hosts, way.far):
        talk(client, app, MUCH)
        round_trip, lost = _path(way.sidecar, known(records))
        assert round_trip >= 20
        assert lost > 0
    if mode == "mtls":
        to_application, lost = _path(way.hosts.sidecar(way.hosts.api), known(came))
        assert to_application < round_trip
        assert lost == 0
    converse(client, app)


def _path(sidecar: Sidecar, connection: Connection) -> tuple[float, int]:
    """RTT in milliseconds and RETRANS."""
    table = sidecar.meshnet("conns", "--columns", "id,leg_port,rtt,retrans", "--no-header")
    ((_, port, round_trip, lost),) = (line.split() for line in table.splitlines() if line.startswith(connection.id))
    assert port == str(connection.leg_port)
    return float(round_trip.removesuffix("ms")), int(lost)


@contextmanager
def slow(hosts: Hosts, host: Host) -> Iterator[None]:
    """What goes to it waits at the switch for a megabit a second, and is lost when half a second's worth waits."""
    switch, port = hosts.world.switch, f"port{host.address.rpartition('.')[2]}"
    bucket = ("tbf", "rate", "1mbit", "burst", "4k", "latency", "500ms")
    switch.run("tc", "qdisc", "add", "dev", port, "root", *bucket)
    try:
        yield
    finally:
        switch.run("tc", "qdisc", "del", "dev", port, "root")
