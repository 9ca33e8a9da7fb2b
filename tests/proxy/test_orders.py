"""Standing orders: what was decided once is done for every connection of a flow, until something that mattered changes.

Plain connections from `web` to `outside`, which has no sidecar, and from `outside` to `api`, on real kernel rules.
"""

import socket

import msgspec
import pytest

from meshnet.model.connection import Connection, Direction, State
from meshnet.model.resource import (
    API_VERSION,
    AccessPolicy,
    AccessPolicySpec,
    BreakerSpec,
    ConnectSpec,
    LimitsSpec,
    Metadata,
    TrafficPolicy,
    TrafficPolicySpec,
)
from meshnet.model.service import Action, Rule, Source
from tests.proxy.conftest import PLAIN, Hosts
from tests.proxy.metrics import value
from tests.proxy.programs import (
    Records,
    accept,
    ask,
    converse,
    echo,
    ended_by_rst,
    is_reset,
    listen,
    nobody_came,
    read,
    reason,
)
from tests.proxy.test_records import logged
from tests.world import Host, wait_for

pytestmark = pytest.mark.netns

FRAIL = "10.96.0.50"


def by_order(host: Host) -> float:
    return value(host, "meshnet_ordered_connections_total")


def limit(hosts: Hosts, limits: LimitsSpec) -> None:
    policy = TrafficPolicySpec(services=("plain",), limits=limits)
    hosts.write(TrafficPolicy(api_version=API_VERSION, metadata=Metadata(name="plain"), spec=policy))


def told(connection: Connection) -> dict[str, object]:
    """What does not differ from one connection of a flow to the next."""
    own = {"id", "openedAt", "closedAt", "durationMs", "connectMs", "idleMs", "attempts", "legPort", "ordered"}
    fields = {name: value for name, value in msgspec.to_builtins(connection).items() if name not in own}
    fields["source"] = {**fields["source"], "address": connection.source.address.rpartition(":")[0]}
    return fields | {"tried": [(attempt.endpoint, attempt.result) for attempt in connection.attempts]}


def test_what_an_order_did_is_told_as_what_was_decided(hosts: Hosts) -> None:
    before, out = by_order(hosts.web), Records(hosts.sidecar(hosts.web))
    with listen(hosts.outside, 6000) as server:
        for _ in range(4):
            converse(hosts.web.connect(PLAIN, 6000), accept(server))
    decided, *ordered = out.ended(4)
    assert by_order(hosts.web) - before == 3
    assert [each.ordered for each in (decided, *ordered)] == [False, True, True, True]
    for connection in ordered:
        assert told(connection) == told(decided)
        assert connection.duration_ms >= (connection.connect_ms or 0) > 0
        assert connection.closed_at >= connection.opened_at >= decided.opened_at
    assert len({connection.id for connection in (decided, *ordered)}) == 4


def test_the_same_for_what_comes_in_in_plain_text(hosts: Hosts) -> None:
    before, came = by_order(hosts.api), Records(hosts.sidecar(hosts.api))
    with listen(hosts.api, 8080) as server:
        for _ in range(3):
            converse(hosts.outside.connect(hosts.api.address, 8080), accept(server))
    decided, *ordered = came.ended(3)
    assert by_order(hosts.api) - before == 2
    assert decided.direction is Direction.INBOUND
    assert [told(connection) for connection in ordered] == [told(decided)] * 2


def test_every_count_agrees(hosts: Hosts) -> None:
    names = ("opened_total", "closed_total", "failed_total")
    metrics = [f"meshnet_tcp_connections_{name}" for name in names]

    def counts() -> list[float]:
        sent, received = (f"meshnet_tcp_{way}_bytes_total" for way in ("sent", "received"))
        return [value(hosts.web, name, destination_service="plain:6000") for name in (*metrics, sent, received)]

    before, status = counts(), hosts.sidecar(hosts.web).status()
    out = Records(hosts.sidecar(hosts.web))
    with echo(hosts.outside, 6000) as served:
        for _ in range(50):
            assert ask(hosts.web, PLAIN, 6000) == b"question"
        assert served() == 50
    wait_for(lambda: hosts.sidecar(hosts.web).status().open_connections == 0, what="the last one has ended")
    after = hosts.sidecar(hosts.web).status()
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [50, 50, 0, 400, 400]
    assert (after.opened_total - status.opened_total, after.failed_total - status.failed_total) == (50, 0)
    ids = [each.id for each in out.ended(50)]
    wait_for(lambda: set(ids) <= {line.id for line in logged(hosts, hosts.web)}, what="a line of each")
    assert len([line for line in logged(hosts, hosts.web) if line.id in ids]) == 50


def test_one_that_stays_open_is_seen_and_explained(hosts: Hosts) -> None:
    with listen(hosts.outside, 6000) as server:
        converse(hosts.web.connect(PLAIN, 6000), accept(server))
        out = Records(hosts.sidecar(hosts.web))
        client, app = hosts.web.connect(PLAIN, 6000), accept(server)
        client.sendall(b"12345")
        assert read(app, 5) == b"12345"
        (connection,) = out.open()
        assert (connection.state, connection.bytes_sent, connection.relay) == (State.OPEN, 5, "native")
        assert value(hosts.web, "meshnet_tcp_connections_open", destination_service="plain:6000") == 1
        said = hosts.sidecar(hosts.web).meshnet("explain", connection.id)
        assert "order: decided before" in said
        converse(client, app)
    assert out.one().bytes_sent == 5 + len(b"question")


