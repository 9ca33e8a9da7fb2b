"""An endpoint that fails far more often than others is ejected for a while, though never in a row."""

import re

import pytest

from tests.proxy.metrics import value
from tests.proxy.programs import Records, reason
from tests.traffic.calls import Call, is_reset, who
from tests.traffic.conftest import Hosts, Name, traffic
from tests.world import wait_for

pytestmark = pytest.mark.netns

NEVER_IN_A_ROW = {"failures": 1000}
QUICK = {"interval": "1s", "minConnects": 5, "ejectionTime": "60s"}


def is_ejected(hosts: Hosts, name: Name, host: str) -> bool:
    return hosts.endpoints(name)[host].ejected_for_seconds > 0


def eject(hosts: Hosts, name: Name, host: str) -> None:
    """Calls until it has failed often enough; somebody else answers each time."""

    def failed() -> bool:
        assert who(hosts.web, name) != host
        return is_ejected(hosts, name, host)

    wait_for(failed, what=f"{host} is ejected")


def test_who_fails_is_ejected_told_and_not_tried_any_more(hosts: Hosts, name: Name) -> None:
    policy = traffic(name, balance="round_robin", breaker=NEVER_IN_A_ROW, outlier=QUICK)
    hosts.write(hosts.service(name, hosts.apis), policy)
    ejections = value(hosts.web, "meshnet_ejections_total")
    with hosts.apps(name.port, hosts.apis[1:]):
        eject(hosts, name, "api-1")
        view = hosts.endpoints(name)["api-1"]
        assert (view.breaker, view.state) == ("closed", "ejected")
        assert 50 < view.ejected_for_seconds <= 90  # with the share that is drawn, outlier.jitter
        out = Records(hosts.sidecar(hosts.web))
        assert {who(hosts.web, name) for _ in range(6)} == {"api-2", "api-3"}
        assert all(len(record.attempts) == 1 for record in out.ended(6))
    assert value(hosts.web, "meshnet_ejections_total") == ejections + 1
    assert value(hosts.web, "meshnet_endpoints", service=f"{name.name}:{name.port}", state="ejected") == 1
    assert value(hosts.web, "meshnet_endpoints", service=f"{name.name}:{name.port}", state="open") == 0
    process = hosts.sidecar(hosts.web).process
    assert process is not None
    told = rf"{re.escape(hosts.apis[0].address)}:{name.port} of {name.name}:{name.port} is ejected for [6-9]\d s"
    assert re.search(told, process.output)


def test_another_mesh_leaves_it_ejected_and_one_without_it_too(hosts: Hosts, name: Name) -> None:
    policy = traffic(name, balance="round_robin", breaker=NEVER_IN_A_ROW, outlier=QUICK)
    hosts.write(hosts.service(name, hosts.apis), policy)
    with hosts.apps(name.port, hosts.apis[1:]):
        eject(hosts, name, "api-1")
    hosts.write(hosts.service(name, hosts.apis, weights=[2, 2, 2]), policy)
    assert is_ejected(hosts, name, "api-1")
    hosts.write(hosts.service(name, hosts.apis[1:]), policy)
    hosts.write(hosts.service(name, hosts.apis), policy)
    assert is_ejected(hosts, name, "api-1")


