"""Connections that the core accepts and dials by itself: redirected ones, on the core, with real kernel rules."""

import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from meshnet.relay import Facts
from meshnet.relay.native._core import Core, Link, Listener, Order
from meshnet.relay.native.reasons import ENDED_BY, REASONS
from meshnet.relay.rows import Rows
from tests.relay.native.heard import PASSED, facts_of
from tests.relay.rig import no_descriptors_leaked
from tests.world import Host, wait_for

pytestmark = pytest.mark.netns

DIALLED, ELSEWHERE = ("127.0.0.9", 7000), ("127.0.0.9", 7001)
DIALLED6 = ("fd09::9", 7000)
BEGUN, CONNECTED, ENDED, ACCEPTED, STUCK = range(5)
OUTBOUND, INBOUND = 0, 1
OK, ABORTED, PEER_RST = 0, 1, 2
NOBODY_LISTENS = ("127.0.0.1", 9)


@dataclass
class Gate:
    """A core with a listener that everything for 127.0.0.9 is redirected to, and an application on port 8080."""

    host: Host
    core: Core
    server: socket.socket
    listener: socket.socket
    heard: list[tuple[Any, int, Any]] = field(default_factory=list)
    links: list[tuple[str, Link]] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)

    def open(self) -> Listener:
        return self.core.listen(os.dup(self.listener.fileno()), OUTBOUND, False, "door")

    def order(self, original: tuple[str, int] = DIALLED, source: str = "127.0.0.1", **more: Any) -> Order:
        target = more.pop("target", self.server.getsockname()[:2])
        places, patience = more.pop("places", 1000), more.pop("patience", 5.0)
        waiter, direction = more.pop("waiter", "order"), more.pop("direction", OUTBOUND)
        local = more.pop("local", False)
        order = self.core.order(direction, 0, source, original, target, 0, local, patience, places, None, waiter)
        self.orders.append(order)
        return order

    def client(self, to: tuple[str, int] = DIALLED) -> socket.socket:
        return self.host.connect(*to)

    def app(self) -> socket.socket:
        app, _ = self.server.accept()
        app.settimeout(5)
        return app

    def hear(self) -> None:
        for said in self.core.news(True):
            if isinstance(said, tuple) and said[1] == PASSED:
                rows, cipher, ended_by = said[2]
                passed = facts_of(Rows(rows, cipher, ENDED_BY[ended_by]))
                self.heard += [(said[0], ENDED, about) for about in passed]
            elif isinstance(said, tuple):
                self.heard.append(said)
                if said[1] == BEGUN:
                    said[2].await_end(f"link {len(self.links)}")
                    self.links.append((f"link {len(self.links)}", said[2]))
            else:
                (link,) = [link for name, link in self.links if name == said]
                self.heard.append((said, ENDED, link.facts()))

    def until(self, count: int, what: int = ENDED) -> list[Any]:
        """What was said of `count` things that have happened."""

        def enough() -> list[Any]:
            self.hear()
            found = [about for _, kind, about in self.heard if kind == what]
            return found if len(found) >= count else []

        found = wait_for(enough, what=f"{count} news of kind {what}") if count else []
        assert len(found) == count, found
        return found

    def facts(self, count: int = 1) -> list[Facts]:
        return [Facts(*about) for about in self.until(count)]


@contextmanager
def closed_gate(host: Host) -> Iterator[Gate]:
    """One whose core has not been told of the listener yet."""
    with host.entered():  # the thread dials where it was made
        core = Core((b"",) * len(REASONS), "gate")
        server = socket.create_server(("127.0.0.1", 0), backlog=100)
        listener = socket.create_server(("127.0.0.1", 15101), backlog=4096)
    listener.setblocking(False)
    server.settimeout(5)
    with server, listener:
        gate = Gate(host, core, server, listener)
        yield gate
    for order in gate.orders:
        order.revoke()  # one in force is kept by its core
    core.stop()
    core.news()


