"""An endpoint that fails in a row is left alone for a while, then asked by one connection."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from meshnet.model.admin import EndpointView
from tests.proxy.metrics import value
from tests.proxy.programs import Records, read, reason, reset
from tests.traffic.calls import Call, is_reset, waiting, who
from tests.traffic.conftest import Hosts, Name, access, traffic
from tests.world import Host, stand_still, wait_for

pytestmark = pytest.mark.netns

ONCE = {"attempts": 1}


def breaker(hosts: Hosts, name: Name, state: str) -> EndpointView:
    """Waits until the breaker of api-1 is so."""
    views = wait_for(
        lambda: [view for view in [hosts.endpoints(name)["api-1"]] if view.breaker == state], what=f"breaker {state}"
    )
    return views[0]


@contextmanager
def stopped(hosts: Hosts, host: Host) -> Iterator[None]:
    """The host's sidecar stands still in the block."""
    process = hosts.sidecar(host).process
    assert process is not None
    stand_still(process.pid)
    try:
        yield
    finally:
        process.popen.send_signal(signal.SIGCONT)


def test_failures_in_a_row_open_it_and_one_success_closes_it(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]), traffic(name, connect=ONCE, breaker={"openTime": "500ms", "jitter": 0}))
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(api))
    for failures in range(1, 6):
        assert is_reset(hosts.web, name)
        assert hosts.endpoints(name)["api-1"].failures == failures
    view = hosts.endpoints(name)["api-1"]
    assert (view.breaker, view.state) == ("open", "open")
    assert 0 < view.open_for_seconds <= 0.5
    assert view.last_error.startswith("connect.refused")
    assert is_reset(hosts.web, name)
    *failed, fast = out.ended(6)
    assert {reason(record) for record in failed} == {"connect.refused by peer-proxy in connect"}
    assert reason(fast).startswith("breaker.open by proxy")
    assert fast.attempts == ()
    assert fast.duration_ms < 100
    assert hosts.logged(hosts.web, fast.id).reason == fast.reason
    explained = hosts.sidecar(hosts.web).meshnet("explain", fast.id)
    assert f"passed over: {api.address}:{name.port}: its breaker is open for 0." in explained
    assert len(into.ended(5)) == 5  # the sixth was not asked of its host

    counted = {"service": f"{name.name}:{name.port}"}
    assert breaker(hosts, name, "half-open").state == "half-open"
    assert value(hosts.web, "meshnet_endpoints", state="half-open", **counted) == 1
    assert value(hosts.web, "meshnet_endpoints", state="ejected", **counted) == 0
    with hosts.apps(name.port, [api]):
        assert who(hosts.web, name) == "api-1"
        assert breaker(hosts, name, "closed").failures == 0
        assert {who(hosts.web, name) for _ in range(3)} == {"api-1"}


def test_an_endpoint_that_is_taken_out_and_put_back_finds_its_breaker_as_it_was(hosts: Hosts, name: Name) -> None:
    policy = traffic(name, connect=ONCE, breaker={"failures": 1, "openTime": "60s", "jitter": 0})
    hosts.write(hosts.service(name, hosts.apis[:2]), policy)
    assert is_reset(hosts.web, hosts.apis[0].address, name.port)
    assert breaker(hosts, name, "open").failures == 1
    hosts.write(hosts.service(name, hosts.apis[1:2]), policy)
    hosts.write(hosts.service(name, hosts.apis[:2]), policy)
    assert 0 < breaker(hosts, name, "open").open_for_seconds < 60


def test_every_figure_of_an_endpoint_is_a_metric_too(hosts: Hosts, name: Name) -> None:
    policy = traffic(name, connect=ONCE, breaker={"failures": 2, "openTime": "60s"})
    hosts.write(hosts.service(name, hosts.apis[:2], weights=[3, 1]), policy)
    first, second = hosts.apis[:2]

    def told(figure: str, host: Host) -> float:
        labels = {"service": f"{name.name}:{name.port}", "endpoint": f"{host.address}:{name.port}"}
        return value(hosts.web, f"meshnet_endpoint_{figure}", **labels)

    with hosts.apps(name.port, [first]), Call(hosts.web, first.address, name.port):
        assert all(is_reset(hosts.web, second.address, name.port) for _ in range(2))
        views = hosts.endpoints(name)
        for host in (first, second):
            view = views[host.name]
            assert told("weight", host) == view.weight
            assert told("connections", host) == view.connections == (host is first)
            assert told("pending", host) == view.pending == 0
            assert told("failures", host) == view.failures == (0 if host is first else 2)
            assert told("open_for_seconds", host) <= view.open_for_seconds + 0.1  # rounded, and before
            assert told("ejected_for_seconds", host) == view.ejected_for_seconds == 0
        assert told("open_for_seconds", second) > 30
        assert told("connect_seconds", first) * 1000 == pytest.approx(views[first.name].connect_ms, abs=0.001)


