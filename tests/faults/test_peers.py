"""A sidecar is killed, stands still, or is another one when it comes back."""

import socket
from datetime import UTC, datetime

import pytest

from meshnet.control.authority import save_issued
from meshnet.model.connection import Security
from tests.faults.causes import SECRET
from tests.faults.conftest import once
from tests.faults.stream import Stream
from tests.proxy.programs import Records, accept, converse, ended_by_rst, listen, nobody_came, read, reason, stopped
from tests.traffic.calls import is_reset
from tests.traffic.conftest import Hosts, Name, traffic

pytestmark = pytest.mark.netns

MANY = 20


def test_a_peer_sidecar_that_is_killed_resets_all_that_it_carried_and_nobody_gets_past_it(
    hosts: Hosts, name: Name
) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]), traffic(name, connect={"attempts": 1}))
    sidecar = hosts.sidecar(api)
    assert sidecar.process is not None
    out = Records(hosts.sidecar(hosts.web))
    with listen(api, name.port) as server:
        pairs = [(hosts.web.connect(name.address, name.port), accept(server)) for _ in range(MANY)]
        for client, app in pairs:
            client.sendall(SECRET)
            assert read(app, len(SECRET)) == SECRET
        sidecar.process.kill()
        for client, app in pairs:
            with client, app:
                assert ended_by_rst(client)
                assert _has_ended(app)
        assert {reason(record) for record in out.ended(MANY)} == {"tunnel.lost by peer-proxy in data"}
        assert is_reset(hosts.web, name)
        assert nobody_came(server)
        sidecar.start()
        converse(hosts.web.connect(name.address, name.port), accept(server), SECRET)
    *_, refused, served = out.ended(MANY + 2)
    assert reason(refused) == "connect.refused by proxy in tls"
    assert reason(served) == "ok by client in data"


def _has_ended(app: socket.socket) -> bool:
    """The kernel says so in the name of who was killed: by FIN, or by RST if that had left something unread."""
    try:
        return app.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("side", ["web", "api"])
def test_a_stream_outlives_a_sidecar_that_stands_still_for_a_while(hosts: Hosts, name: Name, side: str) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]))
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(api))
    with (
        listen(api, name.port) as server,
        Stream(hosts.web.connect(name.address, name.port), accept(server)) as stream,
    ):
        with stopped(hosts.sidecar(hosts.world.hosts[side])):
            stream.stands_still()
        stream.moves()
    for record in (out.one(), into.one()):
        assert (reason(record), record.bytes_received) == ("ok by server in data", stream.received)


def test_while_one_sidecar_stands_still_clients_are_served_by_another(hosts: Hosts, name: Name) -> None:
    still, other = hosts.apis
    hosts.write(
        hosts.service(name, [still, other]),
        traffic(name, balance="round_robin", connect={"attemptTimeout": "200ms"}),
    )
    out = Records(hosts.sidecar(hosts.web))
    with listen(other, name.port) as server, listen(still, name.port) as nobody, stopped(hosts.sidecar(still)):
        for _ in range(4):
            with hosts.web.connect(name.address, name.port) as client, accept(server) as app:
                client.sendall(SECRET)
                assert read(app, len(SECRET)) == SECRET
        assert nobody_came(nobody)
    tried = [[attempt.result for attempt in record.attempts] for record in out.ended(4)]
    assert all(attempts[-1] == "ok" for attempts in tried)
    assert {attempt for attempts in tried for attempt in attempts[:-1]} <= {"connect.timeout", "tls.handshake"}
    assert max(map(len, tried)) == 2


@once
def test_a_peer_that_comes_back_with_a_new_certificate_is_believed_and_no_session_is_resumed(
    hosts: Hosts, name: Name
) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]))
    sidecar = hosts.sidecar(api)
    assert sidecar.process is not None
    out = Records(hosts.sidecar(hosts.web))
    with listen(api, name.port) as server:
        converse(hosts.web.connect(name.address, name.port), accept(server), SECRET)
        out.one()
        before = sidecar.status().certificate.serial
        sidecar.process.kill()
        save_issued(
            hosts.mesh.authority.issue(hosts.mesh.identity("api"), now=datetime.now(UTC)), sidecar.config.parent
        )
        sidecar.start()
        assert sidecar.status().certificate.serial != before
        converse(hosts.web.connect(name.address, name.port), accept(server), SECRET)
    _, again = out.ended(2)
    assert reason(again) == "ok by client in data"
    assert (again.tls.mode, again.tls.resumed) == (Security.MTLS, False)
    assert again.tls.handshake_ms is not None