@pytest.fixture
def gate(host: Host) -> Iterator[Gate]:
    with closed_gate(host) as gate:
        door = gate.open()
        yield gate
        door.close()


def converse(client: socket.socket, app: socket.socket) -> None:
    client.sendall(b"question")
    assert app.recv(64) == b"question"
    app.sendall(b"the answer")
    assert client.recv(64) == b"the answer"
    client.close()
    assert app.recv(1) == b""
    app.close()


def test_what_no_order_covers_is_for_python(gate: Gate) -> None:
    gate.order(ELSEWHERE)
    gate.order(source="127.0.0.2")
    gate.order(direction=INBOUND)
    with gate.client() as client:
        ((fd, family, host, port),) = gate.until(1, ACCEPTED)
        assert (family, host, port) == (socket.AF_INET, *client.getsockname())
        with socket.socket(fileno=fd) as near:
            assert not os.get_blocking(fd)
            assert not os.get_inheritable(fd)
            near.setblocking(True)
            client.sendall(b"x")
            assert near.recv(1) == b"x"


def test_what_an_order_covers_is_carried_and_told_when_it_is_over(gate: Gate) -> None:
    gate.order()
    before = time.monotonic()
    client = gate.client()
    port = client.getsockname()[1]
    converse(client, gate.app())
    (facts,) = gate.facts()
    assert (facts.port, facts.sent, facts.received, facts.reason, facts.error) == (port, 8, 10, OK, 0)
    assert (facts.client_done, facts.endpoint_done, facts.owes, facts.client) == (True, True, False, -1)
    assert before - 0.1 < facts.opened <= facts.connected <= facts.moved_at <= facts.ended <= time.monotonic()


def test_an_order_for_ipv6(gate: Gate) -> None:
    with gate.host.entered():
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
        listener = socket.create_server(("::1", 15101), family=socket.AF_INET6)
    listener.setblocking(False)
    handle = gate.core.listen(os.dup(listener.fileno()), OUTBOUND, False, "door6")
    with server, listener:
        with gate.client(DIALLED6) as client:
            ((fd, family, host, port),) = gate.until(1, ACCEPTED)
            os.close(fd)
            assert (family, host, port) == (socket.AF_INET6, *client.getsockname()[:2])
        gate.order(DIALLED6, source=host, target=server.getsockname()[:2])
        converse(gate.client(DIALLED6), server.accept()[0])
        assert gate.facts()[0].reason == OK
    handle.close()


def test_one_that_goes_on_is_told_while_it_does(gate: Gate) -> None:
    gate.order()
    client, app = gate.client(), gate.app()
    (link,) = gate.until(1, BEGUN)
    wait_for(lambda: Facts(*link.facts()).connected)
    client.sendall(b"12345")
    assert app.recv(5) == b"12345"
    wait_for(lambda: link.counts()[:4] == (5, 0, False, False), what="they are counted: a moment behind the send")
    with pytest.raises(RuntimeError, match="not ended"):
        link.result()
    app.close()
    assert client.recv(1) == b""
    client.close()
    assert gate.facts()[0].sent == 5
    assert link.result()[:3] == (OK, 1, 0)


def test_one_that_goes_on_can_be_aborted(gate: Gate) -> None:
    gate.order()
    client, app = gate.client(), gate.app()
    (link,) = gate.until(1, BEGUN)
    link.abort(b"")
    for end in (client, app):
        with pytest.raises(ConnectionResetError):
            end.recv(1)
        end.close()
    assert gate.facts()[0].reason == ABORTED


def test_a_reset_by_the_application_is_one_for_the_client(gate: Gate) -> None:
    gate.order()
    client, app = gate.client(), gate.app()
    (link,) = gate.until(1, BEGUN)
    wait_for(lambda: Facts(*link.facts()).connected)  # a reset before that is a dial that has failed
    app.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    app.close()
    with client, pytest.raises(ConnectionResetError):
        client.recv(1)
    (facts,) = gate.facts()
    assert (facts.reason, facts.ended_by) == (PEER_RST, 1)


