"""Handshakes that others begin: as many at once as there is room for, the others wait in the kernel."""

import socket
from contextlib import ExitStack

import pytest
import trio
import trio.testing

from meshnet.net import sockets
from meshnet.proxy.arrivals import MOST, Arrivals
from tests.proxy.conftest import API, Hosts
from tests.proxy.metrics import value
from tests.proxy.peer import TUNNEL_PORT
from tests.proxy.programs import accept, converse, listen
from tests.world import eventually, wait_for


async def test_who_finds_no_room_waits_in_the_kernel() -> None:
    arrivals, taken = Arrivals(3), list[socket.socket]()

    def take(sock: socket.socket, _: object) -> None:
        arrivals.__enter__()
        taken.append(sock)

    listener = sockets.listen("127.0.0.1", 0)
    assert listener is not None
    with ExitStack() as stack:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sockets.accept_forever, listener, take, arrivals.room)
            for _ in range(5):
                stack.enter_context(socket.create_connection(listener.getsockname()))
            await eventually(lambda: len(taken) == 3)
            await trio.testing.wait_all_tasks_blocked()
            assert (len(taken), arrivals.under_way) == (3, 3)
            arrivals.__exit__(None, None, None)
            await eventually(lambda: len(taken) == 4)
            await trio.testing.wait_all_tasks_blocked()
            assert (len(taken), arrivals.under_way) == (4, 3)
            nursery.cancel_scope.cancel()
        for sock in taken:
            sock.close()


def test_in_a_crowd_each_has_less_time() -> None:
    arrivals = Arrivals(4)
    times = []
    for _ in range(4):
        with ExitStack() as stack:
            for _ in range(len(times) + 1):
                stack.enter_context(arrivals)
            times.append(arrivals.timeout)
    assert times == [5.0, 5.0, 1.0, 1.0]
    assert not arrivals.under_way


@pytest.mark.netns
def test_strangers_who_say_nothing_do_not_keep_peers_out(hosts: Hosts) -> None:
    sidecar = hosts.sidecar(hosts.web)
    sidecar.stop()  # and with it the tunnels that it has
    sidecar.start()
    with ExitStack() as stack:
        for _ in range(MOST + 64):
            stranger = stack.enter_context(hosts.outside.open_socket())
            stranger.setblocking(False)
            stranger.connect_ex((hosts.api.address, TUNNEL_PORT))
        wait_for(lambda: value(hosts.api, "meshnet_tunnel_arriving") == MOST, what="as many as may be shake hands")
        with listen(hosts.api, 8080) as server:
            converse(hosts.web.connect(API, 8080), accept(server))
    wait_for(lambda: not value(hosts.api, "meshnet_tunnel_arriving"), what="nobody is left")
