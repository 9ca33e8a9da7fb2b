"""What the core makes of calls that fail while it accepts connections, and dials them under an order.

For test_faults.py, as faulty.py.
"""

import contextlib
import errno
import os
import select
import socket
import time
from functools import partial

import pytest
import trio

from meshnet.model.address import Address
from meshnet.model.connection import Direction
from meshnet.relay import Facts, Flow, Target, Through
from meshnet.relay.native import NativeRelay
from tests.relay.leaks import nothing_left
from tests.relay.native.faults import EVER, Faults
from tests.relay.native.test_depots import Told
from tests.relay.native.test_lifetimes import plain_link
from tests.relay.native.test_orders import ACCEPTED, DIALLED, ENDED, STUCK, Gate, closed_gate, converse
from tests.relay.native.test_passed import hang_up_first
from tests.relay.rig import descriptors
from tests.world import Host, eventually, wait_for

pytestmark = pytest.mark.netns


@pytest.mark.parametrize(("call", "code"), [("malloc", errno.ENOMEM), ("accept4", errno.EMFILE)])
def test_who_cannot_be_taken_waits_and_is_not_lost(host: Host, faults: Faults, call: str, code: int) -> None:
    with closed_gate(host) as gate:
        faults.arm(call, code, first=2 if call == "malloc" else 1)  # the first one is of the command to listen
        door = gate.open()
        with gate.client() as client:
            assert gate.until(1, STUCK) == [code]
            door.go_on()
            ((fd, _, _, port),) = gate.until(1, ACCEPTED)
            os.close(fd)
            assert port == client.getsockname()[1]
        door.close()


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
def test_connections_that_fail_without_end_keep_neither_bytes_nor_a_close_waiting(
    host: Host, faults: Faults, shared: bool
) -> None:
    with closed_gate(host) as gate, gate.client():
        faults.arm("accept4", errno.ECONNABORTED, last=EVER)
        door = gate.core.listen(os.dup(gate.listener.fileno()), 0, shared, "door")
        wait_for(lambda: faults.count("accept4") > 200)
        begun = time.monotonic()
        link, client, server = plain_link(gate.core)
        with client, server:
            client.setblocking(True)
            server.setblocking(True)
            while time.monotonic() < begun + 1.2:  # it looks at shared listeners once a second
                client.sendall(b"x")
                assert server.recv(1) == b"x"
            link.abort(b"")
        door.close()
        gate.core.stop()
        faults.arm("accept4")


async def test_a_listener_for_which_there_is_no_memory_leaves_nothing(relay: NativeRelay, faults: Faults) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        async with nothing_left():
            faults.arm("malloc", errno.ENOMEM)
            with pytest.raises(MemoryError):
                await relay.accept_forever(listener, Direction.OUTBOUND, lambda sock, peer: None, shared=False)


async def test_a_listener_that_is_stuck_for_want_of_memory_is_tried_until_there_is_some(
    relay: NativeRelay, faults: Faults
) -> None:
    taken: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        async with trio.open_nursery() as nursery:
            carry = partial(relay.accept_forever, listener, Direction.OUTBOUND, lambda sock, peer: taken.append(sock))
            faults.arm("malloc", errno.ENOMEM, first=2, last=4)  # the first one is of the command to listen
            nursery.start_soon(partial(carry, shared=False))
            with socket.create_connection(listener.getsockname()):
                await eventually(lambda: taken, what="it is accepted")
            nursery.cancel_scope.cancel()
    assert faults.count("malloc") > 4
    taken.pop().close()


async def test_an_order_for_which_there_is_no_memory_is_none(relay: NativeRelay, faults: Faults) -> None:
    flow = Flow(Direction.OUTBOUND, "127.0.0.1", Address(*DIALLED))
    through = Through(relay.tls.depot(lambda back: None), (b"before", b"between", b"behind"))
    target, told = Target(Address("127.0.0.1", 9), 0, False, 5.0), Told()
    faults.arm("realloc")
    relay.order(flow, target, 1, told, through)
    calls = faults.count("realloc")
    assert calls
    for number in range(1, calls + 1):
        faults.arm("realloc", errno.ENOMEM, number)
        with pytest.raises(MemoryError):
            relay.order(flow, target, 1, told, through)


