"""A host runs out: of descriptors, of ports, of places to track connections."""

import select
import socket
from collections.abc import Sequence
from contextlib import ExitStack

import msgspec
import pytest

from meshnet_cli.check import Findings
from meshnet_cli.finding import Finding
from tests.faults.causes import SECRET, descriptors, ports, without_tunnels
from tests.faults.conftest import once
from tests.faults.stream import Stream
from tests.faults.tracked import full_table
from tests.proxy.programs import Records, accept, ask, echo, listen, read, reason, reset
from tests.traffic.calls import is_reset
from tests.traffic.conftest import Hosts, Name, traffic
from tests.world import Host, wait_for

pytestmark = pytest.mark.netns

PATIENT = {"failures": 1_000_000}
MANY = 12


def answered(clients: Sequence[socket.socket], seconds: float) -> tuple[list[socket.socket], list[socket.socket]]:
    """Those that hear in time what they have said, and those that are reset; the others wait still."""
    heard, failed, waiting = [], [], list(clients)
    while waiting and (ready := select.select(waiting, [], [], seconds)[0]):
        for client in ready:
            waiting.remove(client)
            try:
                assert read(client, len(SECRET)) == SECRET
                heard.append(client)
            except ConnectionResetError:
                failed.append(client)
    return heard, failed


def said(host: Host, name: Name, stack: ExitStack) -> socket.socket | None:
    """A client that has said something; None if it was reset by then, be it at the end of connect()."""
    try:
        client = stack.enter_context(host.connect(name.address, name.port))
        client.sendall(SECRET)
    except ConnectionResetError:
        return None
    return client


@pytest.mark.parametrize(
    ("side", "reasons"),
    [
        ("web", {"limit.host by limit in tls"}),
        ("api", {"limit.host by peer-proxy in connect", "tls.handshake by proxy in tls"}),
    ],
)
def test_without_descriptors_what_is_open_goes_on_and_later_all_are_served_again(
    hosts: Hosts, name: Name, side: str, reasons: set[str]
) -> None:
    api, echoes = hosts.apis[0], hosts.new_name()
    hosts.write(
        hosts.service(name, [api]),
        hosts.service(echoes, [api]),
        traffic(echoes, connect={"attempts": 1, "attemptTimeout": "300ms"}, breaker=PATIENT),
    )
    short = hosts.sidecar(hosts.world.hosts[side])
    with (
        listen(api, name.port) as server,
        echo(api, echoes.port),
        Stream(hosts.web.connect(name.address, name.port), accept(server)) as stream,
        ExitStack() as stack,
    ):
        out = Records(hosts.sidecar(hosts.web))
        with descriptors(short, 7):
            begun = [said(hosts.web, echoes, stack) for _ in range(MANY)]
            clients = [client for client in begun if client is not None]
            heard, failed = answered(clients, 1.0)
            assert len(heard) < MANY
            for client in heard:
                client.sendall(SECRET)
            assert answered(heard, 5.0) == (heard, [])
            stream.moves()
        late, failed_late = answered([client for client in clients if client not in (*heard, *failed)], 1.0)
        for client in (*heard, *late):
            reset(client)
        records = out.ended(MANY)
        assert {reason(record) for record in records} - {"peer.rst by client in data"} <= reasons
        assert len([record for record in records if "peer.rst" not in reason(record)]) == (
            len(failed + failed_late) + begun.count(None)
        )
        for _ in range(3):
            assert ask(hosts.web, echoes.address, echoes.port, SECRET) == SECRET


def test_an_endpoint_whose_sidecar_is_short_of_descriptors_is_left_for_another_and_not_blamed(
    hosts: Hosts, name: Name
) -> None:
    api, twin = hosts.apis
    hosts.write(hosts.service(name, [api, twin]), traffic(name, balance="round_robin"))
    with echo(api, name.port), echo(twin, name.port):
        for _ in range(2):
            assert ask(hosts.web, name.address, name.port, SECRET) == SECRET  # from now on there is a tunnel to each
        out = Records(hosts.sidecar(hosts.web))
        with descriptors(hosts.sidecar(api), 0):
            for _ in range(4):
                assert ask(hosts.web, name.address, name.port, SECRET) == SECRET
        tried = [[attempt.result for attempt in record.attempts] for record in out.ended(4)]
        assert ["limit.host", "ok"] in tried
        assert {view.failures for view in hosts.endpoints(name).values()} == {0}
        for _ in range(4):
            assert ask(hosts.web, name.address, name.port, SECRET) == SECRET
    assert {len(record.attempts) for record in out.ended(8)[4:]} == {1}


def connect_from(host: Host, port: int, name: Name) -> socket.socket:
    """Where no port is left for a client to be given."""
    client = host.open_socket()
    client.settimeout(5.0)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.bind((host.address, port))
    client.connect((name.address, name.port))
    return client


