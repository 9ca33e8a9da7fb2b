"""Limits that protect the endpoint and breakers that protect the caller, on real connections."""

import socket

import pytest

from meshnet.model.connection import State
from meshnet.model.resource import (
    API_VERSION,
    BreakerSpec,
    ConnectSpec,
    LimitsSpec,
    Metadata,
    TrafficPolicy,
    TrafficPolicySpec,
)
from tests.proxy.conftest import API, Hosts
from tests.proxy.metrics import value
from tests.proxy.programs import Records, accept, converse, is_reset, listen, nobody_came, reason, reset
from tests.world import wait_for

pytestmark = pytest.mark.netns


def treat(hosts: Hosts, **spec: LimitsSpec | BreakerSpec | ConnectSpec) -> None:
    """Replaces the traffic policy of `api`."""
    policy = TrafficPolicySpec(services=("api",), **spec)  # type: ignore[arg-type]  # one type a field
    hosts.write(TrafficPolicy(api_version=API_VERSION, metadata=Metadata(name="patient"), spec=policy))


def test_a_connection_over_the_limit_waits_for_its_turn_and_says_how_long(hosts: Hosts) -> None:
    treat(hosts, limits=LimitsSpec(max_connections=1))
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server:
        first, app = hosts.web.connect(API, 8080), accept(server)
        second = hosts.web.connect(API, 8080)
        wait_for(lambda: [record.state for record in out.now()] == [State.OPEN, State.QUEUED])
        assert nobody_came(server)
        converse(first, app)
        converse(second, accept(server))
    went, waited = out.ended(2)
    assert went.queue_ms is None
    assert waited.queue_ms is not None
    assert 0 < waited.queue_ms <= waited.duration_ms
    assert reason(waited) == "ok by client in data"


@pytest.mark.produces("limit.queue_timeout")
def test_a_connection_that_waited_too_long_is_reset(hosts: Hosts) -> None:
    treat(hosts, limits=LimitsSpec(max_connections=1, queue_timeout="100ms"))
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server:
        first, app = hosts.web.connect(API, 8080), accept(server)
        assert is_reset(hosts.web, API, 8080)
        converse(first, app)
    refused = out.ended(2)[1]
    assert reason(refused) == "limit.queue_timeout by limit in queue"
    assert refused.state is State.REFUSED


@pytest.mark.produces("limit.connections")
def test_a_connection_for_which_the_queue_has_no_place_is_reset_at_once(hosts: Hosts) -> None:
    treat(hosts, limits=LimitsSpec(max_connections=1, max_pending=1))
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server:
        first, app = hosts.web.connect(API, 8080), accept(server)
        second = hosts.web.connect(API, 8080)
        wait_for(lambda: [record.state for record in out.now()] == [State.OPEN, State.QUEUED])
        assert is_reset(hosts.web, API, 8080)
        converse(first, app)
        converse(second, accept(server))
    assert sorted(reason(record) for record in out.ended(3)) == [
        "limit.connections by limit in queue",
        *["ok by client in data"] * 2,
    ]


def test_who_gave_up_in_the_queue_does_not_reach_the_application(hosts: Hosts) -> None:
    treat(hosts, limits=LimitsSpec(max_connections=1))
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server:
        first, app = hosts.web.connect(API, 8080), accept(server)
        second = hosts.web.connect(API, 8080)
        wait_for(lambda: [record.state for record in out.now()] == [State.OPEN, State.QUEUED])
        reset(second)
        converse(first, app)
        assert reason(out.ended(2)[1]) == "peer.rst by client in queue"
        assert nobody_came(server)


@pytest.mark.produces("breaker.open", "connect.refused")
def test_an_endpoint_that_fails_again_and_again_is_left_alone_and_then_asked_once(hosts: Hosts) -> None:
    treat(hosts, breaker=BreakerSpec(failures=3, open_time="300ms", jitter=0.0), connect=ConnectSpec(attempts=1))
    state = {"service": "api:8080", "endpoint": f"{hosts.api.address}:8080"}
    out = Records(hosts.sidecar(hosts.web))
    for _ in range(4):
        assert is_reset(hosts.web, API, 8080)
    assert [reason(record).partition(" ")[0] for record in out.ended(4)] == ["connect.refused"] * 3 + ["breaker.open"]
    assert value(hosts.web, "meshnet_breaker_state", **state) == 2
    with listen(hosts.api, 8080) as server:
        wait_for(lambda: value(hosts.web, "meshnet_breaker_state", **state) == 1)
        converse(hosts.web.connect(API, 8080), accept(server))
    assert value(hosts.web, "meshnet_breaker_state", **state) == 0


def test_a_client_that_half_closes_in_the_queue_is_served_in_its_turn(hosts: Hosts) -> None:
    treat(hosts, limits=LimitsSpec(max_connections=1))
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server:
        first, app = hosts.web.connect(API, 8080), accept(server)
        second = hosts.web.connect(API, 8080)
        second.sendall(b"all I say")
        second.shutdown(socket.SHUT_WR)
        wait_for(lambda: [record.state for record in out.now()] == [State.OPEN, State.QUEUED])
        converse(first, app)
        with second, accept(server) as late:
            assert late.recv(100) == b"all I say"
            assert late.recv(1) == b""
