"""Endpoints by DNS name: what a change of an answer changes, and what it leaves alone."""

import os
import signal
from collections.abc import Iterator

import pytest

from meshnet.model.admin import EndpointView
from meshnet.model.resource import API_VERSION, EndpointSpec, Metadata, PortSpec, Service, ServiceSpec
from meshnet.model.service import TunnelKind
from tests.proxy.metrics import value
from tests.proxy.name_server import NameServer, name_server, resolver_files
from tests.proxy.programs import Records, accept, ask, echo, is_reset, listen, read, reason
from tests.world import Host, Mesh, Sidecar, World, wait_for

pytestmark = pytest.mark.netns

VIP, PORT, NAME, FULL = "10.96.0.50", 6000, "db.example.com", "db.example.com."

BY_NAME = EndpointSpec(address=NAME)


class Hosts:
    """`web` calls; `one` and `two` are what the name may stand for; `names` has the name server."""

    def __init__(self, world: World, server: NameServer, names: Host, workers: int = 1) -> None:
        self.server, self.names_host = server, names
        self.web, self.one, self.two = (world.host(name) for name in ("web", "one", "two"))
        self.mesh = Mesh(world)
        files = resolver_files(self.web, names, "search example.com")
        self.write()
        self.mesh.sidecar(self.web, start=False, mesh=files, proxy={"workers": workers})

    @property
    def sidecar(self) -> Sidecar:
        return self.mesh.sidecars["web"]

    @property
    def log(self) -> str:
        assert self.sidecar.process is not None
        return self.sidecar.process.output

    def write(self, endpoint: EndpointSpec = BY_NAME) -> None:
        spec = ServiceSpec(addresses=(VIP,), ports=(PortSpec(port=PORT),), endpoints=(endpoint,))
        self.mesh.write(Service(api_version=API_VERSION, metadata=Metadata(name="db"), spec=spec))

    def up(self) -> None:
        self.sidecar.start()
        self.sidecar.capture()

    def endpoints(self) -> list[EndpointView]:
        return list(self.sidecar.endpoints("db").items)

    def names(self, *hosts: Host) -> None:
        """The name is these from now on. Returns when the sidecar knows."""
        self.server.records[FULL] = [host.address for host in hosts]
        wanted = {f"{host.address}:{PORT}" for host in hosts}
        wait_for(lambda: {view.endpoint for view in self.endpoints()} == wanted, timeout=20, what=f"{wanted}")


@pytest.fixture
def hosts(world: World) -> Iterator[Hosts]:
    names = world.host("names")
    with name_server(names) as server:
        yield Hosts(world, server, names)


def test_a_name_is_known_before_the_first_connection_and_shown_beside_its_addresses(hosts: Hosts) -> None:
    hosts.server.records[FULL] = [hosts.one.address, hosts.two.address]
    hosts.up()
    with echo(hosts.one, PORT) as one, echo(hosts.two, PORT) as two:
        assert ask(hosts.web, VIP, PORT) == b"question"
        assert one() + two() == 1
    views = hosts.endpoints()
    assert {(view.endpoint, view.dns_name, view.dns_problem) for view in views} == {
        (f"{host.address}:{PORT}", NAME, "") for host in (hosts.one, hosts.two)
    }
    table = hosts.sidecar.meshnet("endpoints", "--columns", "endpoint,state", "--no-header")
    assert f"{hosts.one.address}:{PORT} ({NAME})  healthy" in table
    assert value(hosts.web, "meshnet_dns_lookups_total", result="answered") >= 1
    assert value(hosts.web, "meshnet_dns_failing_names") == 0


def test_a_changed_answer_moves_new_connections_and_leaves_the_open_ones(hosts: Hosts) -> None:
    hosts.server.records[FULL] = [hosts.one.address]
    hosts.up()
    with listen(hosts.one, PORT) as first, listen(hosts.two, PORT) as second:
        client = hosts.web.connect(VIP, PORT)
        app = accept(first)
        hosts.names(hosts.two)
        with hosts.web.connect(VIP, PORT), accept(second):
            pass
        with client, app:
            client.sendall(b"still here")
            assert read(app, 10) == b"still here"
    assert f"{NAME} is {hosts.two.address}; it was {hosts.one.address}" in hosts.log


def test_who_asks_for_a_reload_has_names_asked_for_at_once(hosts: Hosts) -> None:
    hosts.server.ttl = 300
    hosts.server.records[FULL] = [hosts.one.address]
    hosts.up()
    hosts.server.records[FULL] = [hosts.two.address]
    os.kill(hosts.sidecar.status().pid, signal.SIGHUP)
    wait_for(lambda: [view.endpoint for view in hosts.endpoints()] == [f"{hosts.two.address}:{PORT}"])


def test_what_was_learned_of_an_endpoint_outlives_a_change_of_the_answer(hosts: Hosts) -> None:
    hosts.server.records[FULL] = [hosts.one.address]
    hosts.up()
    for _ in range(5):
        assert is_reset(hosts.web, VIP, PORT)
    (view,) = hosts.endpoints()
    assert view.failures >= 5
    hosts.names(hosts.one, hosts.two)
    (same,) = [each for each in hosts.endpoints() if each.endpoint == view.endpoint]
    assert same.failures == view.failures
    assert same.breaker in ("open", "half-open")


