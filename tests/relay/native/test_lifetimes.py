"""Who owns what, and for how long: memory and descriptors of links and tunnels, on the core itself and under trio.

Most of these prove something only where memory is watched: see test_sanitizers.py.
"""

import contextlib
import select
import socket
import struct
import sys
import weakref
from collections.abc import Awaitable, Callable

import pytest
import trio

from meshnet.codec.frames import Fin, GoAway, encode
from meshnet.errors import ConnectionFailed, Reason
from meshnet.relay.native import NativeRelay
from meshnet.relay.native._core import Core, Link, Tunnel
from meshnet.relay.native.reasons import REASONS
from meshnet.relay.native.tls import NativeTls
from tests.relay.leaks import nothing_left
from tests.relay.lease_contract import HalfRigMaker
from tests.relay.rig import (
    Rig,
    context,
    inbound_rig,
    mesh_rig,
    no_descriptors_leaked,
    outbound_rig,
    plain_rig,
    read_all,
    read_exactly,
    reset,
    tcp_pair,
    tunnel_pair,
)
from tests.world import eventually, wait_for


def new_core() -> Core:
    return Core((b"",) * len(REASONS), "test")


def start(core: Core, client: int | Tunnel, endpoint: int | Tunnel, waiter: object = "link") -> Link:
    return core.start(client, endpoint, b"", b"", 0, 0, b"", waiter)


def plain_link(core: Core, waiter: object = "link") -> tuple[Link, socket.socket, socket.socket]:
    """And both applications."""
    client, near = tcp_pair()
    server, far = tcp_pair()
    return start(core, near.detach(), far.detach(), waiter), client, server


def news(core: Core, count: int = 1) -> list[object]:
    """Waits for `count` of them."""
    told: list[object] = []

    def enough() -> bool:
        if select.select([core.fileno()], [], [], 0.1)[0]:
            told.extend(core.news())
        return len(told) >= count

    wait_for(enough, what="news of the core")
    return told


def test_an_abort_that_comes_when_the_link_is_over_finds_it_still_there() -> None:
    core = new_core()
    for _ in range(100):
        link, client, server = plain_link(core)
        client.close()
        server.close()
        wait_for(lambda it=link: it.counts()[2:4] == (True, True))  # it is over, and nobody has asked
        link.abort(b"")
        link.abort(b"")
        assert news(core) == ["link"]
        del link  # while the core may be about to look at it
    core.stop()
    core.news()


def test_a_core_that_stops_ends_what_was_just_begun() -> None:
    with no_descriptors_leaked():
        core = new_core()
        links = [plain_link(core, number) for number in range(50)]
        for link, _, _ in links[:10]:
            link.abort(b"")
        core.stop()
        assert sorted(waiter for waiter in core.news() if isinstance(waiter, int)) == list(range(50))
        for link, client, server in links:
            assert link.result()[0] == 1  # aborted
            link.abort(b"")
            client.close()
            server.close()
        with pytest.raises(RuntimeError, match="stopped"):
            start(core, 0, 0)
        core.stop()
        del core, links, link


def test_a_core_does_not_take_what_is_no_leg() -> None:
    core = new_core()
    with pytest.raises(ValueError, match="descriptor"):
        start(core, -1, -1)
    with pytest.raises((ValueError, OverflowError)):
        start(core, 1 << 40, 1)
    with pytest.raises(TypeError):
        start(core, "socket", 1)  # type: ignore[arg-type] # on purpose
    link = start(core, 99_999, 99_998)
    assert news(core) == ["link"]
    assert link.result()[0] == 4  # internal
    core.stop()


def test_news_that_nobody_took_is_no_news_of_a_tunnel_that_is_gone() -> None:
    core = new_core()
    near, far = tcp_pair()
    tunnel = core.shake(context(NativeTls(core, core, core), is_server=False), near.detach(), True, None, "tunnel")
    far.close()
    select.select([core.fileno()], [], [])  # it is lost, and nobody has asked
    core.stop()
    tunnel.close()
    tunnel.close()
    assert tunnel.fileno() == -1
    del tunnel
    assert core.news() == []


def test_a_copy_of_a_descriptor_in_another_process_is_no_trap() -> None:
    """As a fork makes, for a moment: what is closed here goes on to have events."""
    core = new_core()
    tls = context(NativeTls(core, core, core), is_server=True)
    for _ in range(5):
        client, near = tcp_pair()
        server, far = tcp_pair()
        other, last = tcp_pair()
        copies = [sock.dup() for sock in (near, far, last)]
        link = start(core, near.detach(), far.detach())
        tunnel = core.shake(tls, last.detach(), False, None, "tunnel")
        link.abort(b"")
        tunnel.close()
        assert news(core) == ["link"]
        del link, tunnel
        while not select.select([client, server, other], [], [], 0)[0]:
            core.news()
            for app in (client, server, other):
                app.send(b"late")
            for copy in copies:
                copy.shutdown(socket.SHUT_WR)
        again, client_too, server_too = plain_link(core)
        client_too.send(b"x")
        select.select([server_too], [], [])
        for sock in (client, server, other, client_too, server_too, *copies):
            sock.close()
        assert news(core) == ["link"]
        del again
    core.stop()


