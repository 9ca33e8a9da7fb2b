"""What `meshnet conns --kill` does to the connections it means, and to no other."""

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from meshnet.model.admin import Accepted, ConnectionKey, Drain, KillConnections, Reload, SetLogLevel
from meshnet.model.connection import Connection
from meshnet_cli.client import ask
from tests.cli.test_up_down import is_mapped
from tests.proxy.conftest import API, PLAIN, Hosts
from tests.proxy.metrics import value
from tests.proxy.programs import Records, accept, converse, ended_by_rst, listen, reason
from tests.world import Sidecar

pytestmark = pytest.mark.netns

OTHER = 4321


def kill(sidecar: Sidecar, *connections: Connection) -> int:
    keys = tuple(
        ConnectionKey(id=it.id, direction=it.direction, opened_at=it.opened_at, source=it.source.address)
        for it in connections
    )
    return ask(sidecar.settings.admin.socket, KillConnections(connections=keys), Accepted).connections


@pytest.mark.produces("admin.killed")
def test_it_is_reset_at_both_ends_and_both_records_say_who_did_it(hosts: Hosts) -> None:
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(hosts.api))
    labels = {"response_flags": "admin.killed", "reporter": "source"}
    before = value(hosts.web, "meshnet_tcp_connections_failed_total", **labels)
    with listen(hosts.api, 8080) as server, hosts.web.connect(API, 8080) as client, accept(server) as app:
        client.sendall(b"hello")
        (record,) = out.open()
        told = json.loads(hosts.sidecar(hosts.web).meshnet("conns", "--to", "api", "--kill", "--yes", "-o", "json"))
        assert (told["reset"], [item["id"] for item in told["items"]]) == (1, [record.id])
        assert ended_by_rst(client)
        assert ended_by_rst(app)
    assert reason(out.one()) == "admin.killed by admin in data"
    assert reason(into.one()) == "admin.killed by peer-proxy in data"
    assert value(hosts.web, "meshnet_tcp_connections_failed_total", **labels) == before + 1
    explained = hosts.sidecar(hosts.web).meshnet("explain", record.id)
    assert "cause       an administrator reset it" in explained


def test_from_the_far_side_too_and_the_client_s_sidecar_hears_why(hosts: Hosts) -> None:
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(hosts.api))
    with listen(hosts.api, 8080) as server, hosts.web.connect(API, 8080) as client, accept(server):
        assert kill(hosts.sidecar(hosts.api), *into.open()) == 1
        assert ended_by_rst(client)
    assert reason(into.one()) == "admin.killed by admin in data"
    assert reason(out.one()) == "admin.killed by peer-proxy in data"


@pytest.mark.parametrize(("address", "port"), [(PLAIN, 6000), (API, 8080)], ids=["plain", "mtls"])
def test_one_that_an_order_began_and_not_the_one_beside_it(hosts: Hosts, address: str, port: int) -> None:
    host = hosts.outside if address == PLAIN else hosts.api
    with listen(host, port) as server, ExitStack() as stack:
        for _ in range(3):
            converse(hosts.web.connect(address, port), accept(server))
        out = Records(hosts.sidecar(hosts.web))
        pairs = {}
        for _ in range(2):
            client, app = stack.enter_context(hosts.web.connect(address, port)), stack.enter_context(accept(server))
            pairs["{}:{}".format(*client.getsockname())] = (client, app)
        first, second = out.open(2)
        assert kill(hosts.sidecar(hosts.web), first) == 1
        for sock in pairs[first.source.address]:
            assert ended_by_rst(sock)
        converse(*pairs[second.source.address])
        ends = {each.id: reason(each).partition(" ")[0] for each in out.ended(2)}
    assert ends == {first.id: "admin.killed", second.id: "ok"}


def test_who_has_the_same_id_only_is_not_meant(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server, hosts.web.connect(API, 8080) as client, accept(server) as app:
        (record,) = out.open()
        for changed in ({"opened_at": "2020-01-01T00:00:00.000Z"}, {"id": "k7f2"}):
            assert kill(hosts.sidecar(hosts.web), msgspec.structs.replace(record, **changed)) == 0
        converse(client, app)
        assert kill(hosts.sidecar(hosts.web), out.one()) == 0


def test_others_than_root_and_its_own_user_may_not(hosts: Hosts) -> None:
    if not is_mapped(OTHER):
        return  # there is no user but ours
    path = Path(hosts.sidecar(hosts.web).settings.admin.socket)
    path.chmod(0o666)
    try:
        for request in (KillConnections(connections=()), Drain(), Reload(), SetLogLevel(level="debug")):
            answer = json.loads(asked_by(OTHER, path, msgspec.json.encode(request) + b"\n"))
            assert answer["kind"] == "Error"
            assert answer["error"] == "only root and the sidecar's own user may change what it does; others may look"
        assert json.loads(asked_by(OTHER, path, b'{"type":"status"}\n'))["kind"] == "Status"
    finally:
        path.chmod(0o600)


def asked_by(user: int, path: Path, request: bytes) -> bytes:
    """What another user gets to hear, who is in the socket's folder already: what leads there is closed to others."""
    return subprocess.run(
        ["perl", "-MIO::Socket::UNIX", "-e", _ASK, path.name, request],
        cwd=path.parent,
        user=user,
        group=user,
        extra_groups=[],
        capture_output=True,
        check=True,
        timeout=10,
    ).stdout


# Python itself may be where others cannot get to.
_ASK = "$s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die $!; print $s $ARGV[1]; $s->flush; print scalar <$s>"
