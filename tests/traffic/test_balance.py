"""Which endpoint gets the next connection."""

from collections import Counter
from contextlib import ExitStack

import msgspec
import pytest

from tests.proxy.programs import Records
from tests.traffic.calls import Call, is_reset, who
from tests.traffic.conftest import Hosts, Name, traffic
from tests.world import into_the_mesh, wait_for

pytestmark = pytest.mark.netns


def test_round_robin_gives_each_endpoint_exactly_its_weight(hosts: Hosts, name: Name) -> None:
    hosts.write(hosts.service(name, hosts.apis, weights=[1, 2, 1]), traffic(name, balance="round_robin"))
    out = Records(hosts.sidecar(hosts.web))
    with hosts.apps(name.port, hosts.apis) as apps:
        seen = Counter(who(hosts.web, name) for _ in range(12))
        assert seen == {"api-1": 3, "api-2": 6, "api-3": 3}
        assert {host: app.accepted for host, app in apps.items()} == seen
    recorded = Counter(record.endpoint.rpartition(":")[0] for record in out.ended(12))
    assert recorded == {host.address: seen[host.name] for host in hosts.apis}


def test_by_default_new_connections_keep_away_from_the_endpoint_that_holds_long_ones(hosts: Hosts, name: Name) -> None:
    hosts.write(hosts.service(name, hosts.apis))
    first = hosts.apis[0]
    with hosts.apps(name.port, hosts.apis), ExitStack() as stack:
        # Named by its own address it is not balanced, but it counts.
        for _ in range(4):
            stack.enter_context(Call(hosts.web, first.address, name.port))
        calls = [stack.enter_context(Call(hosts.web, name)) for _ in range(8)]
        assert Counter(call.server for call in calls) == {"api-2": 4, "api-3": 4}
        assert {host: view.connections for host, view in hosts.endpoints(name).items()} == dict.fromkeys(
            ("api-1", "api-2", "api-3"), 4
        )


def test_least_conn_weighs(hosts: Hosts, name: Name) -> None:
    hosts.write(hosts.service(name, hosts.apis, weights=[1, 2, 3]), traffic(name, balance="least_conn"))
    with hosts.apps(name.port, hosts.apis), ExitStack() as stack:
        calls = [stack.enter_context(Call(hosts.web, name)) for _ in range(12)]
        assert Counter(call.server for call in calls) == {"api-1": 2, "api-2": 4, "api-3": 6}


def test_a_new_policy_holds_for_new_connections_and_leaves_the_open_ones(hosts: Hosts, name: Name) -> None:
    service = hosts.service(name, hosts.apis)
    hosts.write(service, traffic(name, balance="least_conn"))
    with hosts.apps(name.port, hosts.apis), ExitStack() as stack:
        held = [stack.enter_context(Call(hosts.web, hosts.apis[0].address, name.port)) for _ in range(6)]
        assert "api-1" not in {who(hosts.web, name) for _ in range(4)}
        hosts.write(service, traffic(name, balance="round_robin"))
        assert Counter(who(hosts.web, name) for _ in range(6)) == {"api-1": 2, "api-2": 2, "api-3": 2}
        assert [call.say("still here") for call in held] == ["still here"] * 6


def test_an_endpoint_of_weight_zero_keeps_its_connections_and_gets_no_new_ones(hosts: Hosts, name: Name) -> None:
    hosts.write(hosts.service(name, hosts.apis), traffic(name, balance="round_robin"))
    with hosts.apps(name.port, hosts.apis), ExitStack() as stack:
        held = {call.server: call for call in [stack.enter_context(Call(hosts.web, name)) for _ in range(3)]}
        hosts.write(hosts.service(name, hosts.apis, weights=[0, 1, 1]), traffic(name, balance="round_robin"))
        assert Counter(who(hosts.web, name) for _ in range(6)) == {"api-2": 3, "api-3": 3}
        assert held["api-1"].say("still here") == "still here"
        held["api-1"].close()
        wait_for(lambda: hosts.endpoints(name)["api-1"].connections == 0)