def test_a_failed_probe_opens_it_for_twice_as_long(hosts: Hosts, name: Name) -> None:
    hosts.write(
        hosts.service(name, hosts.apis[:1]),
        traffic(name, connect=ONCE, breaker={"failures": 1, "openTime": "1s", "jitter": 0}),
    )
    assert is_reset(hosts.web, name)
    assert 0 < breaker(hosts, name, "open").open_for_seconds <= 1
    breaker(hosts, name, "half-open")
    assert is_reset(hosts.web, name)
    assert 1 < breaker(hosts, name, "open").open_for_seconds <= 2


def test_half_open_lets_one_connection_through(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    hosts.write(
        hosts.service(name, [api]),
        traffic(
            name,
            connect={"attempts": 1, "attemptTimeout": "10s", "totalTimeout": "10s"},
            breaker={"failures": 1, "openTime": "10ms"},
        ),
    )
    assert is_reset(hosts.web, name)
    breaker(hosts, name, "half-open")
    out = Records(hosts.sidecar(hosts.web))
    with hosts.apps(name.port, [api]):
        with stopped(hosts, api):
            probe = waiting(hosts.web, name)
            wait_for(lambda: hosts.endpoints(name)["api-1"].pending == 1)
            assert is_reset(hosts.web, name)
            assert [reason(record).split()[0] for record in out.now() if record.reason] == ["breaker.open"]
        with probe:
            assert read(probe, 5) == b"api-1"
        assert breaker(hosts, name, "closed").failures == 0


def test_a_broken_endpoint_is_nobodys_trouble_while_others_serve(hosts: Hosts, name: Name) -> None:
    hosts.write(
        hosts.service(name, hosts.apis),
        traffic(name, balance="round_robin", breaker={"failures": 2, "openTime": "60s"}),
    )
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(hosts.apis[0]))
    with hosts.apps(name.port, hosts.apis[1:]):
        assert {who(hosts.web, name) for _ in range(20)} == {"api-2", "api-3"}
    views = hosts.endpoints(name)
    assert {host: view.breaker for host, view in views.items()} == {
        "api-1": "open",
        "api-2": "closed",
        "api-3": "closed",
    }
    assert len(into.ended(2)) == len([record for record in out.ended(20) if len(record.attempts) == 2])


def test_a_denial_is_not_the_endpoints_failure(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    nobody = access("nobody", "DENY", name, source={"notPrincipals": [hosts.mesh.identity("web")]})
    hosts.write(hosts.service(name, [api]), nobody, traffic(name, breaker={"failures": 2}))
    out = Records(hosts.sidecar(hosts.cron))
    with hosts.apps(name.port, [api]):
        assert all(is_reset(hosts.cron, name) for _ in range(5))
    view = hosts.endpoints(name, hosts.cron)["api-1"]
    assert (view.breaker, view.failures) == ("closed", 0)
    for record in out.ended(5):
        assert [attempt.result for attempt in record.attempts] == ["authz.denied"]  # once: it is not tried elsewhere


def test_a_client_that_gives_up_is_not_the_endpoints_failure(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]), traffic(name, breaker={"failures": 2}))
    out = Records(hosts.sidecar(hosts.web))
    with hosts.apps(name.port, [api]):
        with stopped(hosts, hosts.web):  # so that they are gone before they are looked at
            for _ in range(5):
                reset(waiting(hosts.web, name))
        assert {reason(record).split(" in ")[0] for record in out.ended(5)} == {"peer.rst by client"}
        view = hosts.endpoints(name)["api-1"]
        assert (view.breaker, view.failures) == ("closed", 0)
        assert who(hosts.web, name) == "api-1"