def test_whatever_goes_wrong_the_last_good_addresses_stay_and_it_is_told_once(hosts: Hosts) -> None:
    hosts.server.records[FULL] = [hosts.one.address]
    hosts.up()
    with echo(hosts.one, PORT):
        for wrong, problem in (
            (NameServer.SERVFAIL, "SERVFAIL"),
            ([], "it has no address"),
            (NameServer.NXDOMAIN, "there is no such name"),
        ):
            hosts.server.records[FULL] = wrong
            wait_for(lambda it=problem: it in hosts.endpoints()[0].dns_problem, timeout=20, what=problem)
            assert [view.endpoint for view in hosts.endpoints()] == [f"{hosts.one.address}:{PORT}"]
            assert ask(hosts.web, VIP, PORT) == b"question"
        assert value(hosts.web, "meshnet_dns_failing_names") == 1
        assert hosts.log.count("cannot be resolved") == 1
        assert f"it stays {hosts.one.address}" in hosts.log
        hosts.names(hosts.two)
        assert hosts.log.count("can be resolved again") == 1


def test_a_name_without_an_address_is_shown_and_told_to_who_calls(hosts: Hosts) -> None:
    hosts.up()
    out = Records(hosts.sidecar)
    assert is_reset(hosts.web, VIP, PORT)
    record = out.one()
    assert reason(record).startswith("no_endpoint by proxy")
    assert record.reason is not None
    assert f"no address is known of {NAME} (there is no such name)" in record.reason.message
    (view,) = hosts.endpoints()
    assert (view.endpoint, view.dns_name, view.dns_problem) == ("", NAME, "there is no such name")
    table = hosts.sidecar.meshnet("endpoints", "--columns", "endpoint,state,last_error", "--no-header")
    assert table.splitlines()[0] == f"({NAME})  unresolved  there is no such name"


def test_a_restart_without_a_name_server_goes_on_with_the_addresses_from_before(hosts: Hosts) -> None:
    hosts.server.records[FULL] = [hosts.one.address]
    hosts.up()
    hosts.sidecar.stop()
    hosts.server.records[FULL] = NameServer.SILENCE
    hosts.sidecar.start()
    with echo(hosts.one, PORT):
        assert ask(hosts.web, VIP, PORT) == b"question"


def test_bad_files_stay_told_when_an_answer_changes(hosts: Hosts) -> None:
    hosts.server.records[FULL] = [hosts.one.address]
    hosts.up()
    (hosts.mesh.directory / "bad.yaml").write_text("kind: Nonsense\n")
    wait_for(lambda: hosts.sidecar.status().config.problem)
    hosts.names(hosts.two)
    assert "bad.yaml" in hosts.sidecar.status().config.problem


def test_a_name_that_nobody_resolves_yet_may_be_this_host_and_its_policies_hold(hosts: Hosts, world: World) -> None:
    text = (hosts.mesh.directory / "mesh.yaml").read_text()
    strict = text.replace("mode: null", "mode: strict")
    assert strict != text
    (hosts.mesh.directory / "mesh.yaml").write_text(strict)
    hosts.up()
    with echo(hosts.web, PORT):
        assert is_reset(hosts.one, hosts.web.address, PORT)
        hosts.names(hosts.two)
        wait_for(lambda: ask_or_nothing(hosts.one, hosts.web.address) == b"question", what="nobody's port any more")


def test_a_meshed_endpoint_by_name_is_spoken_to_through_its_tunnel(hosts: Hosts) -> None:
    identity = hosts.mesh.identity("one")
    hosts.write(EndpointSpec(address="db", tunnel=TunnelKind.MESHNET, identity=identity))  # by the search path
    hosts.server.records[FULL] = [hosts.one.address]
    hosts.mesh.sidecar(hosts.one, mesh=resolver_files(hosts.one, hosts.names_host, "search example.com"))
    hosts.up()
    out, into = Records(hosts.sidecar), Records(hosts.mesh.sidecars["one"])
    with echo(hosts.one, PORT):
        assert ask(hosts.web, VIP, PORT) == b"question"
    assert out.one().tls.peer_identity == identity
    assert into.one().destination.service == f"db:{PORT}"
    hosts.server.records[FULL] = [hosts.two.address]  # where nobody has that identity
    wait_for(lambda: hosts.endpoints()[0].endpoint == f"{hosts.two.address}:{PORT}", timeout=20)
    with echo(hosts.two, PORT) as reached:
        assert is_reset(hosts.web, VIP, PORT)
        assert reached() == 0


def ask_or_nothing(host: Host, address: str) -> bytes:
    try:
        return ask(host, address, PORT)
    except OSError:
        return b""


def test_every_worker_asks_and_they_show_one_list(world: World) -> None:
    names = world.host("names")
    with name_server(names) as server:
        hosts = Hosts(world, server, names, workers=2)
        server.records[FULL] = [hosts.one.address]
        hosts.up()
        (view,) = hosts.endpoints()
        assert (view.dns_name, view.workers) == (NAME, 2)
        assert server.asked_for(FULL) >= 2
        hosts.names(hosts.one, hosts.two)
        with echo(hosts.one, PORT), echo(hosts.two, PORT):
            assert ask(hosts.web, VIP, PORT) == b"question"