# What an order makes of it: it may be judged anew by Python, which has the client then, or begin and fail.
ORDERED = [
    ("malloc", errno.ENOMEM),
    ("calloc", errno.ENOMEM),
    ("realloc", errno.ENOMEM),
    ("socket", errno.EMFILE),
    ("setsockopt", errno.ENOMEM),
    ("connect", errno.EADDRNOTAVAIL),
    ("getsockopt", errno.ENOBUFS),
    ("epoll_ctl", errno.ENOSPC),
    ("recv", errno.ENOMEM),
    ("send", errno.ENOBUFS),
]


@pytest.mark.parametrize(("call", "code"), ORDERED, ids=[f"{call}-{errno.errorcode[code]}" for call, code in ORDERED])
def test_a_connection_under_an_order_is_carried_or_given_back(host: Host, faults: Faults, call: str, code: int) -> None:
    with closed_gate(host) as gate:
        door = gate.open()
        order = gate.order(places=5)
        before = descriptors()
        faults.arm(call)
        assert _ask(gate) == "the answer"
        calls = faults.count(call)
        for number in range(1, calls + 2):  # one more, for some are made only where the client is quick
            faults.arm(call, code, number)
            assert _ask(gate) in ("the answer", "given back", "reset"), number
            faults.arm(call)
            wait_for(lambda: order.state()[1] == 0, what="its place is free again")
        wait_for(lambda: descriptors() == before, what="every descriptor closed")
        assert _ask(gate) == "the answer"
        door.close()


def test_an_order_whose_last_row_has_no_memory_is_there_until_all_are_told(host: Host, faults: Faults) -> None:
    """Its second connection ends otherwise than the first, so that one is told, and then nothing keeps the order."""
    with closed_gate(host) as gate:
        door = gate.open()
        _two_under_an_order_that_nobody_has(gate)
        faults.arm("realloc", errno.ENOMEM, 2)
        assert [facts.port > 0 for facts in gate.facts(2)] == [True, True]
        assert faults.count("realloc") == 2
        door.close()


def _two_under_an_order_that_nobody_has(gate: Gate) -> None:
    order = gate.order()
    converse(gate.client(), gate.app())
    hang_up_first(gate)
    wait_for(lambda: order.state()[1] == 0, what="both are over")
    wait_for(lambda: select.select([gate.core.fileno()], [], [], 0)[0], what="the news of them")
    gate.orders.clear()
    order.revoke()


def _ask(gate: Gate) -> str:
    """What becomes of a connection that asks something."""
    gate.heard.clear()
    gate.links.clear()
    while _served(gate):  # of one that was dialled and dropped
        gate.app().close()
    try:
        client = gate.client()
    except ConnectionResetError:  # already
        return wait_for(lambda: _heard(gate), what="its end")
    with client:
        with contextlib.suppress(ConnectionResetError):
            client.sendall(b"question")
        if (said := wait_for(lambda: _heard(gate) or _served(gate))) != "served":
            return said
        with gate.app() as app, contextlib.suppress(OSError):
            assert app.recv(64) in (b"question", b"")
            app.sendall(b"the answer")
            app.shutdown(socket.SHUT_WR)
        # Its endpoint leg may have been dialled and dropped again: then Python has the client.
        said = wait_for(lambda: _heard(gate) or _answered(client), what="its end")
        if said != "answered":
            return said
        try:
            answer = client.recv(64).decode()
        except ConnectionResetError:
            answer = "reset"
    wait_for(lambda: _heard(gate), what="its end")
    return answer or "reset"


def _answered(client: socket.socket) -> str:
    return "answered" if select.select([client], [], [], 0)[0] else ""


def _served(gate: Gate) -> str:
    return "served" if select.select([gate.server], [], [], 0)[0] else ""


def _heard(gate: Gate) -> str:
    """That Python has the client, or that the connection is over."""
    gate.hear()
    for _, kind, about in gate.heard:
        if kind == STUCK:
            return "stuck"
        if kind == ACCEPTED:
            os.close(about[0])
            return "given back"
        if kind == ENDED:
            facts = Facts(*about)
            if facts.client < 0:
                return "reset"
            os.close(facts.client)
            return "given back"
    return ""