def test_a_client_whose_endpoint_refuses_is_given_back_whole(gate: Gate) -> None:
    gate.order(target=NOBODY_LISTENS)
    with no_descriptors_leaked(), gate.client() as client:
        client.sendall(b"not lost")
        (facts,) = gate.facts()
        assert os.strerror(facts.error) == "Connection refused"
        assert (facts.connected, facts.sent, facts.received) == (0, 0, 0)
        with socket.socket(fileno=facts.client) as near:
            near.settimeout(5)
            assert (facts.early or near.recv(64)) == b"not lost"
            near.sendall(b"thanks")
        assert client.recv(64) == b"thanks"


@pytest.fixture
def silent(gate: Gate) -> Iterator[tuple[str, int]]:
    """An address where nobody answers: the queue of its listener is full, so SYNs are dropped."""
    with gate.host.entered():
        full = socket.create_server(("127.0.0.1", 0), backlog=0)
        waiting = socket.create_connection(full.getsockname())
    with full, waiting:
        yield full.getsockname()


def test_a_client_whose_endpoint_is_silent_is_given_back_in_time(gate: Gate, silent: tuple[str, int]) -> None:
    """Each in its own time: the second, shorter one does not wait for the first."""
    gate.order(target=silent, patience=3.0)
    gate.order(ELSEWHERE, target=silent, patience=0.2)
    with gate.client(), gate.client(ELSEWHERE):
        facts = gate.facts(1)[0]
        assert os.strerror(facts.error) == "Connection timed out"
        assert 0.2 <= facts.ended - facts.opened < 2.5
        os.close(facts.client)
        assert [about for _, kind, about in gate.heard if kind == BEGUN], "who dials for long is seen dialling"
        other = gate.facts(2)[1]
        assert other.ended - other.opened >= 3.0
        os.close(other.client)


def test_an_endpoint_that_is_up_is_not_given_up_though_nobody_has_looked_in_time(gate: Gate) -> None:
    """As on a busy host: to dial it anew would have it see a connection that comes and goes."""
    gate.order(patience=0.0)  # over before the first look; on this host it is connected at once
    with gate.client() as client, gate.app() as app:
        converse(client, app)
    (facts,) = gate.facts()
    assert (facts.reason, facts.client) == (OK, -1)


def test_a_client_that_gives_up_while_its_endpoint_is_dialled(gate: Gate, silent: tuple[str, int]) -> None:
    gate.order(target=silent)
    client = gate.client()
    gate.until(1, BEGUN)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    (facts,) = gate.facts()
    assert (facts.reason, facts.ended_by, facts.client, facts.connected) == (PEER_RST, 0, -1, 0)


def test_what_comes_when_every_place_is_taken_is_for_python(gate: Gate) -> None:
    order = gate.order(places=2)
    open_ones = [(gate.client(), gate.app()) for _ in range(2)]
    assert order.state()[:2] == (2, 2)
    with gate.client():
        os.close(gate.until(1, ACCEPTED)[0][0])
    converse(*open_ones.pop())
    gate.facts(1)
    assert order.state()[:2] == (2, 1)
    open_ones.append((gate.client(), gate.app()))
    order.widen(1)
    open_ones.append((gate.client(), gate.app()))
    assert order.state()[:2] == (3, 3)
    for client, app in open_ones:
        converse(client, app)
    gate.facts(4)
    assert order.state()[:2] == (3, 0)


def test_a_revoked_order_says_what_it_did_not_use_and_its_links_owe_the_rest(gate: Gate) -> None:
    order = gate.order(places=10)
    converse(gate.client(), gate.app())
    gate.facts(1)
    open_ones = [(gate.client(), gate.app()) for _ in range(3)]
    assert order.revoke() == 7
    assert order.revoke() is None
    with gate.client():
        os.close(gate.until(1, ACCEPTED)[0][0])
    for client, app in open_ones:
        converse(client, app)
    assert [facts.owes for facts in gate.facts(4)] == [False, True, True, True]