def test_maglev_sends_a_host_to_the_same_endpoint_and_elsewhere_while_that_is_out(hosts: Hosts, name: Name) -> None:
    once = {"failures": 1, "openTime": "60s"}
    hosts.write(hosts.service(name, hosts.apis), traffic(name, balance="maglev", breaker=once))
    with hosts.apps(name.port, hosts.apis) as apps:
        (home,) = {who(hosts.web, name) for _ in range(8)}
        apps[home].refuse()
        (other,) = {who(hosts.web, name) for _ in range(8)}
        assert other != home
    with hosts.apps(name.port, hosts.apis):
        assert {who(hosts.cron, name) for _ in range(4)} <= {"api-1", "api-2", "api-3"}


def test_random_reaches_all_of_them_and_first_fills_one_before_the_next(hosts: Hosts, name: Name) -> None:
    service = hosts.service(name, hosts.apis)
    hosts.write(service, traffic(name, balance="random"))
    with hosts.apps(name.port, hosts.apis), ExitStack() as stack:
        assert {who(hosts.web, name) for _ in range(40)} == {"api-1", "api-2", "api-3"}
        hosts.write(service, traffic(name, balance="first", limits={"maxConnectionsPerEndpoint": 2}))
        calls = [stack.enter_context(Call(hosts.web, name)) for _ in range(5)]
        assert [call.server for call in calls] == ["api-1", "api-1", "api-2", "api-2", "api-3"]
        calls[1].close()
        wait_for(lambda: hosts.endpoints(name)["api-1"].connections == 1)
        assert who(hosts.web, name) == "api-1"


def test_endpoints_of_the_own_zone_come_first_and_then_those_of_the_region(hosts: Hosts, name: Name) -> None:
    """The sidecars of this file are in no zone; one of its own is."""
    places = [("b", "north"), ("a", "north"), ("a", "south")]
    service = hosts.service(name, hosts.apis)
    near = tuple(
        msgspec.structs.replace(endpoint, zone=zone, region=region)
        for endpoint, (zone, region) in zip(service.spec.endpoints, places, strict=True)
    )
    service = msgspec.structs.replace(service, spec=msgspec.structs.replace(service.spec, endpoints=near))
    hosts.write(service, traffic(name, breaker={"failures": 1, "openTime": "60s"}))
    caller = hosts.world.host(f"near-{name.name}")
    into_the_mesh(hosts.mesh, [caller], proxy={"zone": "a", "region": "north"})
    with hosts.apps(name.port, hosts.apis) as apps:
        assert {who(caller, name) for _ in range(8)} == {"api-2"}
        apps["api-2"].refuse()
        assert {who(caller, name) for _ in range(8)} == {"api-1"}
        apps["api-1"].refuse()
        assert {who(caller, name) for _ in range(8)} == {"api-3"}
        assert {who(hosts.web, name) for _ in range(4)} == {"api-3"}


def test_a_refusal_leaves_as_it_was_how_long_connecting_takes(hosts: Hosts, name: Name) -> None:
    first, second = hosts.apis[:2]
    policy = traffic(name, connect={"attempts": 1}, breaker={"failures": 1000})
    hosts.write(hosts.service(name, [first, second]), policy)
    with hosts.apps(name.port, [first]) as apps:
        assert who(hosts.web, first.address, name.port) == first.name
        before = hosts.endpoints(name)[first.name].connect_ms
        assert before
        apps[first.name].refuse()
        for each in (first, second):
            assert all(is_reset(hosts.web, each.address, name.port) for _ in range(3))
    views = hosts.endpoints(name)
    assert [(views[each.name].failures, views[each.name].connect_ms) for each in (first, second)] == [
        (3, before),
        (3, None),
    ]


