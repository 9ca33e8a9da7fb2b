"""Two workers share the listeners, and whoever asks sees one sidecar."""

import os
import signal
import socket
from contextlib import ExitStack

import msgspec
import pytest

from meshnet.model.admin import (
    ConnectionList,
    ExplainConnection,
    FamilyList,
    GetMetrics,
    ListConnections,
    ListUncaptured,
)
from meshnet.model.connection import Connection
from meshnet.model.resource import API_VERSION, BreakerSpec, LimitsSpec, Metadata, TrafficPolicy, TrafficPolicySpec
from meshnet.model.uncaptured import UncapturedList
from meshnet_cli.client import ask
from meshnet_cli.listing import listing
from tests.proxy.conftest import API, Hosts
from tests.proxy.metrics import get, samples, value
from tests.proxy.programs import Records, accept, converse, is_reset, listen, nobody_came, reset
from tests.proxy.test_config import BROKEN
from tests.proxy.workers.heard import following
from tests.proxy.workers.pairs import on_every_worker, outbound, row, stopped, worker_of
from tests.world import ProgramFailed, wait_for

pytestmark = pytest.mark.netns

OPENED = "meshnet_tcp_connections_opened_total"
CLOSED = "meshnet_tcp_connections_closed_total"
OPEN = "meshnet_tcp_connections_open"


def test_each_worker_serves_and_one_list_has_the_connections_of_both(hosts: Hosts) -> None:
    sidecar = hosts.sidecar(hosts.web)
    with listen(hosts.api, 8080) as server, on_every_worker(hosts, server) as pairs:
        listed = msgspec.json.decode(sidecar.meshnet("conns", "-o", "json"), type=ConnectionList)
        still_open = [item.id for item in listed.items if item.reason is None]
        assert still_open == [pair.record.id for pair in pairs]
        assert len(set(still_open)) == listed.metadata.open == sidecar.status().open_connections
        for number in (1, 2):
            assert row(sidecar, number).open_connections == sum(pair.worker == number for pair in pairs)
        (endpoint,) = sidecar.endpoints("api").items
        assert (endpoint.connections, endpoint.breaker, endpoint.workers) == (len(pairs), "closed", 2)
        assert all(pair.talks() for pair in pairs)


def test_one_list_has_what_ended_long_ago_at_either(hosts: Hosts) -> None:
    """Enough for each to have more than one part of it."""
    sidecar = hosts.sidecar(hosts.web)
    path, count = sidecar.settings.admin.socket, 0
    with listen(hosts.api, 8080) as server:
        everything, parts = ListConnections(all=True), 1
        while parts == 1:
            assert count < 40_000
            for _ in range(500):
                converse(hosts.web.connect(API, 8080), accept(server))
            count += 500
            parts = 2 if ask(path, everything, ConnectionList).metadata.before else 1
        out = listing(path, everything, timeout=5.0).items
        assert len([each for each in out if each.destination.service == "api:8080"]) >= count
        assert [each.closed_at for each in out if each.closed_at] == sorted(
            each.closed_at for each in out if each.closed_at
        )
        assert ask(path, ExplainConnection(id=out[0].id), Connection).closed_at == out[0].closed_at


def test_sockets_of_both_are_the_sidecar_s_own(hosts: Hosts) -> None:
    path = hosts.sidecar(hosts.web).settings.admin.socket
    with (
        listen(hosts.api, 8080) as server,
        on_every_worker(hosts, server),
        listen(hosts.web, 22) as ssh,
        hosts.outside.connect(hosts.web.address, 22),
        accept(ssh),
    ):
        (only,) = ask(path, ListUncaptured(), UncapturedList).items
    assert (only.server, only.setting) == (f"{hosts.web.address}:22", "capture.exclude_inbound_ports")


def test_any_of_them_is_explained(hosts: Hosts) -> None:
    sidecar = hosts.sidecar(hosts.web)
    with listen(hosts.api, 8080) as server, on_every_worker(hosts, server) as pairs:
        for pair in pairs:
            told = sidecar.meshnet("explain", pair.record.id)
            assert f"capture: outbound from {pair.record.source.address} to {API}:8080" in told
    with pytest.raises(ProgramFailed, match="no connection k7f2 here\n"):
        sidecar.meshnet("explain", "k7f2")


def test_what_ended_is_listed_in_the_order_in_which_it_did(hosts: Hosts) -> None:
    with listen(hosts.api, 8080) as server, on_every_worker(hosts, server) as pairs:
        out = [pair.record.id for pair in reversed(pairs)]
        for pair in reversed(pairs):
            converse(pair.client, pair.app)
            wait_for(lambda pair=pair: pair.record.id not in open_ids(hosts))
        listed = [each.id for each in hosts.sidecar(hosts.web).connections()]
    assert [each for each in listed if each in out] == out


def open_ids(hosts: Hosts) -> set[str]:
    return {each.id for each in outbound(hosts.sidecar(hosts.web)).values()}


def test_who_follows_hears_of_both(hosts: Hosts) -> None:
    with following(hosts) as heard, listen(hosts.api, 8080) as server, on_every_worker(hosts, server) as before:
        first = {pair.record.id for pair in before}
        wait_for(lambda: heard.ids("open") >= first)
        with following(hosts) as late, on_every_worker(hosts, server) as after:
            second = {pair.record.id for pair in after}
            wait_for(lambda: late.ids("open") == first | second, what="what was open already, and what came since")
            for pair in after:
                converse(pair.client, pair.app)
            wait_for(lambda: heard.ids("close") == late.ids("close") == second)
            server.close()


