"""Every connection ends in exactly one record, in the list and in the access log, whatever became of it."""

import threading
from collections import Counter
from functools import partial

import msgspec
import pytest

from meshnet.model.admin import ConnectionEvent, FollowConnections
from meshnet.model.connection import Connection
from meshnet.model.resource import API_VERSION, AccessPolicy, AccessPolicySpec, Metadata
from meshnet.model.service import Action, Rule, Target
from meshnet_cli.client import stream
from tests.proxy.conftest import API, PAIR, PLAIN, Hosts
from tests.proxy.metrics import value
from tests.proxy.programs import (
    Records,
    accept,
    ask,
    converse,
    echo,
    is_reset,
    listen,
    read,
    reason,
    reset,
)
from tests.world import Host, ProgramFailed, wait_for

pytestmark = pytest.mark.netns

STORM = 324


def logged(hosts: Hosts, host: Host) -> list[Connection]:
    """The access log, all of it."""
    lines = [line for line in hosts.log(host).splitlines() if line.startswith('{"id"')]
    return [msgspec.json.decode(line, type=Connection) for line in lines]


@pytest.mark.produces("ok")
def test_what_ended_long_ago_is_listed_and_explained_as_it_was(hosts: Hosts) -> None:
    """Most of them came and went under an order; all but the last few are packed by then."""
    web = hosts.sidecar(hosts.web)
    hosts.write(hosts.mesh.service("pair", [7000], [hosts.twin], addresses=[PAIR]))
    out, count = Records(web), 300
    with echo(hosts.twin, 7000):
        for _ in range(count):
            assert ask(hosts.web, PAIR, 7000) == b"question"
        assert is_reset(hosts.web, hosts.outside.address, 4)
        found = out.ended(count + 1)
        wait_for(lambda: {each.id for each in found} <= {each.id for each in logged(hosts, hosts.web)})
        told = {each.id: each for each in logged(hosts, hosts.web)}
        assert found == [told[each.id] for each in found]
        assert set(web.meshnet("conns", "--since", "1h", "-o", "name").split()) >= {each.id for each in found}
        ordered = [each for each in found if each.ordered]
        assert len(ordered) > count // 2
        said = web.meshnet("explain", ordered[0].id)
    assert "order: decided before" in said
    assert f"attempt 1: {ordered[0].endpoint} ok after {ordered[0].attempts[0].ms:g} ms" in said


