"""The endpoint's own faults: it does not answer, answers and says nothing, breaks off, or says little at a time."""

import hashlib
import socket

import pytest

from meshnet.model.connection import State
from tests.faults.causes import SECRET, drops_syns, pouring, rule, without_tunnels
from tests.faults.conftest import once
from tests.proxy.peer import TUNNEL_PORT
from tests.proxy.programs import Records, accept, listen, nobody_came, read, read_all, reason, reset
from tests.traffic.calls import is_reset
from tests.traffic.conftest import Hosts, Name, traffic
from tests.world import wait_for

pytestmark = pytest.mark.netns

BULK = hashlib.shake_256(b"bulk").digest(64 << 20)  # more than all buffers on the way hold


def test_a_plain_endpoint_that_drops_syns_is_given_up_in_time_and_another_is_tried(hosts: Hosts, name: Name) -> None:
    deaf, other = hosts.outside, hosts.apis[0]
    hosts.write(
        hosts.mesh.service(name.name, [name.port], [deaf, other], addresses=[name.address], meshed=False),
        traffic(name, balance="round_robin", connect={"attemptTimeout": "200ms"}),
    )
    out = Records(hosts.sidecar(hosts.web))
    with drops_syns(deaf, name.port), listen(other, name.port) as server:
        for _ in range(2):
            with hosts.web.connect(name.address, name.port) as client, accept(server) as app:
                app.sendall(b"hello")
                assert read(client, 5) == b"hello"
    tried = [[attempt.result for attempt in record.attempts] for record in out.ended(2)]
    assert ["connect.timeout", "ok"] in tried
    assert all(attempts[-1] == "ok" for attempts in tried)


@once
@pytest.mark.produces("connect.timeout")
def test_a_plain_endpoint_that_drops_syns_and_is_the_only_one_is_an_rst(hosts: Hosts, name: Name) -> None:
    hosts.write(
        hosts.mesh.service(name.name, [name.port], [hosts.outside], addresses=[name.address], meshed=False),
        traffic(name, connect={"attemptTimeout": "100ms", "attempts": 2}),
    )
    out = Records(hosts.sidecar(hosts.web))
    with drops_syns(hosts.outside, name.port):
        assert is_reset(hosts.web, name)
    record = out.one()
    assert reason(record) == "connect.timeout by proxy in connect"
    assert [attempt.result for attempt in record.attempts] == ["connect.timeout"] * 2


def test_a_meshed_host_that_is_declared_plain_and_has_no_application_is_told_once_for_what_it_may_be(
    hosts: Hosts, name: Name
) -> None:
    """Its sidecar has accepted before it can know."""
    web, api = hosts.sidecar(hosts.web), hosts.apis[0]
    service = hosts.mesh.service(name.name, [name.port], [api], addresses=[name.address], meshed=False)
    # The reset may also come before connect() has returned, which is a failure for the breaker.
    hosts.write(service, traffic(name, connect={"attempts": 1}, breaker={"failures": 1000}))
    out = Records(web)
    what = f"{api.address}:{name.port} of {name.name}:{name.port} accepts connections and resets each at once"

    def told() -> int:
        assert is_reset(hosts.web, name)
        assert web.process is not None
        return web.process.output.count(what)

    wait_for(told, what="it is told")
    (view,) = web.endpoints(name.name).items
    resets = [each for each in out.now() if each.reason and reason(each) == "peer.rst by server in data"]
    assert len(resets) >= 5
    assert view.last_error.startswith(("peer.rst: it accepts and resets at once", "connect.refused: "))
    assert "a sidecar at the endpoint that could not reach its application" in web.meshnet("explain", resets[0].id)
    assert [told() for _ in range(6)] == [1] * 6


def test_an_application_that_drops_syns_is_told_by_its_sidecar(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]), traffic(name, connect={"attempts": 1}))
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(api))
    with drops_syns(api, name.port):
        assert is_reset(hosts.web, name)
    assert reason(out.one()) == "connect.timeout by peer-proxy in connect"
    assert reason(into.one()) == "connect.timeout by proxy in connect"


