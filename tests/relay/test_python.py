"""The Python relay's own promises, beside the contract."""

import contextlib
import select
import socket
import subprocess
import sys

import pytest
import trio

from meshnet.codec.frames import Fin, Frame
from meshnet.errors import EndedBy, Reason
from meshnet.net.python_tls import PythonChannel
from meshnet.relay import Link, PlainLeg
from meshnet.relay.python import PythonRelay
from meshnet.relay.python.pair import Pair
from meshnet.tunnel.protocol import Tunnel
from tests.relay.lease_contract import SMALL
from tests.relay.rig import (
    HalfRig,
    Rig,
    fall_silent,
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
from tests.world import eventually


class _Faulty(Tunnel):
    """A protocol with a bug in it."""

    def receive(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        raise ZeroDivisionError("a bug")


async def test_a_bug_ends_its_own_link_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def prepare(it: HalfRig) -> None:
        it.own.wire.__class__ = _Faulty

    async with PythonRelay() as relay, plain_rig(relay) as bystander:
        async with outbound_rig(relay, prepare=prepare) as it:
            await it.peer.send_data(b"x")
            outcome = await it.run.result()
            assert (outcome.reason, outcome.ended_by) == (Reason.INTERNAL, EndedBy.PROXY)
            assert not outcome.reusable
            with pytest.raises(trio.BrokenResourceError):
                await read_all(it.app)
        assert "ZeroDivisionError: a bug" in caplog.text
        await bystander.client.send_all(b"still here")
        assert await read_exactly(bystander.server, 10) == b"still here"


async def test_a_socket_that_somebody_closed_is_a_bug_too(caplog: pytest.LogCaptureFixture) -> None:
    def prepare(it: HalfRig) -> None:
        it.own.channel.close()

    async with PythonRelay() as relay, outbound_rig(relay, prepare=prepare) as it:
        assert (await it.run.result()).reason is Reason.INTERNAL
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("rig", [plain_rig, mesh_rig])
async def test_closing_the_relay_resets_what_still_runs(rig: type[plain_rig]) -> None:
    with no_descriptors_leaked():
        async with contextlib.AsyncExitStack() as stack:
            relay = PythonRelay(threads=2)
            relay.start()
            its = [await stack.enter_async_context(rig(relay)) for _ in range(4)]
            for it in its:
                await it.client.send_all(b"x")
                assert await read_exactly(it.server, 1) == b"x"
            relay.close()
            for it in its:
                for run in it.runs:
                    assert (await run.result()).reason in (Reason.DRAIN, Reason.TUNNEL_LOST)
                with pytest.raises(trio.BrokenResourceError):
                    await read_all(it.server)


async def test_a_relay_that_was_not_started_says_so() -> None:
    near, app = tcp_pair()
    far, other = tcp_pair()
    with near, app, far, other, pytest.raises(RuntimeError, match="not started"):
        await PythonRelay().run(Link(PlainLeg(near), PlainLeg(far)), tally=None)


async def test_it_fits_where_one_leg_is_plain() -> None:
    relay = PythonRelay()
    tunnel = await tunnel_pair(relay.tls, relay.tls)
    near, app = tcp_pair()
    plain = PlainLeg(near)
    assert relay.fits(Link(plain, plain))
    assert relay.fits(Link(plain, tunnel.client))
    assert relay.fits(Link(tunnel.server, plain))
    assert not relay.fits(Link(tunnel.server, tunnel.client))
    tunnel.close()
    near.close()
    app.close()


async def grow_up(it: Rig) -> None:
    """As many messages as it takes for a link to move to a relay thread."""
    for _ in range(20):
        await it.client.send_all(b"x")
        assert await read_exactly(it.server, 1) == b"x"


async def test_links_that_live_on_spread_over_threads() -> None:
    async with PythonRelay(threads=3) as relay, contextlib.AsyncExitStack() as stack:
        its = [await stack.enter_async_context(plain_rig(relay)) for _ in range(9)]
        for it in its:
            await grow_up(it)
        assert [len(thread.pairs) for thread in relay._threads] == [3, 3, 3]


async def test_a_short_link_never_leaves_trio_s_thread() -> None:
    async with PythonRelay() as relay:
        async with plain_rig(relay) as it:
            await it.client.send_all(b"x")
            assert await read_exactly(it.server, 1) == b"x"
            assert [len(thread.pairs) for thread in relay._threads] == [0]
            assert relay._young is not None
            assert len(relay._young.pairs) == 1
        assert not relay._young.pairs


async def test_a_hang_up_that_is_older_than_the_wish_to_read_loses_nothing() -> None:
    async with PythonRelay() as relay, plain_rig(relay) as it:
        await grow_up(it)
        (thread,) = relay._threads
        (pair,) = thread.pairs
        handled = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def event() -> None:
            pair._client.on_event(select.EPOLLHUP)
            token.run_sync_soon(handled.set)

        thread.post(pair, event)
        await handled.wait()
        await it.client.send_all(b"y")
        assert await read_exactly(it.server, 1) == b"y"


async def test_an_abort_that_comes_when_all_is_over_leaves_nothing_behind() -> None:
    async with PythonRelay() as relay, plain_rig(relay) as it:
        assert relay._young is not None
        link, tell = it.first.link, relay._young._tell_ended

        def told(pairs: list[Pair]) -> None:
            tell(pairs)
            assert link.abort is not None
            link.abort()  # as another task may, before the one that waits has run

        relay._young._tell_ended = told
        await it.client.send_eof()
        await it.server.send_eof()
        assert (await it.first.result()).reason is Reason.OK
        assert [len(thread.pairs) for thread in relay._threads] == [0]


async def test_bytes_that_openssl_already_holds_are_not_forgotten() -> None:
    def prepare(it: HalfRig) -> None:
        # One record with two frames, of which the trio side has read a part: the kernel has nothing left.
        it.peer.sock.send(it.peer.wire.data(5) + b"hello" + it.peer.wire.data(6) + b" again")
        assert isinstance(it.own.channel, PythonChannel)
        sock = it.own.channel.sock
        sock.setblocking(True)
        it.run.link.early_frames = it.own_wire.receive(sock.recv(7))
        sock.setblocking(False)
        assert sock.pending() > 0

    async with PythonRelay() as relay, outbound_rig(relay, prepare=prepare) as it:
        assert await read_exactly(it.app, 11) == b"hello again"


async def test_a_reset_behind_our_fin_that_cannot_go_out_kills_the_tunnel() -> None:
    async with PythonRelay() as relay, outbound_rig(relay, buffer=SMALL) as it:
        await it.app.send_eof()
        assert await it.peer.read() == Fin()
        fall_silent(it.peer.sock)  # or its FIN would bring ACKs along that make room
        await eventually(lambda: not _stuff(it.own_sock))
        reset(it.app)
        await eventually(lambda: "mine reset" in repr(it.own_wire))
        await it.peer.send(it.peer.wire.fin())
        outcome = await it.run.result()
        assert (outcome.reason, outcome.reusable) == (Reason.PEER_RST, False)


def _stuff(sock: socket.socket) -> int:
    """Fills the connection under a tunnel with bytes that mean nothing; how many it took."""
    taken = 0
    with socket.fromfd(sock.fileno(), sock.family, sock.type) as raw, contextlib.suppress(BlockingIOError):
        while True:
            taken += raw.send(bytes(SMALL))
    return taken


_NEVER_CLOSED = """
import trio
from meshnet.relay.python import PythonRelay

async def main():
    PythonRelay(2).start()
    raise MemoryError("nor for `close`")

trio.run(main)
"""


def test_a_proxy_that_could_not_close_it_ends_all_the_same() -> None:
    """It would be deaf, and what looks after it would take it for alive."""
    ended = subprocess.run([sys.executable, "-c", _NEVER_CLOSED], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "MemoryError: nor for `close`" in ended.stderr
