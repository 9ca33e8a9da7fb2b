"""Applications that see their client's address, through every way of capture, and the answers that find back."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace

from meshnet.errors import CommandError
from meshnet.model.connection import Direction
from meshnet.model.settings import Settings
from meshnet.net.sockets import peer_address
from meshnet_init.apply import apply_plan
from meshnet_init.choose import choose
from meshnet_init.host import host_facts
from meshnet_init.plan import make_plan
from meshnet_init.remove import remove
from meshnet_init.routing import installed_routing
from meshnet_init.sidecar import misfits
from tests.proxy.conftest import API
from tests.proxy.programs import Records, accept, converse, listen, read_all, reason
from tests.world import Host, Mesh, Sidecar, World, into_the_mesh

pytestmark = pytest.mark.netns

SWITCHES = [f"/proc/sys/net/{it}" for it in ("ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect")]
MODES = [(mode, accepts) for mode in ("redirect", "tproxy") for accepts in (True, False)]


@dataclass
class Pair:
    """`web` calls through its own sidecar, `outside` has none; the applications are on `api`."""

    world: World
    web: Host
    outside: Host
    api: Host
    sidecar: Sidecar
    before: str
    accepts: bool

    def put_in(self) -> None:
        with self.api.entered():
            facts = replace(host_facts(), accepts_marks=self.accepts)
            plan = make_plan(self.sidecar.settings, facts)
            apply_plan(plan, choose("auto", plan).backend)


@pytest.fixture(scope="module", params=MODES, ids=lambda mode: f"{mode[0]}-{'sysctl' if mode[1] else 'connmark'}")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    mode, accepts = request.param
    with World() as world:
        mesh = Mesh(world)
        web, outside, api = (world.host(name) for name in ("web", "outside", "api"))
        mesh.write(mesh.service("api", [8080], [api], addresses=[API]))
        into_the_mesh(mesh, [web])
        before = routing_of(api)
        sidecar = mesh.sidecar(api, capture={"original_source": True, "inbound_mode": mode})
        with api.entered():
            for name in ("rp_filter", "src_valid_mark"):  # which have made others fail (tailscale#19796)
                for interface in ("all", "lo", "eth0"):
                    Path(f"/proc/sys/net/ipv4/conf/{interface}/{name}").write_text("1")
        made = Pair(world, web, outside, api, sidecar, before, accepts)
        made.put_in()
        yield made
        for each in mesh.sidecars.values():
            assert each.process is not None
            assert each.process.alive
        with api.entered():
            remove(0.0)
        assert routing_of(api) == before


def routing_of(host: Host) -> str:
    """The rules and routes that marks are for, and the switch."""
    texts = [host.run("ip", *six, "rule").stdout for six in ((), ("-6",))]
    texts += [host.run("ip", *six, "route", "show", "table", "6700", check=False).stdout for six in ((), ("-6",))]
    return "".join([*texts, host.run("cat", *SWITCHES).stdout])


def seen_by(app: socket.socket) -> str:
    return peer_address(app.getpeername()).host


@pytest.mark.parametrize("family", ["address", "address6"])
def test_an_application_sees_who_calls_in_plain_text(pair: Pair, family: str) -> None:
    into = Records(pair.sidecar)
    with listen(pair.api, 8081) as server:
        client = pair.outside.connect(getattr(pair.api, family), 8081)
        app = accept(server)
        assert seen_by(app) == getattr(pair.outside, family)
        converse(client, app, b"q" * 100_000, b"a" * 300_000)
    assert reason(into.one()) == "ok by client in data"


def test_an_application_sees_who_calls_through_a_tunnel(pair: Pair) -> None:
    into = Records(pair.sidecar)
    with listen(pair.api, 8080) as server:
        for _ in range(3):
            client = pair.web.connect(API, 8080)
            app = accept(server)
            assert seen_by(app) == pair.web.address
            converse(client, app, b"q" * 1000, b"a" * 70_000)
    assert {record.direction for record in into.ended(3)} == {Direction.INBOUND}


def test_who_calls_from_the_same_host_is_seen_as_ever(pair: Pair) -> None:
    with listen(pair.api, 8081) as server:
        for target in ("127.0.0.1", pair.api.address):
            client = pair.api.connect(target, 8081)
            converse(client, accept(server))


def test_many_at_once_from_one_address(pair: Pair) -> None:
    with listen(pair.api, 8081) as server:
        clients = [pair.outside.connect(pair.api.address, 8081) for _ in range(100)]
        apps = [accept(server) for _ in clients]
        assert {seen_by(app) for app in apps} == {pair.outside.address}
        for number, client in enumerate(clients):
            client.sendall(b"%d" % number)
            client.shutdown(socket.SHUT_WR)
        heard = sorted(int(read_all(app)) for app in apps)
        assert heard == list(range(100))
        for each in (*clients, *apps):
            each.close()


def test_a_reset_reaches_the_application_and_one_of_its_the_client(pair: Pair) -> None:
    with listen(pair.api, 8081) as server:
        for first in (0, 1):
            ends = [pair.outside.connect(pair.api.address, 8081)]
            ends.append(accept(server))
            ends[first].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            ends[first].close()
            with pytest.raises(ConnectionResetError):
                ends[1 - first].recv(1)
            ends[1 - first].close()


def test_a_port_nobody_listens_on_is_refused(pair: Pair) -> None:
    into = Records(pair.sidecar)
    with pytest.raises(ConnectionResetError), pair.outside.connect(pair.api.address, 8099) as client:
        client.recv(1)
    assert reason(into.one()).startswith("connect.refused")


def test_a_removal_waits_for_connections_in_clients_names(pair: Pair) -> None:
    """Where they came by TPROXY or through a tunnel, no redirect port shows them."""
    with listen(pair.api, 8081) as server, pair.outside.connect(pair.api.address, 8081) as client:
        app = accept(server)
        seen: list[int] = []

        def end(count: int) -> None:
            seen.append(count)
            if client.fileno() != -1:
                client.sendall(b"last words")
                assert app.recv(10) == b"last words"
                app.sendall(b"heard")
                assert client.recv(5) == b"heard"
                client.close()
                app.close()

        with pair.api.entered():
            removed = remove(20.0, end)
            assert installed_routing() is None
    assert removed.waited_for == seen[0] == 1
    assert removed.cut == 0
    pair.put_in()


def test_the_rules_are_not_taken_from_connections_in_clients_names(pair: Pair) -> None:
    without = replace(pair.sidecar.settings.capture, original_source=False)
    settings = replace(pair.sidecar.settings, capture=without)
    with listen(pair.api, 8081) as server, pair.outside.connect(pair.api.address, 8081) as client:
        app = accept(server)
        with pair.api.entered(), pytest.raises(CommandError, match="clients' names"):
            plan = make_plan(settings, host_facts())
            apply_plan(plan, choose("auto", plan).backend)
        converse(client, app)
    assert any("clients' names" in line for line in misfits_of(pair, settings))


def misfits_of(pair: Pair, settings: Settings) -> tuple[str, ...]:
    with pair.api.entered():
        plan = make_plan(settings, host_facts())
    return misfits(plan.rules, plan.routing, pair.sidecar.status())


def test_rules_for_another_way_in_do_not_fit_the_sidecar(pair: Pair) -> None:
    capture = pair.sidecar.settings.capture
    other = "redirect" if capture.inbound_mode == "tproxy" else "tproxy"
    assert misfits_of(pair, pair.sidecar.settings) == ()
    turned = replace(pair.sidecar.settings, capture=replace(capture, inbound_mode=other))
    assert [line for line in misfits_of(pair, turned) if f"takes them as {capture.inbound_mode}" in line]
    bridged = replace(pair.sidecar.settings, capture=replace(capture, reroute_interfaces=("br-*",)))
    assert [line for line in misfits_of(pair, bridged) if "passes through" in line]