@once
def test_a_sidecar_whose_tunnel_port_drops_syns_is_given_up_in_time_and_never_spoken_to_in_plain_text(
    hosts: Hosts, name: Name
) -> None:
    deaf, other = hosts.apis
    hosts.write(
        hosts.service(name, [deaf, other]),
        traffic(name, balance="round_robin", connect={"attemptTimeout": "300ms"}),
    )
    without_tunnels(hosts)
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(deaf))
    with drops_syns(deaf, TUNNEL_PORT), listen(other, name.port) as server:
        for _ in range(2):
            with hosts.web.connect(name.address, name.port) as client, accept(server) as app:
                client.sendall(SECRET)
                assert read(app, len(SECRET)) == SECRET
    tried = [[attempt.result for attempt in record.attempts] for record in out.ended(2)]
    assert ["connect.timeout", "ok"] in tried
    assert into.now() == []


@once
def test_a_firewall_that_rejects_at_the_tunnel_port_is_believed_and_no_reason_for_plain_text(
    hosts: Hosts, name: Name
) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]), traffic(name, connect={"attempts": 1}))
    without_tunnels(hosts)
    out = Records(hosts.sidecar(hosts.web))
    verdict = f"tcp dport {TUNNEL_PORT} reject with icmpx host-unreachable"
    with listen(api, name.port) as server, rule(api, "input priority 0", verdict):
        assert is_reset(hosts.web, name)
        assert nobody_came(server)
    assert reason(out.one()) == "connect.unreachable by proxy in tls"


def test_an_application_that_accepts_and_never_answers_costs_nothing_but_its_connection(
    hosts: Hosts, name: Name
) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]))
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(api))
    with listen(api, name.port) as server:
        client = hosts.web.connect(name.address, name.port)
        client.sendall(SECRET)
        client.shutdown(socket.SHUT_WR)
        wait_for(lambda: [each.state for each in into.now()] == [State.HALF_IN])
        (waiting,) = out.open()
        assert (waiting.bytes_sent, waiting.bytes_received, waiting.reason) == (len(SECRET), 0, None)
        reset(client)  # it has waited long enough
        # To who has had a FIN, Linux says EPIPE for an RST.
        with accept(server) as app, pytest.raises((ConnectionResetError, BrokenPipeError)):
            while True:
                app.sendall(b"at last")
    for record in (out.one(), into.one()):
        assert reason(record) == "peer.rst by client in half-closed"


@pytest.mark.parametrize("meshed", [True, False])
@pytest.mark.produces("peer.rst")
def test_an_application_that_resets_in_the_middle_is_an_rst_and_what_came_before_is_right(
    hosts: Hosts, name: Name, meshed: bool
) -> None:
    host = hosts.apis[0] if meshed else hosts.outside
    service = hosts.mesh.service(name.name, [name.port], [host], addresses=[name.address], meshed=meshed)
    hosts.write(service)
    out = Records(hosts.sidecar(hosts.web))
    with listen(host, name.port) as server:
        client, app = hosts.web.connect(name.address, name.port), accept(server)
        heard = b""
        with client, pouring(app, BULK):
            heard += read(client, 1 << 20)
            reset(app)
            with pytest.raises(ConnectionResetError):
                while piece := client.recv(65536):
                    heard += piece
    assert BULK.startswith(heard)
    record = out.one()
    assert reason(record) == "peer.rst by server in data"
    assert len(heard) <= record.bytes_received < len(BULK)


def test_a_client_that_resets_in_the_middle_of_its_upload_resets_the_application(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]))
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(api))
    with listen(api, name.port) as server:
        client, app = hosts.web.connect(name.address, name.port), accept(server)
        with app:
            with pouring(client, BULK):
                heard = read(app, 1 << 20)
                reset(client)
            with pytest.raises(ConnectionResetError):
                while piece := app.recv(65536):
                    heard += piece
    assert BULK.startswith(heard)
    for record in (out.one(), into.one()):
        assert reason(record) == "peer.rst by client in data"


def test_an_application_that_trickles_is_heard_byte_by_byte_and_counted_exactly(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]))
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(api))
    with listen(api, name.port) as server:
        client, app = hosts.web.connect(name.address, name.port), accept(server)
        with client, app:
            for number in range(500):
                app.sendall(bytes([number % 256]))
                assert read(client, 1) == bytes([number % 256])
                client.sendall(b".")
                assert read(app, 1) == b"."
            app.shutdown(socket.SHUT_WR)
            assert read_all(client) == b""
            client.shutdown(socket.SHUT_WR)
            assert read_all(app) == b""
    for record in (out.one(), into.one()):
        assert (reason(record), record.bytes_sent, record.bytes_received) == ("ok by server in data", 500, 500)