def test_all_orders_at_once_are_suspended_and_owe_nothing_until_they_are_revoked(gate: Gate) -> None:
    order, other = gate.order(places=10), gate.order(ELSEWHERE, places=20)
    client, app = gate.client(), gate.app()
    gate.until(1, BEGUN)
    gate.core.suspend_orders()
    for number, original in enumerate((DIALLED, ELSEWHERE)):
        with gate.client(original):
            os.close(gate.until(number + 1, ACCEPTED)[number][0])
    converse(client, app)
    assert not gate.facts(1)[0].owes
    assert (order.revoke(), other.revoke()) == (10, 20)
    assert (order.revoke(), other.revoke()) == (None, None)


def test_behind_a_new_order_a_suspended_one_is_not_in_force_again(gate: Gate) -> None:
    gate.order(waiter="suspended")
    gate.core.suspend_orders()
    new = gate.order(waiter="new")
    converse(gate.client(), gate.app())
    gate.facts(1)
    new.revoke()
    with gate.client():
        os.close(gate.until(1, ACCEPTED)[0][0])
    assert [who for who, _, _ in gate.heard if who in ("suspended", "new")] == ["new"]


def test_the_latest_order_is_in_force_and_behind_it_the_one_before(gate: Gate) -> None:
    gate.order(waiter="first")
    second = gate.order(waiter="second")
    converse(gate.client(), gate.app())
    gate.facts(1)
    second.revoke()
    converse(gate.client(), gate.app())
    gate.facts(2)
    assert [who for who, _, _ in gate.heard if who in ("first", "second")] == ["second", "first"]


def test_of_many_short_ones_each_is_told_once(gate: Gate) -> None:
    # Nobody else's address: where two translated connections would be alike, one gets another port than its client has.
    client_host = "127.0.0.77"
    gate.order(source=client_host)
    ports = []
    for _ in range(300):
        client = gate.host.open_socket()
        client.settimeout(5)
        client.bind((client_host, 0))
        client.connect(DIALLED)
        ports.append(client.getsockname()[1])
        converse(client, gate.app())
    assert sorted(facts.port for facts in gate.facts(300)) == sorted(ports)
    assert sum(facts.sent for facts in gate.facts(300)) == 300 * 8


def test_short_ones_do_not_wake_python_one_by_one(gate: Gate) -> None:
    gate.order()
    client, app = gate.client(), gate.app()
    wakes = 0
    for _ in range(200):
        converse(client, app)
        client, app = gate.client(), gate.app()
        if select.select([gate.core.fileno()], [], [], 0)[0]:
            wakes += 1
            gate.hear()
    converse(client, app)
    gate.facts(201)
    assert wakes < 150, "fifty milliseconds of them are one wake-up"


def test_a_core_that_stops_ends_what_orders_began_and_leaks_nothing(host: Host, silent: tuple[str, int]) -> None:
    with no_descriptors_leaked():
        with host.entered():
            core = Core((b"",) * len(REASONS), "gate")
        order = core.order(OUTBOUND, 0, "127.0.0.1", DIALLED, silent, 0, False, 5.0, 10, None, "order")
        core.stop()
        assert order.revoke() == 10
        with pytest.raises(RuntimeError, match="stopped"):
            core.order(OUTBOUND, 0, "127.0.0.1", DIALLED, silent, 0, False, 5.0, 10, None, "order")
        with pytest.raises(RuntimeError, match="stopped"):
            core.listen(99, OUTBOUND, False, "door")
        del core, order  # or they would keep the core's bell


