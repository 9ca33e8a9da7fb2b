"""Connecting on another endpoint, until a byte has gone up."""

import hashlib
import signal
import socket
import time
from collections import Counter

import msgspec
import pytest

from meshnet.decide.retry import RetryBudget
from meshnet.model.connection import Connection, Security, TlsView
from tests.proxy.programs import Records, accept, ended_by_rst, listen, read, read_all, reason, reset
from tests.traffic.calls import is_reset, who
from tests.traffic.conftest import Hosts, Name, traffic
from tests.world import stand_still

pytestmark = pytest.mark.netns


def results(record: Connection) -> list[tuple[str, str]]:
    return [(attempt.endpoint.rpartition(":")[0], attempt.result) for attempt in record.attempts]


def test_no_client_notices_that_one_application_of_three_is_down(hosts: Hosts, name: Name) -> None:
    hosts.write(hosts.service(name, hosts.apis), traffic(name, balance="round_robin"))
    down = hosts.apis[1]
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(down))
    with hosts.apps(name.port, [hosts.apis[0], hosts.apis[2]]):
        seen = Counter(who(hosts.web, name) for _ in range(50))
    assert seen.keys() == {"api-1", "api-3"}
    records = out.ended(50)
    assert {reason(record).split()[0] for record in records} == {"ok"}
    retried = [record for record in records if len(record.attempts) > 1]
    assert len(retried) >= 5  # then its breaker opens, and it is hardly asked any more
    for record in retried:
        (first, refused), (second, ok) = results(record)
        assert (first, refused, ok) == (down.address, "connect.refused", "ok")
        assert second == record.endpoint.rpartition(":")[0] != first
        assert results(hosts.logged(hosts.web, record.id)) == results(record)
    # Its own sidecar tells the same of each attempt, under the same ids.
    assert {record.id for record in into.ended(len(retried))} == {record.id for record in retried}
    assert {reason(record) for record in into.now()} == {"connect.refused by proxy in connect"}


def test_when_every_application_is_down_the_client_is_reset_after_each_was_tried_once(hosts: Hosts, name: Name) -> None:
    hosts.write(hosts.service(name, hosts.apis))
    out = Records(hosts.sidecar(hosts.web))
    assert is_reset(hosts.web, name)
    record = out.one()
    assert reason(record) == "connect.refused by peer-proxy in connect"
    assert {result for _, result in results(record)} == {"connect.refused"}
    assert sorted(endpoint for endpoint, _ in results(record)) == sorted(host.address for host in hosts.apis)
    assert hosts.logged(hosts.web, record.id).reason == record.reason


def test_retries_do_not_multiply_an_outage(hosts: Hosts, name: Name) -> None:
    """Those of a service have a budget: a share of its connects, and a few a second."""
    hosts.write(hosts.service(name, hosts.apis), traffic(name, breaker={"failures": 1000}, outlier={"failureShare": 0}))
    out = Records(hosts.sidecar(hosts.web))
    began = time.monotonic()
    assert all(is_reset(hosts.web, name) for _ in range(200))
    lasted = time.monotonic() - began
    attempts = [len(record.attempts) for record in out.ended(200)]
    assert attempts[0] == 3
    retries = sum(attempts) - 200  # there would be 400
    most = max(RetryBudget.LEAST_PER_SECOND * RetryBudget.WINDOW, RetryBudget.SHARE * 200)
    assert 1 <= retries <= most + RetryBudget.LEAST_PER_SECOND * lasted + 1


def test_an_endpoint_whose_sidecar_does_not_answer_is_passed_over_and_never_spoken_to_in_plain_text(
    hosts: Hosts, name: Name
) -> None:
    service = hosts.service(name, hosts.apis)
    first, *others = service.spec.endpoints
    nobody = msgspec.structs.replace(first, tunnel_port=22)  # neither captured nor listened on
    spec = msgspec.structs.replace(service.spec, endpoints=(nobody, *others))
    hosts.write(msgspec.structs.replace(service, spec=spec), traffic(name, balance="round_robin"))
    out = Records(hosts.sidecar(hosts.web))
    with hosts.apps(name.port, hosts.apis) as apps:
        assert {who(hosts.web, name) for _ in range(6)} == {"api-2", "api-3"}
        assert apps["api-1"].accepted == 0
    assert [result for record in out.ended(6) for result in results(record) if result[1] != "ok"] == [
        (hosts.apis[0].address, "connect.refused")
    ] * 3  # every attempt is a turn, and three in nine are its


def test_a_record_keeps_nothing_of_the_tunnel_of_an_attempt_that_was_not_the_last(hosts: Hosts, name: Name) -> None:
    meshed, plain = hosts.apis[0], hosts.outside
    service = hosts.service(name, [meshed])
    beyond = hosts.mesh.service(name.name, [name.port], [plain], meshed=False)
    spec = msgspec.structs.replace(service.spec, endpoints=(*service.spec.endpoints, *beyond.spec.endpoints))
    hosts.write(msgspec.structs.replace(service, spec=spec), traffic(name, balance="round_robin"))
    out = Records(hosts.sidecar(hosts.web))
    with hosts.apps(name.port, [plain]):
        assert who(hosts.web, name) == plain.name
    record = out.one()
    assert results(record) == [(meshed.address, "connect.refused"), (plain.address, "ok")]
    assert record.tls == TlsView(mode=Security.PLAIN)
    assert record.destination.identity == ""


def test_what_the_client_has_sent_by_then_reaches_the_next_endpoint_whole(hosts: Hosts, name: Name) -> None:
    hosts.write(hosts.service(name, hosts.apis[:2]), traffic(name, balance="round_robin"))
    sent = b"".join(hashlib.sha512(number.to_bytes(2, "big")).digest() for number in range(1000))
    out = Records(hosts.sidecar(hosts.web))
    process = hosts.sidecar(hosts.web).process
    assert process is not None
    with listen(hosts.apis[1], name.port) as server:
        # While its sidecar stands still, the client connects and sends: so the first attempt already has bytes.
        stand_still(process.pid)
        try:
            client = hosts.web.connect(name.address, name.port)
            client.sendall(sent)
        finally:
            process.popen.send_signal(signal.SIGCONT)
        with client, accept(server) as app:
            client.shutdown(socket.SHUT_WR)
            assert read_all(app) == sent
    record = out.one()
    assert results(record) == [(hosts.apis[0].address, "connect.refused"), (hosts.apis[1].address, "ok")]
    assert record.bytes_sent == len(sent)


def test_once_an_application_has_the_connection_nobody_else_gets_it(hosts: Hosts, name: Name) -> None:
    first, second = hosts.apis[:2]
    hosts.write(hosts.service(name, [first, second]), traffic(name, balance="round_robin"))
    out = Records(hosts.sidecar(hosts.web))
    with listen(first, name.port) as server, hosts.apps(name.port, [second]) as apps:
        with hosts.web.connect(name.address, name.port) as client:
            client.sendall(b"question")
            app = accept(server)
            assert read(app, 8) == b"question"
            reset(app)
            assert ended_by_rst(client)
        record = out.one()
        assert apps["api-2"].accepted == 0
    assert results(record) == [(first.address, "ok")]
    assert reason(record) == "peer.rst by server in data"
