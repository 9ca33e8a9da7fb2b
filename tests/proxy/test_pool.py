"""Tunnels are kept between connections: a handshake is paid per peer, and a stale tunnel costs nobody anything."""

import signal

import pytest

from meshnet.model.connection import Security, TlsView
from meshnet.model.resource import API_VERSION, ConnectSpec, Metadata, TrafficPolicy, TrafficPolicySpec
from tests.proxy.conftest import API, PAIR, Hosts
from tests.proxy.programs import Records, accept, ask, converse, echo, is_reset, listen, read, reason, reset, stopped
from tests.world import Host, wait_for

pytestmark = pytest.mark.netns


@pytest.fixture(autouse=True)
def no_tunnels(hosts: Hosts) -> None:
    """Each test begins with a `web` that has no tunnels and remembers no sessions."""
    sidecar = hosts.sidecar(hosts.web)
    sidecar.stop()
    sidecar.start()


def tunnels(hosts: Hosts, peer: Host) -> tuple[int, int]:
    """How many idle and leased tunnels `web` has to `peer`."""
    found = [each for each in hosts.sidecar(hosts.web).status().tunnels if each.peer.startswith(f"{peer.address}:")]
    return (found[0].idle, found[0].leased) if found else (0, 0)


def test_fifty_connections_one_after_the_other_pay_one_handshake(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with echo(hosts.api, 8080):
        for _ in range(50):
            assert ask(hosts.web, API, 8080) == b"question"
            # The client has its end a moment before the tunnel is back in the pool.
            wait_for(lambda: tunnels(hosts, hosts.api) == (1, 0))
    first, *others = out.ended(50)
    assert first.tls.handshake_ms is not None
    assert first.tls.handshake_ms > 0
    assert first.tls.resumed is False
    assert {record.tls.handshake_ms for record in others} == {None}
    assert tunnels(hosts, hosts.api) == (1, 0)


def test_connections_at_the_same_time_have_a_tunnel_each_and_later_handshakes_are_resumed(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server:
        converse(hosts.web.connect(API, 8080), accept(server))
        out.one()
        clients = [hosts.web.connect(API, 8080) for _ in range(3)]
        apps = [accept(server) for _ in clients]
        wait_for(lambda: tunnels(hosts, hosts.api) == (0, 3))
        for client, app in zip(clients, apps, strict=True):
            client.close()
            app.close()
    _, *others = out.ended(4)
    resumed = [record.tls.resumed for record in others if record.tls.handshake_ms is not None]
    assert resumed == [True, True]
    wait_for(lambda: tunnels(hosts, hosts.api) == (3, 0))


def test_a_burst_to_a_new_peer_resumes_the_session_of_a_connection_that_is_still_open(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server:
        clients, apps = [], []
        for _ in range(10):
            clients.append(hosts.web.connect(API, 8080))
            apps.append(accept(server))
        for client, app in zip(clients, apps, strict=True):
            converse(client, app)
    resumed = [record.tls.resumed for record in out.ended(10)]
    assert not resumed[0]
    assert sum(resumed) >= 5, "a few that were made ahead may have begun before there was a ticket"


def test_a_tunnel_is_used_again_after_a_connection_that_was_reset(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server:
        for _ in range(3):
            client = hosts.web.connect(API, 8080)
            app = accept(server)
            reset(client)
            with app, pytest.raises(ConnectionResetError):
                app.recv(1)
            wait_for(lambda: tunnels(hosts, hosts.api) == (1, 0))
    assert [record.tls.handshake_ms is None for record in out.ended(3)] == [False, True, True]


def test_a_tunnel_is_used_again_after_a_connection_that_the_peer_refused(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    assert is_reset(hosts.web, API, 8080)  # no application listens
    with echo(hosts.api, 8080):
        assert ask(hosts.web, API, 8080) == b"question"
    refused, answered = out.ended(2)
    assert reason(refused) == "connect.refused by peer-proxy in connect"
    assert [attempt.result for attempt in refused.attempts] == ["connect.refused"] * 3
    assert reason(answered) == "ok by client in data"
    assert answered.tls.handshake_ms is None
    assert tunnels(hosts, hosts.api) == (1, 0)


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_a_peer_sidecar_that_was_restarted_costs_no_connection(hosts: Hosts, by: signal.Signals) -> None:
    sidecar = hosts.sidecar(hosts.api)
    with listen(hosts.api, 8080) as server:
        for client, app in [(hosts.web.connect(API, 8080), accept(server)) for _ in range(5)]:
            converse(client, app)
        wait_for(lambda: tunnels(hosts, hosts.api) == (5, 0))
        assert sidecar.process is not None
        sidecar.process.popen.send_signal(by)
        sidecar.process.popen.wait()
        sidecar.start()
        out = Records(hosts.sidecar(hosts.web))
        for _ in range(5):
            converse(hosts.web.connect(API, 8080), accept(server))
    assert {reason(record) for record in out.ended(5)} == {"ok by client in data"}
    assert {len(record.attempts) for record in out.ended(5)} == {1}


def test_a_peer_sidecar_that_does_not_answer_is_given_its_time_and_not_more(hosts: Hosts) -> None:
    hosts.write(
        TrafficPolicy(
            api_version=API_VERSION,
            metadata=Metadata(name="patient"),
            spec=TrafficPolicySpec(services=("api",), connect=ConnectSpec(attempt_timeout="100ms", attempts=2)),
        )
    )
    out = Records(hosts.sidecar(hosts.web))
    with echo(hosts.api, 8080):
        assert ask(hosts.web, API, 8080) == b"question"
        wait_for(lambda: tunnels(hosts, hosts.api) == (1, 0))
        with stopped(hosts.sidecar(hosts.api)):
            assert is_reset(hosts.web, API, 8080)
        assert ask(hosts.web, API, 8080) == b"question"
    _, unanswered, _ = out.ended(3)
    # A kept tunnel on which nobody answers, then a new one on which nobody shakes hands.
    assert [attempt.result for attempt in unanswered.attempts] == ["connect.timeout", "tls.handshake"]
    assert unanswered.attempts[0].detail == "the peer sidecar did not answer OPEN within 0.1 s"
    assert 100 <= unanswered.attempts[0].ms < 1000
    # Of the first one's tunnel nothing is left: the connection ended without one.
    assert (unanswered.tls, unanswered.destination.identity) == (TlsView(mode=Security.NONE), "")


def test_an_open_connection_outlives_the_stop_of_its_peer_sidecar_within_the_drain_time(hosts: Hosts) -> None:
    sidecar = hosts.sidecar(hosts.api)
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server, hosts.web.connect(API, 8080) as client, accept(server) as app:
        out.open()
        assert sidecar.process is not None
        sidecar.process.popen.terminate()
        wait_for(lambda: sidecar.status().draining)
        converse(client, app)
        assert sidecar.process.popen.wait(5) == 0
    assert reason(out.one()) == "ok by client in data"
    sidecar.start()


def test_while_one_endpoint_s_sidecar_restarts_clients_see_no_error(hosts: Hosts) -> None:
    # The breaker is what keeps retries within their budget, so here it has its usual settings.
    usual = TrafficPolicySpec(services=("api", "pair"))
    hosts.write(TrafficPolicy(api_version=API_VERSION, metadata=Metadata(name="patient"), spec=usual))
    out = Records(hosts.sidecar(hosts.web))
    sidecar = hosts.sidecar(hosts.api)
    count = 0

    def ask_ten() -> None:
        nonlocal count
        for _ in range(10):
            assert ask(hosts.web, PAIR, 7000) == b"question"
            count += 1

    with echo(hosts.api, 7000), echo(hosts.twin, 7000):
        ask_ten()
        assert sidecar.process is not None
        sidecar.process.popen.terminate()
        while sidecar.process.alive:
            ask_ten()
        ask_ten()
        sidecar.spawn()
        while not sidecar.host.listens(15108):
            ask_ten()
        sidecar.wait_until_ready()
        ask_ten()
    assert {reason(record) for record in out.ended(count)} == {"ok by client in data"}


def test_a_tunnel_that_dies_while_it_is_leased_is_reset_at_the_client(hosts: Hosts) -> None:
    sidecar = hosts.sidecar(hosts.api)
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server, hosts.web.connect(API, 8080) as client, accept(server) as app:
        client.sendall(b"x")
        assert read(app, 1) == b"x"
        assert sidecar.process is not None
        sidecar.process.kill()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert reason(out.one()) == "tunnel.lost by peer-proxy in data"
    sidecar.start()
