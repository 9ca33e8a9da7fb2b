"""How a sidecar ends: it waits for what is open as long as it may, and leaves a record and an RST for the rest."""

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from meshnet.codec.frames import GoAway, Open, Refused, encode
from tests.proxy.conftest import API, Hosts
from tests.proxy.metrics import get
from tests.proxy.peer import Peer
from tests.proxy.programs import Records, accept, converse, listen, read, reason
from tests.proxy.test_records import logged
from tests.proxy.test_served_orders import new_id, with_peer
from tests.world import Process, wait_for

pytestmark = pytest.mark.netns


@pytest.fixture
def restarted(hosts: Hosts) -> Iterator[Hosts]:
    """Sidecars that a test may stop."""
    yield hosts
    for sidecar in hosts.mesh.sidecars.values():
        if sidecar.process is None or not sidecar.process.alive:
            sidecar.start()


def process_of(hosts: Hosts) -> Process:
    process = hosts.sidecar(hosts.web).process
    assert process is not None
    return process


@pytest.mark.produces("drain")
def test_each_connection_that_is_cut_off_gets_its_record_and_its_rst(restarted: Hosts) -> None:
    hosts = restarted
    sidecar = hosts.sidecar(hosts.web)
    into = Records(hosts.sidecar(hosts.api))
    with listen(hosts.api, 8080) as server:
        pairs = [(hosts.web.connect(API, 8080), accept(server)) for _ in range(10)]
        ids = {record.id for record in into.open(10)}
        process = process_of(hosts)
        process.popen.terminate()
        wait_for(lambda: sidecar.status().draining)
        process.popen.terminate()  # a second one ends the wait
        assert process.popen.wait(5) == 0
        for client, app in pairs:
            for sock in (client, app):
                with sock, pytest.raises(ConnectionResetError):
                    sock.recv(1)
    lines = [line for line in logged(hosts, hosts.web) if line.id in ids]
    assert {line.id for line in lines} == ids
    assert len(lines) == 10
    assert {reason(line) for line in lines} == {"drain by drain in data"}
    assert {reason(record) for record in into.ended(10)} == {"drain by peer-proxy in data"}


def test_a_drain_waits_for_what_is_open_and_takes_new_connections_meanwhile(restarted: Hosts) -> None:
    hosts = restarted
    sidecar, process = hosts.sidecar(hosts.web), process_of(hosts)
    with listen(hosts.api, 8080) as server:
        client, app = hosts.web.connect(API, 8080), accept(server)
        process.popen.terminate()
        wait_for(lambda: sidecar.status().draining)
        assert get(hosts.web, "/readyz") == (503, "draining\n")
        assert get(hosts.web, "/healthz") == (200, "ok\n")
        converse(hosts.web.connect(API, 8080), accept(server))
        client.sendall(b"still here")
        assert read(app, 10) == b"still here"
        assert process.alive
        converse(client, app)
        assert process.popen.wait(5) == 0
    assert {reason(line) for line in logged(hosts, hosts.web)[-2:]} == {"ok by client in data"}


def test_a_peer_with_a_tunnel_is_asked_to_open_no_more_connections_on_it(restarted: Hosts, peer: Peer) -> None:
    with listen(restarted.api, 8080) as server:
        client, app = restarted.twin.connect(API, 8080), accept(server)
        sidecar = restarted.sidecar(restarted.api)
        assert sidecar.process is not None
        sidecar.process.popen.terminate()
        assert isinstance(peer.frame(), GoAway)
        # An OPEN that crosses the GOAWAY is served all the same.
        crossing = Open(host=restarted.api.address, port=8080)
        peer.sock.sendall(encode(crossing))
        with accept(server):
            peer.sock.close()
        converse(client, app)
        assert sidecar.process.popen.wait(5) == 0


def test_a_sidecar_with_nothing_open_ends_at_once(restarted: Hosts) -> None:
    assert restarted.sidecar(restarted.web).stop(timeout=2) == 0


def test_a_drain_time_of_nothing_cuts_at_once(restarted: Hosts) -> None:
    hosts = restarted
    once = hosts.world.hosts.get("once") or hosts.world.host("once")
    sidecar = hosts.mesh.sidecar(once, proxy={"drain_timeout": "0s"})
    sidecar.capture()
    with listen(hosts.api, 8080) as server, once.connect(API, 8080) as client, accept(server) as app:
        client.sendall(b"x")
        assert read(app, 1) == b"x"
        assert sidecar.stop(timeout=3) == 0
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        with pytest.raises(ConnectionResetError):
            app.recv(1)
    assert [reason(line) for line in logged(hosts, once)] == ["drain by drain in data"]
    del hosts.mesh.sidecars["once"]


def test_the_admin_socket_can_ask_for_a_drain(restarted: Hosts) -> None:
    hosts = restarted
    process = process_of(hosts)
    path = hosts.sidecar(hosts.web).settings.admin.socket
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall(b'{"type":"drain","timeout":5}\n')
        assert b"draining 0 connections" in client.makefile("rb").readline()
    assert process.popen.wait(5) == 0