def test_metrics_are_those_of_both_added_up_exactly(hosts: Hosts) -> None:
    labels = {"reporter": "source", "destination_service": "api:8080"}
    before = {name: value(hosts.web, name, **labels) for name in (OPENED, CLOSED)}
    sent = value(hosts.web, "meshnet_tcp_sent_bytes_total", **labels)
    with listen(hosts.api, 8080) as server, on_every_worker(hosts, server, each=3) as pairs:
        assert value(hosts.web, OPENED, **labels) == before[OPENED] + len(pairs)
        assert value(hosts.web, OPEN, **labels) == len(pairs)
        for pair in pairs[::2]:
            converse(pair.client, pair.app, up=b"12345")
        ended = len(pairs[::2])
        wait_for(lambda: value(hosts.web, OPEN, **labels) == len(pairs) - ended)
        assert value(hosts.web, CLOSED, **labels) == before[CLOSED] + ended
        assert value(hosts.web, "meshnet_tcp_sent_bytes_total", **labels) == sent + 5 * ended
        counted = value(hosts.web, "meshnet_tcp_connection_duration_seconds_count")
        assert counted == value(hosts.web, "meshnet_tcp_connection_duration_seconds_bucket", le="+Inf")
        assert counted == value(hosts.web, CLOSED)
    assert value(hosts.web, "meshnet_workers") == 2
    names = [(sample.name, *sample.labels.items()) for sample in samples(hosts.web)]
    assert len(set(names)) == len(names)


def test_its_metrics_in_numbers_are_those_of_its_text(hosts: Hosts) -> None:
    path = hosts.sidecar(hosts.web).settings.admin.socket
    numbers = ask(path, GetMetrics(), FamilyList).items
    assert {sample.name for family in numbers for sample in family.samples} == {s.name for s in samples(hosts.web)}


def test_the_breaker_of_each_is_its_own_and_the_worst_is_shown(hosts: Hosts) -> None:
    sidecar = hosts.sidecar(hosts.web)
    policy = TrafficPolicySpec(services=("shaky",), breaker=BreakerSpec(failures=1, open_time="60s"))
    hosts.write(
        hosts.mesh.service("shaky", [8090], [hosts.api], addresses=["10.96.0.60"]),
        TrafficPolicy(api_version=API_VERSION, metadata=Metadata(name="shaky"), spec=policy),
    )
    labels = {"service": "shaky:8090"}
    assert value(hosts.web, "meshnet_endpoints", state="healthy", **labels) == 1
    assert is_reset(hosts.web, "10.96.0.60", 8090)
    (view,) = sidecar.endpoints("shaky").items
    assert (view.breaker, view.workers) == ("open", 1)
    assert value(hosts.web, "meshnet_breaker_state", **labels) == 2
    assert value(hosts.web, "meshnet_endpoints", state="healthy", **labels) == 0
    assert value(hosts.web, "meshnet_endpoints", state="open", **labels) == 1
    assert "WORKERS" in sidecar.meshnet("endpoints", "shaky", "-o", "wide")
    wait_for(
        lambda: is_reset(hosts.web, "10.96.0.60", 8090) and sidecar.endpoints("shaky").items[0].workers == 2,
        what="the breakers of both are open",
    )


def test_limits_are_shared_among_the_workers(hosts: Hosts) -> None:
    limits = TrafficPolicySpec(services=("api",), limits=LimitsSpec(max_connections=4, queue_timeout="60s"))
    hosts.write(TrafficPolicy(api_version=API_VERSION, metadata=Metadata(name="patient"), spec=limits))
    sidecar = hosts.sidecar(hosts.web)
    out = Records(sidecar)
    with listen(hosts.api, 8080) as server, ExitStack() as stack:
        clients: list[socket.socket] = []
        # Until each has more than it may let through.
        while not all(row(sidecar, number).open_connections > 2 for number in (1, 2)):
            assert len(clients) < 200, "one worker got them all"
            clients.append(stack.enter_context(hosts.web.connect(API, 8080)))
            wait_for(lambda: len(out.now()) == len(clients))
        apps = [stack.enter_context(accept(server)) for _ in range(4)]
        assert sorted(worker_of(each) for each in outbound(sidecar).values()) == [1, 1, 2, 2]
        assert nobody_came(server)
        for sock in (*clients, *apps):
            reset(sock)
        out.ended(len(clients))


def test_it_is_ready_when_both_are(hosts: Hosts) -> None:
    sidecar = hosts.sidecar(hosts.web)
    assert get(hosts.web, "/readyz") == (200, "ok\n")
    with stopped(row(sidecar, 2).pid):
        assert get(hosts.web, "/readyz") == (503, "worker 2 does not answer\n")
        assert get(hosts.web, "/healthz") == (200, "ok\n")
        assert "2: does not answer, pid " in sidecar.meshnet("status", check=False)
        listed = ask(sidecar.settings.admin.socket, ListConnections(), ConnectionList)
        assert listed.metadata.silent_workers == 1
    assert get(hosts.web, "/readyz") == (200, "ok\n")


def test_who_asks_it_to_read_its_files_again_asks_both(hosts: Hosts) -> None:
    def refused() -> float:
        return value(hosts.web, "meshnet_config_nacks_total")

    sidecar, before = hosts.sidecar(hosts.web), refused()
    file = hosts.mesh.directory / "broken.yaml"
    try:
        file.write_text(BROKEN)
        wait_for(lambda: refused() == before + 2)
        assert "broken.yaml:6: " in sidecar.status().config.problem
        os.kill(sidecar.status().pid, signal.SIGHUP)
        wait_for(lambda: refused() == before + 4)
    finally:
        file.unlink()
    wait_for(lambda: not sidecar.status().config.problem)