def test_explain_tells_where_a_connection_would_go_and_why_not_elsewhere(hosts: Hosts, name: Name) -> None:
    hosts.write(hosts.service(name, hosts.apis), traffic(name, breaker={"failures": 1, "openTime": "60s"}))
    first, second, third = (f"{host.address}:{name.port}" for host in hosts.apis)

    def explained(target: str, *words: str) -> str:
        socket = hosts.sidecar(hosts.web).settings.admin.socket
        return hosts.web.run("meshnet", "explain", target, "--socket", socket, *words).stdout

    target = f"{name.address}:{name.port}"
    with hosts.apps(name.port, hosts.apis[:2]), Call(hosts.web, hosts.apis[0].address, name.port):
        wait_for(lambda: bool([who(hosts.web, name)]) and hosts.endpoints(name)["api-3"].breaker == "open")
        text = explained(target)
        assert f"route       {name.name}:{name.port}, least_conn among 3 endpoints\n" in text
        assert f"endpoints   {second}  by tunnel (meshnet), weight 1, 0 connections, connects in " in text
        assert f"            {first}  by tunnel (meshnet), weight 1, 1 connections, " in text
        assert f"            {third}  passed over: its breaker is open for " in text
        told = msgspec.json.decode(explained(target, "-o", "json"))["route"]
        assert [each["endpoint"] for each in told["candidates"]] == [second, first, third]
        assert [each["score"] for each in told["candidates"]] == [1, 2, None]
    assert f"route       {name.name}:{name.port}, endpoint\n" in explained(first)
    assert "route       no service has this address: it is dialled as it is" in explained("10.1.2.3:80")


def test_an_endpoint_that_is_added_beside_others_gets_its_share_little_by_little(hosts: Hosts, name: Name) -> None:
    slow = {"window": "1h", "least": 0.01}
    policy = traffic(name, balance="random", slowStart=slow)
    with hosts.apps(name.port, hosts.apis):
        hosts.write(hosts.service(name, hosts.apis[:2]), policy)
        assert {who(hosts.web, name) for _ in range(30)} == {"api-1", "api-2"}  # at the beginning all are new
        hosts.write(hosts.service(name, hosts.apis), policy)
        seen = Counter(who(hosts.web, name) for _ in range(60))
        assert seen["api-3"] < 8  # an even share would be 20, this is 0.3
        hosts.write(hosts.service(name, hosts.apis), traffic(name, balance="random", slowStart={"window": "0s"}))
        assert Counter(who(hosts.web, name) for _ in range(60))["api-3"] > 8


def test_explain_tells_what_the_choice_was_among_when_it_was_made(hosts: Hosts, name: Name) -> None:
    hosts.write(hosts.service(name, hosts.apis), traffic(name, breaker={"failures": 1, "openTime": "60s"}))
    first, second, third = (f"{host.address}:{name.port}" for host in hosts.apis)
    sidecar = hosts.sidecar(hosts.web)
    with hosts.apps(name.port, hosts.apis[:2]), Call(hosts.web, hosts.apis[0].address, name.port):
        wait_for(lambda: bool([who(hosts.web, name)]) and hosts.endpoints(name)["api-3"].breaker == "open")
        wait_for(lambda: hosts.endpoints(name)["api-2"].connections == 0)
        out = Records(sidecar)
        assert who(hosts.web, name) == "api-2"
    record = out.ended(1)[0]
    wait_for(lambda: hosts.endpoints(name)["api-1"].connections == 0)  # now it is another choice
    (attempt,) = record.attempts
    assert [(each.endpoint, each.connections, each.score) for each in attempt.weighed] == [
        (first, 1, 2.0),
        (second, 0, 1.0),
        (third, 0, None),
    ]
    told = sidecar.meshnet("explain", record.id)
    assert f"weighed: {second} had score 1, 0 connections; {first} had score 2, 1 connections; {third} was pas" in told
    assert "was passed over: its breaker is open for " in told
