"""The cable of a host is pulled, and put back."""

import socket

import pytest

from tests.faults.causes import SECRET, impatient, pulled
from tests.faults.stream import Stream
from tests.proxy.programs import Records, accept, converse, ended_by_rst, listen, read, reason
from tests.traffic.calls import is_reset
from tests.traffic.conftest import Hosts, Name, traffic
from tests.world import wait_for

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("side", ["web", "api"])
def test_a_stream_outlives_a_cable_that_was_out_for_a_moment(hosts: Hosts, name: Name, side: str) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]))
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(api))
    with (
        listen(api, name.port) as server,
        Stream(hosts.web.connect(name.address, name.port), accept(server)) as stream,
    ):
        with pulled(hosts, hosts.world.hosts[side]):
            stream.stands_still()
        stream.moves()
    for record in (out.one(), into.one()):
        assert (reason(record), record.bytes_received) == ("ok by server in data", stream.received)


@pytest.mark.produces("keepalive.dead")
def test_of_a_host_that_is_gone_client_and_application_hear_by_way_of_the_tunnel(hosts: Hosts, name: Name) -> None:
    """The one leg that is dead is the tunnel; its own keepalive finds that, and each other leg is reset."""
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]))
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(api))
    with (
        listen(api, name.port) as server,
        hosts.web.connect(name.address, name.port) as client,
        accept(server) as app,
    ):
        client.sendall(SECRET)
        assert read(app, len(SECRET)) == SECRET
        for sidecar in (hosts.sidecar(hosts.web), hosts.sidecar(api)):
            impatient(sidecar)
        for end in (client, app):
            end.settimeout(30)
        with pulled(hosts, api):
            assert ended_by_rst(client)
            assert ended_by_rst(app)
            told = [out.one(), into.one()]
    assert {record.reason.code for record in told if record.reason} == {"keepalive.dead"}
    assert {record.bytes_sent for record in told} == {len(SECRET)}


def test_while_the_cable_is_out_clients_are_reset_in_time_and_afterwards_served(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    hosts.write(
        hosts.service(name, [api]),
        traffic(name, connect={"attemptTimeout": "200ms", "attempts": 2}, breaker={"failures": 100}),
    )
    out = Records(hosts.sidecar(hosts.web))
    with listen(api, name.port) as server:
        converse(hosts.web.connect(name.address, name.port), accept(server), SECRET)
        out.one()  # its tunnel is kept
        with pulled(hosts, api):
            assert is_reset(hosts.web, name)
        server.settimeout(0.5)
        wait_for(lambda: _is_served(hosts, name, server), what="that clients are served again")
    first, without_answer, *_ = out.now()
    assert reason(first) == "ok by client in data"
    # The kept tunnel does not answer, nor does anybody when another is dialled.
    results = [(attempt.result, "OPEN" in attempt.detail) for attempt in without_answer.attempts]
    assert results == [("connect.timeout", True), ("connect.timeout", False)]
    assert reason(without_answer) == "connect.timeout by proxy in tls"


def _is_served(hosts: Hosts, name: Name, server: socket.socket) -> bool:
    """Raises OSError when it is not, as long as the way there is not found again."""
    with hosts.web.connect(name.address, name.port) as client:
        client.sendall(SECRET)
        with accept(server) as app:
            return read(app, len(SECRET)) == SECRET
