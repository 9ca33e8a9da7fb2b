"""No connection that is open is cut: across install, re-install, change, a switch of backends, and removal."""

import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from meshnet.errors import CommandError
from meshnet.net.sockets import reset
from meshnet_init.choose import every_backend
from meshnet_init.remove import Removed, remove
from tests.init.kernel import (
    APP_PORT,
    FAMILIES,
    INBOUND,
    OTHER_PORT,
    OUTBOUND,
    Lab,
    Open,
    address_of,
    connect,
    listening,
)

pytestmark = pytest.mark.netns


class Crowd:
    """Open connections in both directions and families, captured or direct."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.direct: list[Open] = []
        self.captured: list[Open] = []

    def open_direct(self) -> None:
        """Before any rule is there."""
        for family in FAMILIES:
            for source, target in ((self.lab.peer, self.lab.app), (self.lab.app, self.lab.peer)):
                with listening(target, family, APP_PORT) as listener:
                    self.direct.append(connect(source, address_of(target, family), APP_PORT, listener))

    def open_captured(self) -> None:
        for family in FAMILIES:
            loopback = "127.0.0.1" if family == "ipv4" else "::1"
            with listening(self.lab.app, family, INBOUND) as inbound:
                self.captured.append(connect(self.lab.peer, address_of(self.lab.app, family), APP_PORT, inbound))
            with listening(self.lab.app, family, OUTBOUND, loopback) as outbound:
                self.captured.append(connect(self.lab.app, address_of(self.lab.peer, family), APP_PORT, outbound))

    def all_work(self) -> bool:
        return all(connection.works() for connection in (*self.direct, *self.captured))

    def close(self) -> None:
        for connection in (*self.direct, *self.captured):
            connection.close()


@pytest.fixture
def crowd(lab: Lab) -> Iterator[Crowd]:
    crowd = Crowd(lab)
    crowd.open_direct()
    yield crowd
    crowd.close()


def test_connections_live_through_install_reinstall_and_change(lab: Lab, crowd: Crowd) -> None:
    lab.install()
    assert crowd.all_work()
    crowd.open_captured()
    assert crowd.all_work()
    for change in ({}, {"exclude_inbound_ports": ["8080"], "exclude_outbound_ports": ["8080"]}, {"outbound_cidrs": []}):
        lab.install(**change)
        assert crowd.all_work()


def test_taking_ipv6_out_of_the_plan_cuts_nothing(lab: Lab, crowd: Crowd) -> None:
    lab.install()
    crowd.open_captured()

    for _ in range(2):
        lab.install(ipv6="off")
        assert crowd.all_work()
    before = lab.rules_text()
    lab.install(ipv6="off")
    assert lab.rules_text() == before

    with listening(lab.app, "ipv6", APP_PORT) as listener:
        connect(lab.peer, lab.app.address6, APP_PORT, listener).close()


@pytest.mark.parametrize("other", [backend.name for backend in every_backend()])
@pytest.mark.parametrize("ipv6", ["on", "off"])
def test_connections_live_through_a_switch_of_backends_and_back(lab: Lab, crowd: Crowd, other: str, ipv6: str) -> None:
    lab.install()
    crowd.open_captured()
    second = next(backend for backend in every_backend() if backend.name == other)

    lab.install(second, ipv6=ipv6)
    assert crowd.all_work()
    lab.install(lab.backend, ipv6=ipv6)
    assert crowd.all_work()


def test_removal_waits_for_what_was_captured_and_cuts_nothing(lab: Lab, crowd: Crowd) -> None:
    lab.install()
    crowd.open_captured()

    with removing(lab, 30.0) as (waiting, result):
        assert waiting.get(timeout=10) == len(crowd.captured)
        assert crowd.all_work()
        new_connections_go_direct(lab)
        first, *rest = crowd.captured
        first.close()
        assert waiting.get(timeout=10) == len(rest)
        crowd.captured = rest
        assert crowd.all_work()
        for connection in rest:
            connection.close()
        crowd.captured = []
        removed = result.get(timeout=10)

    assert removed == Removed(backends=(lab.backend.name,), waited_for=4, cut=0)
    assert crowd.all_work()
    new_connections_go_direct(lab)


def test_a_half_closed_connection_is_waited_for_too(lab: Lab) -> None:
    lab.install()
    with listening(lab.app, "ipv4", INBOUND) as inbound:
        opened = connect(lab.peer, lab.app.address, APP_PORT, inbound)
    opened.client.shutdown(1)
    assert opened.server.recv(1) == b""

    with removing(lab, 30.0) as (waiting, result):
        assert waiting.get(timeout=10) == 1
        opened.server.sendall(b"the rest")
        assert opened.client.recv(8) == b"the rest"
        opened.close()
        assert result.get(timeout=10).cut == 0


def test_what_outlives_the_wait_is_told(lab: Lab, crowd: Crowd) -> None:
    lab.install()
    crowd.open_captured()

    with lab.app.entered():
        removed = remove(0.0)

    assert removed == Removed(backends=(lab.backend.name,), waited_for=4, cut=4)
    crowd.captured, cut = [], crowd.captured
    assert crowd.all_work()
    for connection in cut:
        connection.close()


def test_what_outlives_the_wait_can_be_reset_while_it_is_still_translated(lab: Lab, crowd: Crowd) -> None:
    lab.install()
    crowd.open_captured()
    captured, crowd.captured = crowd.captured, []

    def cut() -> None:
        for connection in captured:
            reset(connection.server)

    with lab.app.entered():
        remove(0.0, cut=cut)

    for connection in captured:
        with pytest.raises(ConnectionResetError):
            connection.client.recv(1)
        connection.close()
    assert crowd.all_work()


def test_a_failure_to_cut_does_not_keep_the_rules_in(lab: Lab, crowd: Crowd) -> None:
    lab.install()
    crowd.open_captured()

    def cut() -> None:
        raise CommandError("the sidecar does not answer")

    with lab.app.entered():
        with pytest.raises(CommandError):
            remove(0.0, cut=cut)
        assert lab.backend.installed() is None


def test_nothing_is_cut_where_nothing_is_left(lab: Lab) -> None:
    lab.install()
    calls: list[None] = []
    with lab.app.entered():
        remove(0.0, cut=lambda: calls.append(None))
    assert calls == []


def test_a_removal_that_was_interrupted_can_be_finished(lab: Lab, crowd: Crowd) -> None:
    lab.install()
    crowd.open_captured()

    class Interrupted(Exception):
        pass

    def interrupt(left: int) -> None:
        raise Interrupted

    with lab.app.entered(), pytest.raises(Interrupted):
        remove(30.0, interrupt)
    assert crowd.all_work()

    with removing(lab, 30.0) as (waiting, result):
        assert waiting.get(timeout=10) == len(crowd.captured)  # the drain set remembers the ports
        assert crowd.all_work()
        for connection in crowd.captured:
            connection.close()
        crowd.captured = []
        assert result.get(timeout=10).cut == 0


def test_an_interrupted_removal_can_be_taken_back(lab: Lab, crowd: Crowd) -> None:
    from meshnet_init.rule import drain_set

    lab.install()
    crowd.open_captured()
    with lab.app.entered():
        lab.backend.apply(drain_set([INBOUND, OUTBOUND]))
    new_connections_go_direct(lab)

    lab.install()

    assert crowd.all_work()
    crowd.open_captured()


def new_connections_go_direct(lab: Lab) -> None:
    for family in FAMILIES:
        for source, target in ((lab.peer, lab.app), (lab.app, lab.peer)):
            with listening(target, family, OTHER_PORT) as listener:
                opened = connect(source, address_of(target, family), OTHER_PORT, listener)
                assert opened.works()
                opened.close()


@contextmanager
def removing(lab: Lab, drain: float) -> "Iterator[tuple[queue.Queue[int], queue.Queue[Removed]]]":
    """A removal under way: the numbers it waits for, and its result."""
    waiting: queue.Queue[int] = queue.Queue()
    result: queue.Queue[Removed] = queue.Queue()

    def work() -> None:
        with lab.app.entered():
            result.put(remove(drain, waiting.put))

    thread = threading.Thread(target=work)
    with ExitStack() as stack:
        stack.callback(thread.join)
        thread.start()
        yield waiting, result
