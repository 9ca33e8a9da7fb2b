"""When Python hears of a connection under an order, and what such a one gets if it lasts."""

import os
import select
import socket
from typing import Any

import pytest

from meshnet.relay import Facts
from meshnet.relay.native._core import Core
from meshnet.relay.rows import ROW, Row
from tests.relay.native.heard import PASSED
from tests.relay.native.test_orders import BEGUN, CONNECTED, Gate, closed_gate, converse
from tests.relay.native.test_orders import gate as gate  # the fixture
from tests.world import Host, wait_for

pytestmark = pytest.mark.netns


def told(core: Core) -> list[tuple[Any, int, Any]]:
    """What the core rings for; nothing that is only there to be asked for."""

    def rung() -> list[Any]:
        return core.news() if select.select([core.fileno()], [], [], 0.1)[0] else []

    return wait_for(rung, what="the bell")


def test_what_was_over_soon_is_told_once(gate: Gate) -> None:
    gate.order()
    converse(gate.client(), gate.app())
    ((_, kind, facts),) = told(gate.core)
    assert (kind, Row._make(ROW.unpack(facts[0])).sent) == (PASSED, 8)


def test_what_lasts_is_told_without_being_asked_for(gate: Gate) -> None:
    gate.order()
    with gate.client(), gate.app():
        ((_, kind, link),) = told(gate.core)
        assert kind == BEGUN
        assert Facts(*link.facts()).connected
        link.await_end("its end")
    wait_for(lambda: "its end" in gate.core.news())


def test_what_was_asked_for_is_not_told_again(gate: Gate) -> None:
    gate.order()
    with gate.client(), gate.app():
        begun = wait_for(lambda: [about for _, kind, about in gate.core.news(True) if kind == BEGUN])
        assert gate.core.news(True) == []
        begun[0].await_end("its end")
    # In between it grows, which is nothing to tell.
    news = [said for said in told(gate.core) if not isinstance(said, tuple) or said[1] != CONNECTED]
    assert news == ["its end"]


def test_what_lasts_asks_now_and_then_whether_its_endpoint_lives(gate: Gate) -> None:
    gate.order()
    with gate.client(), gate.app():
        (leg,) = wait_for(lambda: legs_to(gate.server.getsockname()))
        with leg:
            wait_for(lambda: leg.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            wait_for(lambda: leg.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 6)
            assert 25 <= leg.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) < 36


def test_what_lasts_tells_its_port_to_whoever_looks(gate: Gate) -> None:
    gate.order()
    client, (app, leg) = gate.client(), gate.server.accept()
    link = wait_for(lambda: [about for _, kind, about in gate.core.news(True) if kind == BEGUN])[0]
    wait_for(link.leg_port, what="the port of its endpoint leg")
    assert link.leg_port() == leg[1]
    link.await_end("its end")
    client.close()
    app.close()
    wait_for(lambda: "its end" in gate.core.news())
    assert link.leg_port() == leg[1]


def test_one_on_this_host_tells_it_too(gate: Gate) -> None:
    gate.order(local=True)
    with gate.client():
        app, leg = gate.server.accept()
        (link,) = gate.until(1, BEGUN)
        with app:
            wait_for(link.leg_port, what="the port of its endpoint leg")
            assert link.leg_port() == leg[1]


def legs_to(address: tuple[str, int]) -> list[socket.socket]:
    """Copies of this process's connections there."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            copy = socket.socket(fileno=os.dup(int(entry)))
        except OSError:
            continue  # no socket, or gone
        try:
            is_there = copy.getpeername() == address
        except OSError:
            is_there = False
        if is_there:
            found.append(copy)
        else:
            copy.close()
    return found


def test_what_a_client_has_said_already_comes_with_the_connection(host: Host) -> None:
    with closed_gate(host) as gate:
        gate.order()
        clients = [gate.client() for _ in range(50)]
        for client in clients:
            client.sendall(b"at once")
        door = gate.open()
        for client in clients:
            app = gate.app()
            with client, app:
                assert app.recv(64, socket.MSG_DONTWAIT) == b"at once"
                app.sendall(b"answered")
                assert client.recv(64) == b"answered"
        assert [facts.sent for facts in gate.facts(50)] == [7] * 50
        door.close()


def test_what_a_client_has_said_already_is_given_back_with_it(host: Host) -> None:
    with closed_gate(host) as gate, socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        gate.order(target=unused.getsockname())
        with gate.client() as client:
            client.sendall(b"not lost")
            door = gate.open()
            (facts,) = gate.facts()
            assert (facts.early, facts.sent) == (b"not lost", 0)
            with socket.socket(fileno=facts.client) as near:
                near.sendall(b"thanks")
                assert client.recv(64) == b"thanks"
        door.close()
