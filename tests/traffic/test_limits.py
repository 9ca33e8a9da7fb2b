"""So many connections to a service at once, so many more in a queue, in order."""

from contextlib import ExitStack

import pytest

from meshnet.model.connection import Connection, State
from tests.proxy.programs import Records, read, reason, reset
from tests.traffic.calls import Call, is_reset, waiting, who
from tests.traffic.conftest import Hosts, Name, traffic
from tests.world import wait_for

pytestmark = pytest.mark.netns


def queued(records: Records, count: int) -> list[Connection]:
    """Waits until so many are in the queue."""

    def found() -> list[Connection]:
        return [record for record in records.now() if record.state is State.QUEUED]

    return wait_for(lambda: found() if len(found()) == count else [], what=f"{count} in the queue")


def test_who_comes_too_late_waits_in_turn_and_who_finds_the_queue_full_is_reset(hosts: Hosts, name: Name) -> None:
    limits = {"maxConnections": 2, "maxPending": 2, "queueTimeout": "10s"}
    hosts.write(hosts.service(name, hosts.apis), traffic(name, limits=limits))
    out = Records(hosts.sidecar(hosts.web))
    with hosts.apps(name.port, hosts.apis) as apps, ExitStack() as stack:
        first, second = (stack.enter_context(Call(hosts.web, name)) for _ in range(2))
        third = stack.enter_context(waiting(hosts.web, name))
        queued(out, 1)
        fourth = stack.enter_context(waiting(hosts.web, name))
        queued(out, 2)
        assert is_reset(hosts.web, name)
        assert sum(app.accepted for app in apps.values()) == 2

        first.close()
        assert read(third, 6).startswith(b"api-")
        (last,) = queued(out, 1)
        assert last.source.address.endswith(f":{fourth.getsockname()[1]}")
        second.close()
        assert read(fourth, 6).startswith(b"api-")

    records = out.ended(5)
    refused = next(record for record in records if record.state is State.REFUSED)
    assert reason(refused) == "limit.connections by limit in queue"
    assert (refused.attempts, refused.queue_ms) == ((), None)
    assert hosts.logged(hosts.web, refused.id).reason == refused.reason
    let_in = sorted((record for record in records if record is not refused), key=lambda record: record.opened_at)
    assert {reason(record).split()[0] for record in let_in} == {"ok"}
    assert [record.queue_ms is None for record in let_in] == [True, True, False, False]
    assert all(record.queue_ms < record.connect_ms for record in let_in[2:])  # type: ignore[operator]  # they are set


def test_who_waits_too_long_is_reset(hosts: Hosts, name: Name) -> None:
    hosts.write(hosts.service(name, hosts.apis), traffic(name, limits={"maxConnections": 1, "queueTimeout": "300ms"}))
    out = Records(hosts.sidecar(hosts.web))
    with hosts.apps(name.port, hosts.apis) as apps, Call(hosts.web, name):
        assert is_reset(hosts.web, name)
        assert sum(app.accepted for app in apps.values()) == 1
    late = next(record for record in out.ended(2) if record.state is State.REFUSED)
    assert reason(late) == "limit.queue_timeout by limit in queue"
    assert 300 <= late.duration_ms < 3000
    assert hosts.logged(hosts.web, late.id).reason == late.reason


def test_who_gives_up_in_the_queue_takes_nobodys_place(hosts: Hosts, name: Name) -> None:
    hosts.write(hosts.service(name, hosts.apis), traffic(name, limits={"maxConnections": 1, "queueTimeout": "10s"}))
    out = Records(hosts.sidecar(hosts.web))
    with hosts.apps(name.port, hosts.apis) as apps, ExitStack() as stack:
        holder = stack.enter_context(Call(hosts.web, name))
        impatient = waiting(hosts.web, name)
        queued(out, 1)
        patient = stack.enter_context(waiting(hosts.web, name))
        queued(out, 2)
        reset(impatient)
        holder.close()
        assert read(patient, 6).startswith(b"api-")
        assert sum(app.accepted for app in apps.values()) == 2
    assert sorted(reason(record).split()[0] for record in out.ended(3)) == ["ok", "ok", "peer.rst"]
    gone = next(record for record in out.now() if record.reason and record.reason.code != "ok")
    assert reason(gone) == "peer.rst by client in queue"
    assert gone.attempts == ()


def test_a_raised_limit_lets_in_who_waits_and_a_lowered_one_ends_nothing(hosts: Hosts, name: Name) -> None:
    service = hosts.service(name, hosts.apis)
    hosts.write(service, traffic(name, limits={"maxConnections": 1, "queueTimeout": "10s"}))
    out = Records(hosts.sidecar(hosts.web))
    with hosts.apps(name.port, hosts.apis), ExitStack() as stack:
        first = stack.enter_context(Call(hosts.web, name))
        others = [stack.enter_context(waiting(hosts.web, name)) for _ in range(2)]
        queued(out, 2)
        hosts.write(service, traffic(name, limits={"maxConnections": 3, "queueTimeout": "10s"}))
        assert all(read(each, 6).startswith(b"api-") for each in others)
        hosts.write(service, traffic(name, limits={"maxConnections": 1, "queueTimeout": "100ms"}))
        assert is_reset(hosts.web, name)
        assert first.say("still here") == "still here"
        assert len([record for record in out.now() if record.reason is None]) == 3


def test_a_limit_per_endpoint_spreads_whatever_the_weights_say(hosts: Hosts, name: Name) -> None:
    hosts.write(
        hosts.service(name, hosts.apis, weights=[10, 1, 1]),
        traffic(name, balance="round_robin", limits={"maxConnectionsPerEndpoint": 1}),
    )
    out = Records(hosts.sidecar(hosts.web))
    with hosts.apps(name.port, hosts.apis), ExitStack() as stack:
        calls = [stack.enter_context(Call(hosts.web, name)) for _ in range(3)]
        assert {call.server for call in calls} == {"api-1", "api-2", "api-3"}
        assert is_reset(hosts.web, name)
        freed = calls.pop()
        freed.close()
        wait_for(lambda: hosts.endpoints(name)[freed.server].connections == 0)
        assert who(hosts.web, name) == freed.server
    refused = next(record for record in out.ended(5) if record.reason and record.reason.code != "ok")
    assert reason(refused) == "limit.connections by limit in queue"


def test_the_limits_of_one_caller_are_not_those_of_another(hosts: Hosts, name: Name) -> None:
    limits = {"maxConnections": 1, "maxPending": 1, "queueTimeout": "10s"}
    hosts.write(hosts.service(name, hosts.apis), traffic(name, limits=limits))
    with hosts.apps(name.port, hosts.apis), Call(hosts.web, name), Call(hosts.cron, name) as other:
        assert other.say("hello") == "hello"
