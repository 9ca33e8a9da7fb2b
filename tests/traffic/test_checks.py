"""Active checks: who fails them gets no connections, unless all do; nobody sees them as connections."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from meshnet.model.admin import EndpointView
from tests.proxy.metrics import value
from tests.proxy.programs import Records, listen, stopped
from tests.traffic.app import App
from tests.traffic.calls import Call, who
from tests.traffic.conftest import Hosts, Name, access, traffic
from tests.world import wait_for

pytestmark = pytest.mark.netns

QUICK = {"interval": "100ms", "timeout": "500ms", "rise": 2, "fall": 2}


def views(hosts: Hosts, name: Name, *checks: str) -> list[EndpointView]:
    """Waits until the apis' checks, in their order, are so."""

    def found() -> list[EndpointView]:
        known = hosts.endpoints(name)
        there = [known[host.name] for host in hosts.apis if host.name in known]
        return there if [view.check for view in there] == list(checks) else []

    return wait_for(found, what=f"checks {checks}")


def log(hosts: Hosts) -> str:
    process = hosts.sidecar(hosts.web).process
    assert process is not None
    return process.output


def test_an_endpoint_that_fails_its_checks_gets_no_connections_until_they_pass_again(hosts: Hosts, name: Name) -> None:
    first, *others = hosts.apis
    policy = traffic(name, balance="round_robin", check=QUICK, slowStart={"window": "1ms"})
    hosts.write(hosts.service(name, hosts.apis), policy)
    out = Records(hosts.sidecar(hosts.web))
    with hosts.apps(name.port, others):
        failing, *_ = views(hosts, name, "failing", "passing", "passing")
        assert failing.check_error.startswith("connect.refused: ")
        assert (failing.breaker, failing.failures) == ("closed", 0)
        assert {who(hosts.web, name) for _ in range(6)} == {"api-2", "api-3"}
        assert all(len(record.attempts) == 1 for record in out.ended(6))
        assert value(hosts.web, "meshnet_endpoints", service=f"{name.name}:{name.port}", state="failing") == 1
        assert value(hosts.web, "meshnet_endpoints", service=f"{name.name}:{name.port}", state="healthy") == 2
        explained = hosts.sidecar(hosts.web).meshnet("explain", f"{name.address}:{name.port}")
        assert "its checks fail: connect.refused" in explained
        with App(first, name.port):
            views(hosts, name, "passing", "passing", "passing")
            assert {who(hosts.web, name) for _ in range(6)} == {"api-1", "api-2", "api-3"}
    said = f"{first.address}:{name.port} of {name.name}:{name.port}"
    assert log(hosts).count(f"{said} fails its checks: connect.refused") == 1
    assert log(hosts).count(f"{said} passes its checks again") == 1
    table = hosts.sidecar(hosts.web).meshnet("endpoints", name.name, "--columns", "endpoint,check", "--no-header")
    assert len(table.splitlines()) == 3


def test_an_endpoint_that_passes_its_checks_again_starts_slowly(hosts: Hosts, name: Name) -> None:
    first, *others = hosts.apis
    hosts.write(hosts.service(name, hosts.apis), traffic(name, check=QUICK, slowStart={"window": "1h"}))
    with hosts.apps(name.port, others):
        views(hosts, name, "failing", "passing", "passing")
        with App(first, name.port):
            views(hosts, name, "passing", "passing", "passing")
            explained = hosts.sidecar(hosts.web).meshnet("explain", f"{name.address}:{name.port}").splitlines()
            (warming,) = (line for line in explained if "of it while it is warming" in line)
            assert f"{first.address}:{name.port}" in warming
            assert "10% of it" in warming


def test_when_all_fail_all_are_used_and_it_is_said(hosts: Hosts, name: Name) -> None:
    hosts.write(hosts.service(name, hosts.apis), traffic(name, check=QUICK | {"expect": "nobody says this"}))
    with hosts.apps(name.port, hosts.apis):
        views(hosts, name, "panic", "panic", "panic")
        assert who(hosts.web, name) in ("api-1", "api-2", "api-3")
    assert value(hosts.web, "meshnet_check_panic", service=f"{name.name}:{name.port}") == 1
    assert (
        log(hosts).count(f"every endpoint of {name.name}:{name.port} fails its checks: they are used all the same") == 1
    )


def test_open_connections_of_an_endpoint_that_fails_stay(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, hosts.apis), traffic(name, check=QUICK))
    with hosts.apps(name.port, hosts.apis[1:]), App(api, name.port) as app:
        views(hosts, name, "passing", "passing", "passing")
        held = Call(hosts.web, api.address, name.port)
        app.refuse()
        views(hosts, name, "failing", "passing", "passing")
        assert held.say("still here") == "still here"
        held.close()


def test_who_names_an_endpoint_gets_it_whatever_its_checks_say(hosts: Hosts, name: Name) -> None:
    hosts.write(hosts.service(name, hosts.apis), traffic(name, check=QUICK | {"send": "?", "expect": "1"}))
    with echoes(hosts, name, b"0", b"1", b"1"):
        views(hosts, name, "failing", "passing", "passing")
        with hosts.web.connect(hosts.apis[0].address, name.port) as client:
            client.sendall(b"?")
            assert client.recv(1) == b"0"