def test_links_that_are_up_or_dialling_when_the_core_stops(gate: Gate, silent: tuple[str, int]) -> None:
    gate.order()
    gate.order(ELSEWHERE, target=silent)
    client, app = gate.client(), gate.app()
    dialling = gate.client(ELSEWHERE)
    gate.until(2, BEGUN)
    gate.core.stop()
    assert [facts.reason for facts in gate.facts(2)] == [ABORTED, ABORTED]
    for end in (client, app, dialling):
        with end, pytest.raises(ConnectionResetError):
            end.recv(1)


def test_a_listener_that_closes_takes_those_that_wait(host: Host) -> None:
    with host.entered():
        core = Core((b"",) * len(REASONS), "gate")
        listener = socket.create_server(("127.0.0.1", 15101))
    listener.setblocking(False)
    clients = [host.connect(*DIALLED) for _ in range(20)]
    handle = core.listen(listener.detach(), OUTBOUND, False, "door")
    handle.close()
    handle.close()
    taken: list[int] = []

    def take() -> None:
        taken.extend(about[0] for _, kind, about in core.news() if kind == ACCEPTED)  # type: ignore[misc, attr-defined] # no links here

    def all_taken() -> bool:
        take()
        return len(taken) >= len(clients)

    def closed() -> bool:
        """It closes after the last of them; who comes between the two is taken, too, or reset."""
        try:
            clients.append(host.connect(*DIALLED))
        except (ConnectionRefusedError, ConnectionResetError):
            return True
        return False

    wait_for(all_taken, what="all of them")
    wait_for(closed, what="its end")
    core.stop()
    take()
    for fd in taken:
        os.close(fd)
    for client in clients:
        client.close()


def test_a_socket_that_does_not_listen_is_said_to_be_stuck(gate: Gate) -> None:
    with socket.socket() as sock:
        handle = gate.core.listen(os.dup(sock.fileno()), OUTBOUND, False, "no door")
        error = gate.until(1, STUCK)[0]
        assert os.strerror(error) == "Invalid argument"
        handle.go_on()
        gate.until(2, STUCK)
        handle.close()


@pytest.mark.parametrize(
    "bad",
    [{"source": "web"}, {"original": ("10.0.0.300", 1)}, {"target": ("", 1)}],
    ids=["source", "original", "target"],
)
def test_an_order_for_what_is_no_address_is_refused(gate: Gate, bad: dict[str, Any]) -> None:
    make: Callable[..., Order] = gate.order
    with pytest.raises(ValueError, match="no IP address"):
        make(**bad)


def asleep(name: str) -> int:
    """How many threads of that name are in epoll_wait: proc(5), /proc/pid/syscall."""
    waits = {"22", "232", "281", "441"}  # epoll_pwait of arm64; epoll_wait, epoll_pwait of x86-64; epoll_pwait2 of both
    threads = [thread for thread in Path("/proc/self/task").iterdir() if (thread / "comm").read_text().strip() == name]
    return sum((thread / "syscall").read_text().split()[0] in waits for thread in threads)


def test_cores_that_share_a_listener_take_turns(host: Host) -> None:
    with host.entered():
        cores = [Core((b"",) * len(REASONS), "takes-turns") for _ in range(2)]
        listener = socket.create_server(("127.0.0.1", 15101))
    listener.setblocking(False)
    taken: list[list[int]] = [[], []]

    def take() -> int:
        for core, fds in zip(cores, taken, strict=True):
            fds.extend(about[0] for _, kind, about in core.news() if kind == ACCEPTED)  # type: ignore[misc, attr-defined] # no links here
        return sum(map(len, taken))

    with listener:
        handles = [core.listen(os.dup(listener.fileno()), OUTBOUND, True, "door") for core in cores]
        for count in range(1, 21):
            wait_for(lambda: asleep("takes-turns") == 2, what="both cores wait for events")
            with host.connect(*DIALLED):
                wait_for(lambda count=count: take() == count, what="it is accepted")
    assert list(map(len, taken)) == [10, 10]
    for fd in (*taken[0], *taken[1]):
        os.close(fd)
    for core, handle in zip(cores, handles, strict=True):
        handle.close()
        core.stop()
        core.news()
