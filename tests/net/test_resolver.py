"""Names asked for at a real server, from another host of a world."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import trio

from meshnet.decide.names import Lookup
from meshnet.net import resolver as resolver_module
from meshnet.net.resolver import Resolver
from tests.proxy.name_server import NameServer, name_server, resolver_files
from tests.world import Host, World

pytestmark = pytest.mark.netns

NAME, FULL = "db.example.com", "db.example.com."


@dataclass
class Asking:
    host: Host
    elsewhere: Host
    server: NameServer

    def look_up(self, name: str = NAME, *lines: str, hosts: str = "", mark: int = 0) -> Lookup:
        files = resolver_files(self.host, self.elsewhere, *lines, hosts=hosts)
        resolver = Resolver(**files, mark=mark)
        with self.host.entered():  # the one task of the run
            return trio.run(resolver.look_up, name)


@pytest.fixture
def asking(world: World) -> Iterator[Asking]:
    host, elsewhere = world.host("host"), world.host("elsewhere")
    with name_server(elsewhere) as server:
        yield Asking(host, elsewhere, server)


def test_a_name_has_its_addresses_of_both_families_and_their_ttl(asking: Asking) -> None:
    asking.server.ttl = 77
    asking.server.records[FULL] = ["10.9.0.2", "fd09::1", "10.9.0.1"]
    assert asking.look_up() == Lookup(("10.9.0.1", "10.9.0.2", "fd09::1"), 77.0)


def test_a_name_with_addresses_of_one_family_only_is_no_problem(asking: Asking) -> None:
    asking.server.records[FULL] = ["fd09::1"]
    assert asking.look_up() == Lookup(("fd09::1",), 1.0)


def test_ipv6_addresses_without_a_way_to_them_are_left_out_where_there_are_others(asking: Asking) -> None:
    asking.host.configure("route del ::/0")
    asking.server.records[FULL] = ["10.9.0.1", "2001:db8::1"]
    assert asking.look_up().hosts == ("10.9.0.1",)
    asking.server.records[FULL] = ["2001:db8::1"]
    assert asking.look_up().hosts == ("2001:db8::1",)


def test_the_file_of_hosts_is_asked_first(asking: Asking) -> None:
    asking.server.records[FULL] = ["10.9.0.1"]
    assert asking.look_up(hosts=f"10.9.0.7 {NAME}\n").hosts == ("10.9.0.7",)
    assert asking.server.asked == []


def test_the_search_path_is_followed(asking: Asking) -> None:
    asking.server.records[FULL] = ["10.9.0.1"]
    assert asking.look_up("db", "search other.example example.com").hosts == ("10.9.0.1",)
    assert [name for name, _ in asking.server.asked] == ["db.other.example.", FULL]
    assert asking.look_up("db.", "search example.com").problem == "there is no such name"


def test_a_name_with_dots_enough_is_taken_as_it_is_first(asking: Asking) -> None:
    asking.server.records[FULL] = ["10.9.0.1"]
    asking.server.records["db.example.com.pod.local."] = ["10.9.0.2"]
    assert asking.look_up(NAME, "search pod.local").hosts == ("10.9.0.1",)
    assert asking.look_up(NAME, "search pod.local", "options ndots:5").hosts == ("10.9.0.2",)


def test_an_answer_too_long_for_a_datagram_comes_by_tcp(asking: Asking) -> None:
    asking.server.records[FULL] = [f"10.9.1.{number}" for number in range(1, 101)]
    assert len(asking.look_up().hosts) == 100
    assert ("db.example.com.", "tcp") in asking.server.asked


def test_both_ways_of_asking_carry_the_mark(asking: Asking) -> None:
    asking.server.records[FULL] = [f"10.9.1.{number}" for number in range(1, 101)]
    asking.host.run(
        "nft",
        "add table ip t; add chain ip t out { type filter hook output priority 0; };"
        f" add rule ip t out meta mark != 0x1000 ip daddr {asking.elsewhere.address} reject",
    )
    assert asking.look_up().hosts == ()
    assert len(asking.look_up(mark=0x1000).hosts) == 100


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (NameServer.NXDOMAIN, "there is no such name"),
        ([], "it has no address"),
        (["0.0.0.0"], "0.0.0.0 is no address of a host"),
        (NameServer.SERVFAIL, "SERVFAIL"),
    ],
)
def test_why_there_is_no_address_is_told(asking: Asking, record: list[str] | str, problem: str) -> None:
    asking.server.records[FULL] = record
    lookup = asking.look_up()
    assert lookup.hosts == ()
    assert problem in lookup.problem


def test_a_server_that_is_not_there_is_told(asking: Asking) -> None:
    resolv_conf = asking.host.directory / "other.conf"
    resolv_conf.write_text(f"nameserver {asking.host.address}\n")
    with asking.host.entered():
        lookup = trio.run(Resolver(str(resolv_conf), "/nowhere", 0).look_up, NAME)
    assert asking.host.address in lookup.problem
    assert "refused" in lookup.problem
    with asking.host.entered():
        lookup = trio.run(Resolver("/nowhere", "/nowhere", 0).look_up, NAME)
    assert "/nowhere" in lookup.problem


def test_a_server_that_does_not_answer_is_not_waited_for_for_ever(
    asking: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver_module, "_PATIENCE", 0.3)
    asking.server.records[FULL] = NameServer.SILENCE
    assert asking.look_up().problem == "no server answered within 0.3 s"