def test_the_drain_command_waits_for_what_is_open_and_says_what_is_left(restarted: Hosts) -> None:
    hosts = restarted
    process = process_of(hosts)
    path = hosts.sidecar(hosts.web).settings.admin.socket
    with listen(hosts.api, 8080) as server, hosts.web.connect(API, 8080) as client, accept(server) as app:
        drain = hosts.web.spawn("meshnet", "drain", "--socket", path, "--timeout", "30s", name="drain")
        wait_for(lambda: "draining 1 connections, for 30s at most\n" in drain.output)
        client.sendall(b"still here")
        assert read(app, 10) == b"still here"
        assert process.popen.poll() is None
        client.close()
        app.close()
        assert drain.popen.wait(20) == 0
    assert "✓ ended after " in drain.output
    assert process.popen.wait(5) == 0
    unreachable = hosts.web.run("meshnet", "drain", "--socket", path, check=False)
    assert unreachable.returncode == 4


def test_a_second_drain_command_cuts_what_is_left(restarted: Hosts) -> None:
    hosts = restarted
    path = hosts.sidecar(hosts.web).settings.admin.socket
    with listen(hosts.api, 8080) as server, hosts.web.connect(API, 8080) as client, accept(server):
        told = hosts.web.run("meshnet", "drain", "--socket", path, "--no-wait", "-o", "json").stdout
        assert msgspec.json.decode(told)["connections"] == 1
        assert not msgspec.json.decode(told)["ended"]
        assert "✓ ended" in hosts.web.run("meshnet", "drain", "--socket", path).stdout
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert process_of(hosts).popen.wait(5) == 0


# Whoever may open it may be anybody; what it is let in by is the mode of the file.
AS_NOBODY = """
import os, socket, sys
os.chdir(sys.argv[1])
os.chmod("admin.sock", 0o666)
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
with socket.socket(socket.AF_UNIX) as client:
    client.connect("admin.sock")
    answers = client.makefile("rb")
    for request in sys.argv[2:]:
        client.sendall(request.encode() + b"\\n")
        print(answers.readline().decode(), end="")
"""


def test_who_is_neither_root_nor_its_user_may_look_and_not_end_it(restarted: Hosts) -> None:
    if int(Path("/proc/self/uid_map").read_text().split()[2]) == 1:
        return  # there is nobody but us
    sidecar = restarted.sidecar(restarted.web)
    folder = str(Path(sidecar.settings.admin.socket).parent)
    said = restarted.web.python(AS_NOBODY, folder, '{"type":"drain","timeout":0}', '{"type":"status"}')
    refused, status = said.splitlines()
    assert '"kind":"Error"' in refused
    assert "only root" in refused
    assert '"draining":false' in status
    assert sidecar.status().ready


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_both_signals_that_ask_to_end_are_understood(restarted: Hosts, by: signal.Signals) -> None:
    process = process_of(restarted)
    process.popen.send_signal(by)
    assert process.popen.wait(5) == 0


def test_an_admin_socket_left_by_a_killed_sidecar_is_taken_over(restarted: Hosts) -> None:
    sidecar = restarted.sidecar(restarted.web)
    process_of(restarted).kill()
    sidecar.start()
    assert sidecar.status().ready


def test_a_second_sidecar_on_the_same_host_says_what_is_wrong_and_ends(restarted: Hosts) -> None:
    sidecar = restarted.sidecar(restarted.web)
    first = process_of(restarted)
    sidecar.spawn()
    second = process_of(restarted)
    sidecar.process = first
    assert second.popen.wait(10) == 1
    assert "cannot listen on port 15101" in second.output
    assert sidecar.status().pid == first.pid


def test_a_tunnel_that_comes_while_we_drain_is_asked_to_open_no_more_though_orders_were_in_force(
    restarted: Hosts, peer: Peer
) -> None:
    hosts = restarted
    sidecar = hosts.sidecar(hosts.api)
    assert sidecar.process is not None
    with listen(hosts.api, 8080) as server:
        for _ in range(3):
            with_peer(hosts, peer, server)
        held, app = hosts.twin.connect(API, 8080), accept(server)
        sidecar.process.popen.terminate()
        wait_for(lambda: sidecar.status().draining)
        with Peer(hosts.web, hosts.api, peer.sock.context) as other:
            with_peer(hosts, other, server)
            assert isinstance(other.frame(), GoAway)
        converse(held, app)
        assert sidecar.process.popen.wait(10) == 0


def test_a_connection_whose_application_is_being_dialled_is_waited_for(restarted: Hosts, peer: Peer) -> None:
    """Under an order nobody has heard of it yet; its peer is told how it went, and not that it was opened."""
    hosts = restarted
    sidecar = hosts.sidecar(hosts.api)
    assert sidecar.process is not None
    with listen(hosts.api, 8080) as server:
        with_peer(hosts, peer, server)
        server.listen(0)
        with hosts.api.connect(hosts.api.address, 8080):  # takes the only place: nobody else is answered
            request = Open(host=hosts.api.address, port=8080, source=f"{hosts.web.address}:1", id=new_id())
            peer.sock.sendall(peer.wire.open(request))
            sidecar.process.popen.terminate()
            answers = [peer.frame(), peer.frame()]
    assert [type(answer) for answer in answers if not isinstance(answer, GoAway)] == [Refused]
    assert sidecar.process.popen.wait(10) == 0