def test_an_order_ends_with_the_mesh_that_it_was_decided_by(hosts: Hosts) -> None:
    """The service moves to another host: not one connection more goes to the old one."""
    with listen(hosts.outside, 6000) as old, listen(hosts.twin, 6000) as new:
        for _ in range(2):
            converse(hosts.web.connect(PLAIN, 6000), accept(old))
        hosts.write(hosts.mesh.service("plain", [6000], [hosts.twin], addresses=[PLAIN], meshed=False))
        for _ in range(3):
            converse(hosts.web.connect(PLAIN, 6000), accept(new))
        assert nobody_came(old)


def test_policy_that_forbids_it_ends_the_order_and_what_it_began(hosts: Hosts) -> None:
    deny = AccessPolicy(
        api_version=API_VERSION,
        metadata=Metadata(name="nobody"),
        spec=AccessPolicySpec(action=Action.DENY, rules=(Rule(source=Source(ip_blocks=(hosts.outside.address,))),)),
    )
    with listen(hosts.api, 8080) as server:
        converse(hosts.outside.connect(hosts.api.address, 8080), accept(server))
        came = Records(hosts.sidecar(hosts.api))
        client, app = hosts.outside.connect(hosts.api.address, 8080), accept(server)
        hosts.write(deny)
        with client, app:
            assert ended_by_rst(client)
            assert ended_by_rst(app)
        assert is_reset(hosts.outside, hosts.api.address, 8080)
        assert nobody_came(server)
    assert [reason(each).partition(" ")[0] for each in came.ended(2)] == ["authz.revoked", "authz.denied"]


def test_an_endpoint_that_refuses_is_tried_again_by_the_rules_and_its_breaker_opens(hosts: Hosts) -> None:
    frail = hosts.mesh.service("frail", [6100], [hosts.outside], addresses=[FRAIL], meshed=False)
    settings = TrafficPolicySpec(
        services=("frail",), connect=ConnectSpec(attempts=2), breaker=BreakerSpec(failures=2, open_time="60s")
    )
    hosts.write(frail, TrafficPolicy(api_version=API_VERSION, metadata=Metadata(name="frail"), spec=settings))
    with listen(hosts.outside, 6100) as server:
        for _ in range(2):
            converse(hosts.web.connect(FRAIL, 6100), accept(server))
    out = Records(hosts.sidecar(hosts.web))
    assert is_reset(hosts.web, FRAIL, 6100)
    failed = out.one()
    assert reason(failed) == "connect.refused by proxy in connect"
    assert [attempt.result for attempt in failed.attempts] == ["connect.refused"] * 2, "the first by the order"
    assert is_reset(hosts.web, FRAIL, 6100)
    assert reason(out.ended(2)[1]).startswith("breaker.open")


def test_an_endpoint_that_comes_back_in_time_costs_nobody_a_connection(hosts: Hosts) -> None:
    with listen(hosts.outside, 6000) as server:
        for _ in range(2):
            converse(hosts.web.connect(PLAIN, 6000), accept(server))
    out = Records(hosts.sidecar(hosts.web))
    server = hosts.outside.open_socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("0.0.0.0", 6000))  # refuses until it listens
    server.settimeout(5)
    with server, hosts.web.connect(PLAIN, 6000) as client:
        client.sendall(b"early")
        wait_for(lambda: [attempt.result for each in out.now() for attempt in each.attempts] or None)
        server.listen()
        with accept(server) as app:
            assert read(app, 5) == b"early"
    recovered = out.one()
    assert [attempt.result for attempt in recovered.attempts][-1] == "ok"
    assert recovered.attempts[0].result == "connect.refused"


def test_limits_hold_whatever_orders_have_taken_of_them(hosts: Hosts) -> None:
    """A hundred at once where forty are allowed: never more, none lost, and no place is gone afterwards."""
    limit(hosts, LimitsSpec(max_connections=40, max_pending=100, queue_timeout="30s"))
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.outside, 6000, backlog=256) as server:
        for _ in range(3):
            clients = {f"{number:03}".encode(): hosts.web.connect(PLAIN, 6000) for number in range(100)}
            for name, client in clients.items():
                client.sendall(name)
            served = [accept(server) for _ in range(40)]
            assert nobody_came(server)
            while clients:
                app = served.pop()
                converse(clients.pop(read(app, 3)), app)
                if len(clients) >= 40:
                    served.append(accept(server))
                    assert nobody_came(server)
    assert {reason(each) for each in out.ended(300)} == {"ok by client in data"}


def test_an_order_that_is_full_gets_more_places_and_nobody_waits(hosts: Hosts) -> None:
    before = by_order(hosts.web)
    with listen(hosts.outside, 6000, backlog=512) as server:
        pairs = [(hosts.web.connect(PLAIN, 6000), accept(server)) for _ in range(300)]
        out = Records(hosts.sidecar(hosts.web), since_start=True)
        assert {each.state for each in out.now() if each.reason is None} == {State.OPEN}
        for client, app in pairs:
            converse(client, app)
    assert by_order(hosts.web) - before >= 290


def test_what_is_open_under_an_order_when_the_sidecar_ends_is_reset_and_recorded(hosts: Hosts) -> None:
    once = hosts.world.host("once")
    sidecar = hosts.mesh.sidecar(once, proxy={"drain_timeout": "0s"})
    sidecar.capture()
    with listen(hosts.outside, 6000) as server:
        converse(once.connect(PLAIN, 6000), accept(server))
        client, app = once.connect(PLAIN, 6000), accept(server)
        with client, app:
            client.sendall(b"x")
            assert read(app, 1) == b"x"
            assert sidecar.stop(timeout=3) == 0
            assert ended_by_rst(client)
            assert ended_by_rst(app)
    assert [reason(line) for line in logged(hosts, once)] == ["ok by client in data", "drain by drain in data"]
    del hosts.mesh.sidecars["once"]
