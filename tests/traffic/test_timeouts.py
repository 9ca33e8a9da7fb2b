"""How long a connection may live: idle, half-closed, old, or to an endpoint that is gone or has too many."""

import socket
from contextlib import ExitStack

import pytest

from tests.proxy.programs import Records, accept, listen, read, reason
from tests.traffic.calls import Call
from tests.traffic.conftest import Hosts, Name, traffic
from tests.world import wait_for

pytestmark = pytest.mark.netns


def is_reset(call: Call) -> bool:
    """Whether its peer has ended it, looked at without sending a byte."""
    call.socket.setblocking(False)
    try:
        return not call.socket.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    finally:
        call.socket.settimeout(10)


def is_refused(app: socket.socket) -> bool:
    """Whether what is sent gets nowhere any more."""
    try:
        app.send(b"more")
    except OSError:
        return True
    return False


@pytest.mark.produces("idle")
def test_idle_ends_what_is_quiet_and_leaves_what_speaks(hosts: Hosts, name: Name) -> None:
    hosts.write(hosts.service(name, hosts.apis[:1]), traffic(name, timeouts={"idle": "2s"}))
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(hosts.apis[0]))
    with hosts.apps(name.port, hosts.apis[:1]), Call(hosts.web, name) as quiet, Call(hosts.web, name) as busy:

        def quiet_is_over() -> bool:
            assert busy.say("here") == "here"
            return is_reset(quiet)

        wait_for(quiet_is_over)
        assert busy.say("here") == "here"
    ended = out.ended(2)
    assert [reason(each) for each in ended] == ["idle by policy in data", "ok by client in data"]
    assert ended[0].reason is not None
    assert ended[0].reason.message == "nothing moved for 2 s"
    assert sorted(reason(each).partition(" ")[0] for each in into.ended(2)) == ["idle", "ok"]


@pytest.mark.produces("half_close_timeout")
def test_half_closed_ends_what_one_side_has_forgotten(hosts: Hosts, name: Name) -> None:
    hosts.write(hosts.service(name, hosts.apis[:1]), traffic(name, timeouts={"halfClosed": "2s"}))
    out = Records(hosts.sidecar(hosts.web))
    with ExitStack() as stack:
        server = stack.enter_context(listen(hosts.apis[0], name.port))
        client = stack.enter_context(hosts.web.connect(name.address, name.port))
        app = stack.enter_context(accept(server))
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert read(app, 8) == b"question"
        assert app.recv(1) == b""
        app.sendall(b"a")  # it goes on for a while
        assert read(client, 1) == b"a"
        with pytest.raises(ConnectionResetError):
            read(client, 1)
        wait_for(lambda: is_refused(app))
    assert reason(out.one()) == "half_close_timeout by policy in half-closed"


@pytest.mark.produces("max_age")
def test_max_age_ends_it_when_nothing_moves(hosts: Hosts, name: Name) -> None:
    hosts.write(hosts.service(name, hosts.apis[:1]), traffic(name, timeouts={"maxAge": "2s"}))
    out = Records(hosts.sidecar(hosts.web))
    with hosts.apps(name.port, hosts.apis[:1]), Call(hosts.web, name) as old:
        assert old.say("here") == "here"
        wait_for(lambda: is_reset(old))
    record = out.one()
    assert reason(record) == "max_age by policy in data"
    assert record.duration_ms >= 1600


@pytest.mark.produces("endpoint.removed")
def test_an_endpoint_that_was_taken_out_gets_its_time_and_no_more(hosts: Hosts, name: Name) -> None:
    policy = traffic(name, timeouts={"removed": "2s"})
    hosts.write(hosts.service(name, hosts.apis), policy)
    with hosts.apps(name.port, hosts.apis), ExitStack() as stack:
        back, gone, other = (stack.enter_context(Call(hosts.web, host.address, name.port)) for host in hosts.apis)
        hosts.write(hosts.service(name, hosts.apis[1:]), policy)
        hosts.write(hosts.service(name, hosts.apis), policy)  # the first is back in time
        hosts.write(hosts.service(name, [hosts.apis[0], hosts.apis[2]]), policy)
        assert gone.say("still here") == "still here"
        wait_for(lambda: is_reset(gone))
        assert [call.say("still here") for call in (back, other)] == ["still here"] * 2
    ended = [each for each in hosts.sidecar(hosts.web).connections() if each.endpoint.endswith(f":{name.port}")]
    (removed,) = [each for each in ended if each.endpoint.startswith(hosts.apis[1].address)]
    assert reason(removed) == "endpoint.removed by policy in data"


def test_the_only_endpoint_that_went_and_is_back_in_time_keeps_its_connections(hosts: Hosts, name: Name) -> None:
    policy = traffic(name, timeouts={"removed": "2s"})
    hosts.write(hosts.service(name, hosts.apis[:1]), policy)
    other = hosts.new_name()
    clock = (hosts.service(other, hosts.apis[1:2]), traffic(other, timeouts={"removed": "2s"}))
    hosts.write(hosts.service(name, hosts.apis[:1]), policy, *clock)
    with hosts.apps(name.port, hosts.apis[:1]), hosts.apps(other.port, hosts.apis[1:2]), ExitStack() as stack:
        back = stack.enter_context(Call(hosts.web, name))
        gone = stack.enter_context(Call(hosts.web, other))
        hosts.write(hosts.service(name, []), policy, *clock)
        hosts.write(hosts.service(name, hosts.apis[:1]), policy, hosts.service(other, []), clock[1])
        wait_for(lambda: is_reset(gone))
        assert back.say("still here") == "still here"


@pytest.mark.produces("rebalance")
def test_rebalance_moves_idle_ones_from_who_has_too_many(hosts: Hosts, name: Name) -> None:
    first, service = hosts.apis[0], hosts.service(name, hosts.apis)
    hosts.write(service, traffic(name, rebalance={"above": 1.5, "perMinute": 60}))
    with hosts.apps(name.port, hosts.apis), ExitStack() as stack:
        out = Records(hosts.sidecar(hosts.web))
        calls = [stack.enter_context(Call(hosts.web, first.address, name.port)) for _ in range(12)]
        moved = wait_for(lambda: [call for call in calls if is_reset(call)], timeout=20.0, what="some are ended")
        left = [call for call in calls if call not in moved]
        assert len(left) >= 4  # its share

        def ended() -> list[str]:
            found = [reason(each) for each in out.now() if each.reason]
            return found if len(found) >= len(moved) else []

        assert set(wait_for(ended, what="their records")) == {"rebalance by policy in data"}
        again = [stack.enter_context(Call(hosts.web, name)) for _ in moved]
        assert {call.server for call in again} <= {"api-2", "api-3"}  # however many were moved when we looked