def test_when_all_others_are_out_it_is_used_all_the_same_and_that_is_said(hosts: Hosts, name: Name) -> None:
    hosts.write(
        hosts.service(name, hosts.apis), traffic(name, balance="round_robin", breaker=NEVER_IN_A_ROW, outlier=QUICK)
    )
    service = f"{name.name}:{name.port}"
    with hosts.apps(name.port, hosts.apis[1:]) as apps:
        eject(hosts, name, "api-1")
        for app in apps.values():
            app.refuse()
        with hosts.apps(name.port, hosts.apis[:1]):
            assert who(hosts.web, name) == "api-1"
            assert value(hosts.web, "meshnet_service_panic", service=service) == 0, "the others were merely tried"
            at_once = {"failures": 1, "openTime": "60s"}
            hosts.write(
                hosts.service(name, hosts.apis), traffic(name, balance="round_robin", breaker=at_once, outlier=QUICK)
            )
            assert {who(hosts.web, name) for _ in range(3)} == {"api-1"}
            assert value(hosts.web, "meshnet_service_panic", service=service) == 1
            assert is_ejected(hosts, name, "api-1")
    process = hosts.sidecar(hosts.web).process
    assert process is not None
    assert (
        f"{service} has no endpoint left that is well: those that are ejected or fail checks are used" in process.output
    )


@pytest.mark.parametrize("how", ["outlier", "breaker", "checks"])
@pytest.mark.produces("endpoint.ejected")
def test_on_eject_close_ends_what_is_open_to_it_and_keep_does_not(hosts: Hosts, name: Name, how: str) -> None:
    breaker = {"failures": 1, "openTime": "60s"} if how == "breaker" else NEVER_IN_A_ROW
    outlier = QUICK if how == "outlier" else {"failureShare": 0}
    policy = {"balance": "round_robin", "breaker": breaker, "outlier": outlier}
    if how == "checks":
        policy |= {"check": {"interval": "100ms", "timeout": "500ms", "rise": 2, "fall": 2}}
    service = hosts.service(name, hosts.apis)
    hosts.write(service, traffic(name, **policy))
    with hosts.apps(name.port, hosts.apis) as apps, Call(hosts.web, hosts.apis[0].address, name.port) as held:
        hosts.write(service, traffic(name, **policy, onEject="close"))
        out = Records(hosts.sidecar(hosts.web))
        assert held.say("here") == "here"
        apps["api-1"].refuse()

        def ended() -> bool:
            who(hosts.web, name)
            try:
                return not held.say("still")
            except ConnectionResetError:
                return True

        wait_for(ended, what="the end of what was open")
        wait_for(lambda: all(record.reason for record in out.now()), what="the end of each call")
        connections = hosts.sidecar(hosts.web).connections()
        mine = [each for each in connections if each.reason and each.reason.code == "endpoint.ejected"]
        mine = [each for each in mine if each.endpoint == f"{hosts.apis[0].address}:{name.port}"]
        assert [reason(each) for each in mine] == ["endpoint.ejected by policy in data"]
        assert mine[0].bytes_sent > 0


def test_on_eject_close_holds_where_the_relay_has_dialled_by_itself(hosts: Hosts, name: Name) -> None:
    policy = {"breaker": {"failures": 1, "openTime": "60s"}, "connect": {"attempts": 1}, "onEject": "close"}
    hosts.write(hosts.service(name, hosts.apis[:1]), traffic(name, **policy))
    with hosts.apps(name.port, hosts.apis[:1]) as apps, Call(hosts.web, name) as held:
        for _ in range(3):  # the next ones are under an order
            assert who(hosts.web, name) == "api-1"
        assert held.say("here") == "here"
        apps["api-1"].refuse()
        assert is_reset(hosts.web, name)

        def ended() -> bool:
            try:
                return not held.say("still")
            except ConnectionResetError:
                return True

        wait_for(ended, what="the end of what was open")


def test_a_service_of_two_has_no_outliers(hosts: Hosts, name: Name) -> None:
    policy = traffic(name, balance="round_robin", breaker=NEVER_IN_A_ROW, outlier=QUICK, connect={"attempts": 1})
    hosts.write(hosts.service(name, hosts.apis[:2]), policy)
    with hosts.apps(name.port, hosts.apis[1:2]):
        refused = 0
        for _ in range(20):
            try:
                assert who(hosts.web, name) == "api-2"
            except ConnectionResetError:
                refused += 1
        assert refused == 10
        assert not is_ejected(hosts, name, "api-1")
