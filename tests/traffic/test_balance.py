"""Which endpoint gets the next connection."""

from collections import Counter
from contextlib import ExitStack

import pytest

from tests.proxy.programs import Records
from tests.traffic.calls import Call, who
from tests.traffic.conftest import Hosts, Name, traffic
from tests.world import wait_for

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