@contextmanager
def echoes(hosts: Hosts, name: Name, *answers: bytes) -> Iterator[None]:
    """Each of the apis answers whatever it is asked with one of these."""
    servers = [listen(host, name.port) for host in hosts.apis]

    def serve(server: socket.socket, answer: bytes) -> None:
        while True:
            try:
                app, _ = server.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            with app:
                app.settimeout(5)
                try:
                    if app.recv(64):
                        app.sendall(answer)
                except OSError:
                    pass

    threads = [threading.Thread(target=serve, args=pair, daemon=True) for pair in zip(servers, answers, strict=True)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for server in servers:
            server.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for server in servers:
            server.close()


@pytest.mark.parametrize("meshed", [True, False])
def test_what_is_sent_and_expected_decides_through_a_tunnel_and_in_plain_text(
    hosts: Hosts, name: Name, meshed: bool
) -> None:
    service = hosts.mesh.service(name.name, [name.port], hosts.apis, addresses=[name.address], meshed=meshed)
    hosts.write(service, traffic(name, check=QUICK | {"send": "PING\r\n", "expect": "+PONG"}))
    with echoes(hosts, name, b"+PONG\r\n", b"-LOADING\r\n", b""):
        _, wrong, silent = views(hosts, name, "passing", "failing", "failing")
        assert "answered '-LOADING\\r\\n', not what is expected" in wrong.check_error
        assert "did not answer" in silent.check_error


def test_checks_leave_no_record_on_either_side_and_take_no_place(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    hosts.write(
        hosts.service(name, [api]), traffic(name, check=QUICK, limits={"maxConnections": 1, "queueTimeout": "100ms"})
    )
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(api))
    before = hosts.sidecar(api).status().opened_total
    with hosts.apps(name.port, [api]):
        passed = partial(value, hosts.web, "meshnet_checks_total", result="passed")
        enough = passed() + 5
        wait_for(lambda: passed() >= enough, what="five more checks")
        assert value(api, "meshnet_checks_answered_total") >= 5
        assert out.now() == into.now() == []
        assert hosts.sidecar(api).status().opened_total == before
        with Call(hosts.web, name) as call:
            enough = passed() + 5
            wait_for(lambda: passed() >= enough, what="five more checks beside a connection")
            assert call.server == "api-1"
            assert hosts.endpoints(name)["api-1"].connections == 1


def test_checks_go_on_beside_connections_that_the_relay_carries_by_itself(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]), traffic(name, check=QUICK))
    passed = partial(value, hosts.web, "meshnet_checks_total", result="passed")
    failed = partial(value, hosts.web, "meshnet_checks_total", result="failed")
    ordered = partial(value, api, "meshnet_ordered_connections_total")
    with hosts.apps(name.port, [api]):
        views(hosts, name, "passing")
        assert who(hosts.web, name) == "api-1"
        before, failures, enough = ordered(), failed(), passed() + 10
        while passed() < enough or ordered() < before + 10:
            assert who(hosts.web, name) == "api-1"
        assert failed() == failures


def test_what_says_nothing_about_the_endpoint_changes_nothing(hosts: Hosts, name: Name) -> None:
    nobody = access("nobody", "DENY", name, source={"notPrincipals": [hosts.mesh.identity("cron")]})
    service = hosts.service(name, hosts.apis[:1])
    with hosts.apps(name.port, hosts.apis[:1]):
        hosts.write(service, nobody)  # everywhere, before the first check asks
        hosts.write(service, nobody, traffic(name, check=QUICK))
        undecided = partial(value, hosts.web, "meshnet_checks_total", result="undecided")
        enough = undecided() + 4
        wait_for(lambda: undecided() >= enough, what="checks that policy forbids")
        (view,) = views(hosts, name, "")
        assert view.check_error.startswith("authz.denied: ")


def test_a_sidecar_that_stands_still_fails(hosts: Hosts, name: Name) -> None:
    api, other = hosts.apis[:2]
    hosts.write(hosts.service(name, [api, other]), traffic(name, check=QUICK))
    with hosts.apps(name.port, [api, other]):
        views(hosts, name, "passing", "passing")
        with stopped(hosts.sidecar(api)):
            wait_for(lambda: "failing" in _checks(hosts, name), what="it fails its checks")
            assert {who(hosts.web, name) for _ in range(3)} == {"api-2"}
        views(hosts, name, "passing", "passing")


def _checks(hosts: Hosts, name: Name) -> list[str]:
    return [view.check for view in hosts.endpoints(name).values()]


def test_where_no_other_will_do_one_that_fails_its_checks_is_tried(hosts: Hosts, name: Name) -> None:
    hosts.write(
        hosts.service(name, hosts.apis[:2]),
        traffic(name, check=QUICK | {"expect": "api-2"}, limits={"maxConnectionsPerEndpoint": 1}),
    )
    with hosts.apps(name.port, hosts.apis[:2]):
        views(hosts, name, "failing", "passing")
        with Call(hosts.web, name) as first, Call(hosts.web, name) as second:
            assert (first.server, second.server) == ("api-2", "api-1")
    assert f"{name.name}:{name.port} has no endpoint left that is well" in log(hosts)


def test_checks_end_with_the_policy_that_asked_for_them(hosts: Hosts, name: Name) -> None:
    service = hosts.service(name, hosts.apis)
    hosts.write(service, traffic(name, check=QUICK))
    views(hosts, name, "panic", "panic", "panic")
    hosts.write(service)
    views(hosts, name, "", "", "")
