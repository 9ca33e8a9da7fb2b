"""How a connection begins and ends through the mesh: who speaks first, half-closes, resets, and what is sent again."""

import os
import socket

import pytest

from meshnet.codec.frames import Open, Refused
from meshnet.model.connection import State
from tests.proxy.conftest import API, PAIR, SELF, Hosts
from tests.proxy.peer import Peer
from tests.proxy.programs import Records, accept, is_reset, listen, nobody_came, read, read_all, reason, reset, stopped
from tests.world import wait_for

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("ends_first", ["client", "server"])
@pytest.mark.parametrize("address", [API, SELF])
def test_who_finished_sending_still_hears_the_other_to_the_end(hosts: Hosts, address: str, ends_first: str) -> None:
    out = Records(hosts.sidecar(hosts.web))
    host, port = (hosts.api, 8080) if address == API else (hosts.web, 9000)
    with listen(host, port) as server, hosts.web.connect(address, port) as client, accept(server) as app:
        first, last = (client, app) if ends_first == "client" else (app, client)
        first.sendall(b"that is all")
        first.shutdown(socket.SHUT_WR)
        assert read_all(last) == b"that is all"
        wait_for(lambda: out.now()[0].state is (State.HALF_IN if ends_first == "client" else State.HALF_OUT))
        for _ in range(3):
            last.sendall(b"not yet")
            assert read(first, 7) == b"not yet"
        last.shutdown(socket.SHUT_WR)
        assert read_all(first) == b""
    assert reason(out.one()) == f"ok by {ends_first} in data"


@pytest.mark.parametrize("who", ["client", "server"])
@pytest.mark.parametrize("half_closed", [False, True])
def test_an_rst_arrives_as_an_rst_and_both_sidecars_say_by_whom(hosts: Hosts, who: str, half_closed: bool) -> None:
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(hosts.api))
    with listen(hosts.api, 8080) as server:
        client, app = hosts.web.connect(API, 8080), accept(server)
        breaks, stays = (client, app) if who == "client" else (app, client)
        stays.sendall(b"last words")
        assert read(breaks, 10) == b"last words"
        if half_closed:
            stays.shutdown(socket.SHUT_WR)
            assert read_all(breaks) == b""
        reset(breaks)
        with stays, pytest.raises(ConnectionResetError):
            stays.recv(1)
    for record in (out.one(), into.one()):
        assert record.state is State.FAILED
        assert reason(record) == f"peer.rst by {who} in {'half-closed' if half_closed else 'data'}"


@pytest.mark.parametrize("who", ["client", "server"])
def test_an_rst_after_a_fin_arrives_as_an_rst_too(hosts: Hosts, who: str) -> None:
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(hosts.api))
    with listen(hosts.api, 8080) as server:
        client, app = hosts.web.connect(API, 8080), accept(server)
        breaks, stays = (client, app) if who == "client" else (app, client)
        breaks.shutdown(socket.SHUT_WR)
        assert read_all(stays) == b""
        reset(breaks)
        # To who has had a FIN, Linux says EPIPE for an RST.
        with stays, pytest.raises((ConnectionResetError, BrokenPipeError)):
            while True:
                stays.sendall(b"are you there?")
    assert {reason(record) for record in (out.one(), into.one())} == {f"peer.rst by {who} in half-closed"}


def test_a_server_that_speaks_first_is_heard_before_the_client_says_a_word(hosts: Hosts) -> None:
    with listen(hosts.api, 8080) as server, hosts.web.connect(API, 8080) as client, accept(server) as app:
        app.sendall(b"220 ready\r\n")
        assert read(client, 11) == b"220 ready\r\n"
        client.sendall(b"QUIT\r\n")
        assert read(app, 6) == b"QUIT\r\n"


@pytest.mark.parametrize("size", [1, 16_380, 200_000])
def test_what_the_client_says_at_once_arrives_once_and_is_counted_once(hosts: Hosts, size: int) -> None:
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(hosts.api))
    said = os.urandom(size)
    with listen(hosts.api, 8080) as server:
        with stopped(hosts.sidecar(hosts.web)):
            client = hosts.web.connect(API, 8080)
            client.setblocking(False)
            sent = client.send(said)
        client.settimeout(5)
        with client, accept(server) as app:
            client.sendall(said[sent:])
            client.shutdown(socket.SHUT_WR)
            assert read_all(app) == said
    assert {record.bytes_sent for record in (out.one(), into.one())} == {size}


def test_early_words_go_to_another_endpoint_when_the_first_has_no_application(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    count = 0
    with listen(hosts.twin, 7000) as server:
        while not any(len(record.attempts) > 1 for record in out.now()):
            count += 1
            assert count < 30, "the balancer never tried the first endpoint first"
            with stopped(hosts.sidecar(hosts.web)):
                client = hosts.web.connect(PAIR, 7000)
                client.sendall(b"said once")
                client.shutdown(socket.SHUT_WR)
            with client, accept(server) as app:
                assert read_all(app) == b"said once"
        assert nobody_came(server)
    retried = out.ended(count)[-1]
    assert [attempt.result for attempt in retried.attempts] == ["connect.refused", "ok"]
    assert [attempt.endpoint for attempt in retried.attempts] == [
        f"{hosts.api.address}:7000",
        f"{hosts.twin.address}:7000",
    ]
    assert (reason(retried).partition(" ")[0], retried.bytes_sent) == ("ok", 9)


def test_a_client_that_gave_up_before_the_sidecar_looked_is_recorded_as_such(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server:
        with stopped(hosts.sidecar(hosts.web)):
            reset(hosts.web.connect(API, 8080))
        phases = ("queue", "connect")  # as Python says it, and as an order does
        assert reason(out.one()) in [f"peer.rst by client in {phase}" for phase in phases]
        assert nobody_came(server)


def test_no_application_at_any_endpoint_is_an_rst_for_the_client_and_not_an_end_istio41090(hosts: Hosts) -> None:
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(hosts.api))
    assert is_reset(hosts.web, API, 8080, b"hello?")
    record = out.one()
    assert reason(record) == "connect.refused by peer-proxy in connect"
    assert record.state is State.FAILED
    assert {reason(each) for each in into.ended(len(record.attempts))} == {"connect.refused by proxy in connect"}


@pytest.mark.parametrize(("deadline", "seconds"), [(200, "0.2"), (5000, "1"), (0, "1")])
def test_an_application_that_does_not_answer_is_waited_for_no_longer_than_the_asker_said(
    hosts: Hosts, peer: Peer, deadline: int, seconds: str
) -> None:
    into = Records(hosts.sidecar(hosts.api))
    address = hosts.api.address
    with listen(hosts.api, 8080, backlog=0), hosts.api.connect("127.0.0.1", 8080):  # now the kernel drops every SYN
        peer.sock.sendall(peer.wire.open(Open(host=address, port=8080, deadline=deadline)))
        answer = peer.frame()
    assert isinstance(answer, Refused)
    assert (answer.reason, answer.detail) == ("connect.timeout", f"{address}:8080 did not answer within {seconds} s")
    assert reason(into.one()) == "connect.timeout by proxy in connect"


def test_a_pass_through_that_is_refused_is_an_rst_for_the_client(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    assert is_reset(hosts.web, hosts.outside.address, 5555)
    assert reason(out.one()) == "connect.refused by proxy in connect"