async def test_a_tunnel_that_is_closed_while_it_has_something_to_tell(relay: NativeRelay) -> None:
    for _ in range(60):
        pair = await tunnel_pair(relay.tls, relay.tls)
        for _ in range(20):
            pair.client.channel.send_now(encode(GoAway()))
        pair.server.channel.close()
        pair.server.channel.close()
        pair.client.channel.close()


async def test_a_link_that_has_ended_keeps_no_tunnel(relay: NativeRelay) -> None:
    pair = await tunnel_pair(relay.tls, relay.tls)
    async with mesh_rig(relay, tunnel=pair) as it:
        await it.client.send_eof()
        await it.server.send_eof()
        await it.ended()
        tunnel = pair.client.channel.tunnel
        assert sys.getrefcount(tunnel) == 4  # the channel's, the core's, ours and the call's
    pair.close()


async def test_a_tunnel_that_is_closed_is_freed(relay: NativeRelay) -> None:
    pair = await tunnel_pair(relay.tls, relay.tls)
    channels = [weakref.ref(leg.channel) for leg in (pair.client, pair.server)]
    pair.close()
    del pair
    await eventually(lambda: [channel() for channel in channels] == [None, None])


@pytest.mark.parametrize("rig", [outbound_rig, inbound_rig])
async def test_a_tunnel_may_be_closed_in_a_lease_and_at_its_very_end(relay: NativeRelay, rig: HalfRigMaker) -> None:
    for ended in (False, True):
        async with rig(relay) as it:
            await it.app.send_eof()
            assert await it.peer.read() == Fin()
            if ended:
                await it.peer.send(it.peer.wire.fin() + encode(GoAway()))
            it.own.channel.close()
            outcome = await it.run.result()
            assert outcome.reason in (Reason.OK, Reason.DRAIN)


@pytest.mark.parametrize("rig", [plain_rig, mesh_rig])
async def test_a_relay_that_is_closed_resets_its_links(
    rig: Callable[..., contextlib.AbstractAsyncContextManager[Rig]],
) -> None:
    async with nothing_left():
        async with contextlib.AsyncExitStack() as stack:
            async with NativeRelay() as relay:
                its = [await stack.enter_async_context(rig(relay)) for _ in range(20)]
                for it in its:
                    await it.client.send_all(b"x")
                    assert await read_exactly(it.server, 1) == b"x"
            for it in its:
                for run in it.runs:
                    assert (await run.result()).reason in (Reason.DRAIN, Reason.TUNNEL_LOST)
                with pytest.raises(trio.BrokenResourceError):
                    await read_all(it.server)
        del it, its, run


async def test_a_relay_that_is_closed_keeps_nobody_waiting_for_a_tunnel() -> None:
    failures: set[type[BaseException]] = set()

    async def fails(wait: Callable[..., Awaitable[object]], *arguments: object) -> None:
        try:
            await wait(*arguments)
        except (ConnectionFailed, OSError) as failure:
            failures.add(type(failure))

    async with nothing_left():
        async with trio.open_nursery() as nursery, NativeRelay() as relay:
            pair = await tunnel_pair(relay.tls, relay.tls)
            near, far = tcp_pair()
            nursery.start_soon(fails, pair.client.channel.receive)
            nursery.start_soon(fails, relay.tls.connect, near, context(relay.tls, is_server=False), None, 10.0)
            await trio.lowlevel.wait_readable(far)  # its ClientHello has come
        assert failures == {ConnectionFailed, OSError}
        with pytest.raises(OSError, match="stopped"):
            pair.server.channel.send_now(encode(GoAway()))
        pair.close()
        far.close()
        del pair


async def test_a_thousand_links_and_two_hundred_tunnels_leave_nothing(relay: NativeRelay) -> None:
    async with nothing_left():
        for number in range(1000):
            async with plain_rig(relay) as it:
                await it.client.send_all(b"x")
                assert await read_exactly(it.server, 1) == b"x"
                if number % 3 == 0:
                    reset(it.client)
                elif number % 3 == 1:
                    await it.client.send_eof()
                    await it.server.send_eof()
        for number in range(200):
            pair = await tunnel_pair(relay.tls, relay.tls)
            if number % 2:
                async with mesh_rig(relay, tunnel=pair) as it:
                    await it.client.send_all(b"x")
                    assert await read_exactly(it.server, 1) == b"x"
            pair.close()


@pytest.mark.parametrize("ends", ["two fins", "a reset", "two resets"])
def test_both_legs_may_be_full_of_events_before_the_link_begins(ends: str) -> None:
    core = new_core()
    with no_descriptors_leaked():
        for _ in range(100):
            client, near = tcp_pair()
            server, far = tcp_pair()
            client.send(b"early")
            server.send(b"bird")
            for app in (client, server):
                if ends == "two fins":
                    app.shutdown(socket.SHUT_WR)
                elif ends == "two resets" or app is server:
                    app.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    app.close()
            link = start(core, near.detach(), far.detach())
            assert news(core) == ["link"]
            reason, *_ = link.result()
            assert REASONS[reason] is (Reason.OK if ends == "two fins" else Reason.PEER_RST)
            if ends == "two fins":
                assert (server.recv(9), server.recv(9), client.recv(9), client.recv(9)) == (b"early", b"", b"bird", b"")
                assert link.counts()[:4] == (5, 4, True, True)
            client.close()
            server.close()
    core.stop()