@once
@pytest.mark.parametrize("meshed", [True, False])
@pytest.mark.produces("limit.host")
def test_without_ports_another_endpoint_is_tried_and_none_is_blamed(hosts: Hosts, name: Name, meshed: bool) -> None:
    api, twin = hosts.apis
    alone = hosts.new_name()
    hosts.write(
        hosts.mesh.service(alone.name, [alone.port], [api], addresses=[alone.address], meshed=meshed),
        hosts.mesh.service(name.name, [alone.port], [api, twin], addresses=[name.address], meshed=meshed),
    )
    without_tunnels(hosts)
    out = Records(hosts.sidecar(hosts.web))
    with ExitStack() as stack:
        for host in hosts.apis:
            stack.enter_context(echo(host, alone.port))
        stack.enter_context(ports(hosts.web, 50000, 50004))
        clients = []
        while len(clients) < 10 and not _is_refused(out):
            clients.append(stack.enter_context(connect_from(hosts.web, 40000 + len(clients), alone)))
            clients[-1].sendall(SECRET if meshed else b"plain")
            wait_for(lambda: _all_decided(out, len(clients)), what="what becomes of it")
        (refused,) = [record for record in out.now() if record.reason is not None]
        assert reason(refused) == "limit.host by limit in " + ("tls" if meshed else "connect")
        assert len(clients) <= 6
        # Ports are short for one endpoint at a time: another may still be reached.
        both = Name(name.name, name.address, name.address6, alone.port)
        with connect_from(hosts.web, 41000, both) as client:
            client.sendall(b"still here")
            assert read(client, 10) == b"still here"
        assert {view.failures for view in hosts.endpoints(alone).values()} == {0}
        for client in clients:
            reset(client)
        wait_for(lambda: all(each.reason for each in out.now()))
    assert is_reset(hosts.web, alone)  # for nobody listens any more, and no longer for want of a port
    assert "limit.host" not in reason(out.now()[-1])


def _all_decided(out: Records, count: int) -> bool:
    found = out.now()
    return len(found) == count and all(each.reason or each.connect_ms for each in found)


def _is_refused(out: Records) -> bool:
    return any(record.reason is not None for record in out.now())


@once
def test_a_full_table_of_connections_costs_new_ones_and_none_that_is_open(hosts: Hosts, name: Name) -> None:
    """k8s#71261. Where the endpoint is: who calls it hears nothing, as when its host is gone."""
    api = hosts.apis[0]
    hosts.write(
        hosts.service(name, [api]),
        traffic(name, connect={"attempts": 1, "attemptTimeout": "300ms"}, breaker=PATIENT),
    )
    without_tunnels(hosts)
    with (
        listen(api, name.port) as server,
        hosts.web.connect(name.address, name.port) as client,
        accept(server) as app,
        full_table(api) as table,
    ):
        out = Records(hosts.sidecar(hosts.web))
        # A place may become free meanwhile, and somebody get it.
        wait_for(lambda: table.fill() or is_reset(hosts.web, name), timeout=60.0, what="that somebody finds no place")
        assert reason(out.now()[-1]) == "connect.timeout by proxy in tls"
        client.sendall(SECRET)
        assert read(app, len(SECRET)) == SECRET
        assert _finding(api, "conntrack.room").level == "warning"
    with echo(api, name.port):
        assert ask(hosts.web, name.address, name.port, SECRET) == SECRET
    assert _finding(api, "conntrack.room").level == "ok"


@once
def test_a_full_table_where_the_client_is_lets_no_new_connection_out_and_none_past_the_mesh(
    hosts: Hosts, name: Name
) -> None:
    """Nobody hears of those, as the kernel drops the packet that would open one; `meshnet check` says why."""
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]))
    with echo(api, name.port), hosts.web.connect(name.address, name.port) as client:
        with full_table(hosts.web) as table:
            client.sendall(SECRET)
            assert read(client, len(SECRET)) == SECRET
            wait_for(lambda: table.fill() or _gets_no_answer(hosts.web, name), timeout=60.0)
            finding = _finding(hosts.web, "conntrack.room")
            assert (finding.level, finding.what.endswith("the table is nearly full")) == ("warning", True)
        assert ask(hosts.web, name.address, name.port, SECRET) == SECRET
        client.sendall(SECRET)
        assert read(client, len(SECRET)) == SECRET


def _gets_no_answer(host: Host, name: Name) -> bool:
    try:
        host.connect(name.address, name.port, timeout=0.5).close()
    except TimeoutError:
        return True
    return False


def _finding(host: Host, code: str) -> Finding:
    said = host.run("meshnet", "check", "-o", "json", check=False).stdout
    (found,) = [each for each in msgspec.json.decode(said, type=Findings).items if each.code == code]
    return found