def test_a_storm_of_every_kind_of_connection_leaves_one_record_each(hosts: Hosts) -> None:
    nobody = AccessPolicy(
        api_version=API_VERSION,
        metadata=Metadata(name="nobody"),
        spec=AccessPolicySpec(action=Action.DENY, services=("denied",), rules=(Rule(target=Target(ports=(9999,))),)),
    )
    denied = hosts.mesh.service("denied", [9999], [hosts.twin], addresses=["10.96.0.50"])
    hosts.write(hosts.mesh.service("pair", [7000], [hosts.twin], addresses=[PAIR]), denied, nobody)
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(hosts.twin))

    def answered() -> None:
        assert ask(hosts.web, PAIR, 7000) == b"question"

    def reset_by_client() -> None:
        with hosts.web.connect(PAIR, 7000) as client:
            client.sendall(b"x")
            assert client.recv(1)
            reset(client)

    def refused() -> None:
        assert is_reset(hosts.web, hosts.outside.address, 4)

    def denied_by_policy() -> None:
        assert is_reset(hosts.web, "10.96.0.50", 9999)

    def given_up() -> None:
        reset(hosts.web.connect(PAIR, 7000))

    def plain() -> None:
        assert ask(hosts.web, PLAIN, 6000) == b"question"

    kinds = [answered, reset_by_client, refused, denied_by_policy, given_up, plain]
    failures: list[BaseException] = []

    def carry_on(first: int) -> None:
        try:
            for number in range(first, first + STORM // len(kinds)):
                kinds[number % len(kinds)]()
        except BaseException as error:
            failures.append(error)

    with echo(hosts.twin, 7000), echo(hosts.outside, 6000), echo(hosts.twin, 9999):
        threads = [threading.Thread(target=carry_on, args=(first,)) for first in range(len(kinds))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        found = {record.id: record for record in out.ended(STORM)}
        wait_for(lambda: hosts.sidecar(hosts.twin).status().open_connections == 0)

    assert len(found) == STORM
    codes = Counter(reason(record).partition(" ")[0] for record in found.values())
    of_each = STORM // len(kinds)
    assert codes == {
        "ok": 2 * of_each,
        "peer.rst": 2 * of_each,
        "connect.refused": of_each,
        "authz.denied": of_each,
    }

    # The access log says the same, a line for each.
    lines = wait_for(lambda: lines_of(hosts, hosts.web, set(found), STORM))
    assert {line.id: reason(line) for line in lines} == {key: reason(record) for key, record in found.items()}

    # The other sidecar has one record for each that reached it, and tells the same of those that went well.
    there = {record.id: record for record in into.now()}
    assert len(there) == len(into.now())
    assert there.keys() <= found.keys()
    well = {key for key, record in found.items() if record.tls.mode == "mtls" and reason(record).startswith("ok")}
    assert {reason(there[key]) for key in well} == {"ok by client in data"}
    assert len(wait_for(lambda: lines_of(hosts, hosts.twin, set(there), len(there)))) == len(there)


def lines_of(hosts: Hosts, host: Host, ids: set[str], count: int) -> list[Connection]:
    """The lines of the access log about these connections, when there are as many."""
    lines = [line for line in logged(hosts, host) if line.id in ids]
    return lines if len(lines) >= count else []


def test_bytes_and_metrics_move_while_a_connection_is_open(hosts: Hosts) -> None:
    labels = {"destination_service": "api:8080", "reporter": "source"}
    out = Records(hosts.sidecar(hosts.web))

    names = ("sent_bytes_total", "received_bytes_total", "connections_open", "connections_opened_total")

    def counts() -> list[float]:
        return [value(hosts.web, f"meshnet_tcp_{name}", **labels) for name in names]

    before = counts()

    def seen() -> list[float]:
        return [now - then for now, then in zip(counts(), before, strict=True)]

    def moved(received: int) -> bool:
        return out.now()[0].bytes_received == received

    with listen(hosts.api, 8080) as server, hosts.web.connect(API, 8080) as client, accept(server) as app:
        for round_ in (1, 2):
            client.sendall(b"x" * 1000)
            assert read(app, 1000)
            app.sendall(b"y" * 3000)
            assert read(client, 3000)
            wait_for(partial(moved, 3000 * round_))
            assert (out.now()[0].bytes_sent, out.now()[0].bytes_received) == (1000 * round_, 3000 * round_)
            assert [now - then for now, then in zip(seen(), before, strict=True)] == [
                1000 * round_,
                3000 * round_,
                1,
                1,
            ]
    out.one()
    assert [now - then for now, then in zip(seen(), before, strict=True)] == [2000, 6000, 0, 1]


def test_a_follower_hears_of_what_is_open_and_then_of_each_beginning_and_end(hosts: Hosts) -> None:
    path = hosts.sidecar(hosts.web).settings.admin.socket
    with listen(hosts.api, 8080) as server:
        client, app = hosts.web.connect(API, 8080), accept(server)
        Records(hosts.sidecar(hosts.web))
        events = stream(path, FollowConnections(), ConnectionEvent)
        already = next(events)
        assert already.event == "open"
        converse(hosts.web.connect(API, 8080), accept(server))
        opened, closed = next(events), next(events)
        assert [opened.event, closed.event] == ["open", "close"]
        assert opened.connection is not None
        assert closed.connection is not None
        assert opened.connection.id == closed.connection.id
        assert opened.connection.reason is None
        assert reason(closed.connection) == "ok by client in data"
        assert is_reset(hosts.web, hosts.outside.address, 4)
        failed = next(events)
        assert failed.event == "fail"
        converse(client, app)
        ended = next(events)
        assert already.connection is not None
        assert ended.connection is not None
        assert (ended.event, ended.connection.id) == ("close", already.connection.id)


def test_the_access_log_has_what_the_list_has(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server:
        converse(hosts.web.connect(API, 8080), accept(server))
    record = out.one()
    assert wait_for(lambda: lines_of(hosts, hosts.web, {record.id}, 1)) == [record]


def test_explain_tells_a_connection_step_by_step(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server:
        converse(hosts.web.connect(API, 8080), accept(server))
    record = out.one()
    told = hosts.sidecar(hosts.web).meshnet("explain", record.id)
    for word in (record.id, "api:8080", hosts.mesh.identity("api"), f"{hosts.api.address}:8080", "ok"):
        assert word in told


def test_an_id_nobody_has_is_not_explained(hosts: Hosts) -> None:
    with pytest.raises(ProgramFailed, match="no connection 00000000 here"):
        hosts.sidecar(hosts.web).meshnet("explain", "00000000")
