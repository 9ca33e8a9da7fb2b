"""What the native relay makes of calls that fail. For test_faults.py, which runs these with faults.c preloaded.

Each call that a scenario makes is made to fail once. Whatever it was, every connection has an outcome, no end looks
like a good one that is none, no descriptor is left open, and the relay goes on.
"""

import contextlib
import errno
import fcntl
import gc
import os
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from meshnet.errors import ConnectionFailed, EndedBy, Reason
from meshnet.net.tls import Channel
from meshnet.relay import PlainLeg
from meshnet.relay.native import NativeRelay
from meshnet.relay.native.reasons import REASONS
from tests.relay.leaks import nothing_left
from tests.relay.native.faults import EVER, MOST, OURS, Faults
from tests.relay.native.test_lifetimes import new_core, plain_link
from tests.relay.rig import (
    Rig,
    context,
    descriptors,
    mesh_rig,
    plain_rig,
    read_all,
    read_exactly,
    tcp_pair,
    tunnel_pair,
)
from tests.world import SLOWNESS, eventually, wait_for

pytestmark = pytest.mark.netns
RIGS = {"plain": plain_rig, "mesh": mesh_rig}
MEGABYTE = 1 << 20
Begin = Callable[[], None]
Ends = list[tuple[Reason, EndedBy]]
READ = 16 * (16384 - 4)  # PLAIN_READ of core.h


async def shake_hands(relay: NativeRelay, rig: str, ends: Ends, begin: Begin) -> None:
    """Both ends of a tunnel, or neither."""
    near, far = tcp_pair()
    channels: list[Channel] = []

    async def dial() -> None:
        channels.append(await relay.tls.connect(near, context(relay.tls, is_server=False), None, 10.0))

    async def serve() -> None:
        channels.append(await relay.tls.accept(far, context(relay.tls, is_server=True), 10.0))

    begin()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dial)
            nursery.start_soon(serve)
    finally:
        for channel in channels:
            channel.close()


async def converse(relay: NativeRelay, rig: str, ends: Ends, begin: Begin) -> None:
    """Words both ways and an end, or whatever comes of them; how its connections have ended."""
    async with RIGS[rig](relay, prepare=lambda it: begin()) as it:
        with contextlib.suppress(trio.BrokenResourceError, OSError):
            await _talk(it)
        for run in it.runs:
            outcome = await run.result()
            ends.append((outcome.reason, outcome.ended_by))


async def _talk(it: Rig) -> None:
    await it.client.send_all(b"question")
    assert await read_exactly(it.server, 8) == b"question"
    await it.server.send_all(b"the answer")
    assert await read_exactly(it.client, 10) == b"the answer"
    await it.client.send_eof()
    assert await read_all(it.server) == b""
    await it.server.send_eof()
    assert await read_all(it.client) == b""


async def pour(relay: NativeRelay, rig: str, ends: Ends, begin: Begin) -> None:
    """As `converse`, of much in one direction; through tunnels into sockets that are full now and then."""
    begun = 0

    async def send() -> None:
        with contextlib.suppress(trio.BrokenResourceError, OSError):
            await it.client.send_all(bytes(2 * MEGABYTE))
            await it.client.send_eof()

    async with contextlib.AsyncExitStack() as stack:
        if rig == "plain":
            it, begun = await stack.enter_async_context(piled_up(relay, begin))
        else:
            it = await stack.enter_async_context(mesh_rig(relay, buffer=1 << 16, prepare=lambda it: begin()))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            with contextlib.suppress(trio.BrokenResourceError, OSError):
                assert len(await read_all(it.server)) == begun + 2 * MEGABYTE
                await it.server.send_eof()
            for run in it.runs:
                outcome = await run.result()
                ends.append((outcome.reason, outcome.ended_by))


@contextlib.asynccontextmanager
async def piled_up(relay: NativeRelay, begin: Begin) -> AsyncIterator[tuple[Rig, int]]:
    """A plain rig with so much on its way, and how much, that the relay's next read fills its buffer."""
    near: list[socket.socket] = []

    def prepare(it: Rig) -> None:
        assert isinstance(it.first.link.client, PlainLeg)
        near.append(it.first.link.client.sock.dup())
        begin()

    async with plain_rig(relay, prepare=prepare) as it:
        on_the_way = 0
        with near[0]:
            while True:
                with trio.move_on_after(0.1) as patience:
                    on_the_way += await it.client.socket.send(bytes(MEGABYTE))
                if patience.cancelled_caught and _queued(near[0]) > READ:
                    break
                if patience.cancelled_caught:  # the kernel gives more room to who reads much
                    on_the_way -= len(await it.server.receive_some(on_the_way))
        await eventually(_a_pipe_is_to_be_had, what="room for a pipe, pipe(7), /proc/sys/fs/pipe-user-pages-soft")
        yield it, on_the_way


def _a_pipe_is_to_be_had() -> bool:
    """One of the size that the relay wants; all programs of a user without CAP_SYS_RESOURCE share what there is."""
    ends = os.pipe()
    try:
        return fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, MEGABYTE) >= MEGABYTE
    except PermissionError:
        return False
    finally:
        for end in ends:
            os.close(end)


def _queued(sock: socket.socket) -> int:
    """Bytes that it has received, and nobody has read."""
    return int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), sys.byteorder)


Scenario = Callable[[NativeRelay, str, Ends, Begin], Awaitable[None]]
# What the other side's relay hears when one side's kills their tunnel.
BEHIND = {"plain": set[Reason](), "mesh": {Reason.TUNNEL_LOST}}

CASES: list[tuple[Scenario, str, str, int, set[Reason]]] = [
    (shake_hands, "mesh", "recv", errno.ENOMEM, set()),
    (shake_hands, "mesh", "send", errno.ENOBUFS, set()),
    (shake_hands, "mesh", "epoll_ctl", errno.ENOSPC, set()),
    (shake_hands, "mesh", "malloc", errno.ENOMEM, set()),
    (shake_hands, "mesh", "realloc", errno.ENOMEM, set()),
    (converse, "plain", "recv", errno.ENOMEM, {Reason.INTERNAL}),
    (converse, "plain", "recv", errno.EINTR, set()),
    (converse, "plain", "recv", errno.ECONNRESET, {Reason.PEER_RST}),
    (converse, "plain", "recv", errno.ETIMEDOUT, {Reason.KEEPALIVE_DEAD}),
    (converse, "plain", "recv", errno.EHOSTUNREACH, {Reason.KEEPALIVE_DEAD}),
    (converse, "plain", "send", errno.ENOBUFS, {Reason.INTERNAL}),
    (converse, "plain", "send", errno.EINTR, set()),
    (converse, "plain", "shutdown", errno.ENOTCONN, {Reason.PEER_RST}),
    (converse, "plain", "epoll_ctl", errno.ENOSPC, {Reason.INTERNAL}),
    (converse, "plain", "malloc", errno.ENOMEM, set()),
    (converse, "plain", "calloc", errno.ENOMEM, set()),
    (converse, "mesh", "recv", errno.ENOMEM, {Reason.INTERNAL}),
    (converse, "mesh", "send", errno.ENOBUFS, {Reason.INTERNAL}),
    (converse, "mesh", "shutdown", errno.ENOTCONN, {Reason.PEER_RST}),
    (converse, "mesh", "epoll_ctl", errno.ENOSPC, {Reason.INTERNAL}),
    (converse, "mesh", "malloc", errno.ENOMEM, set()),
    (converse, "mesh", "calloc", errno.ENOMEM, set()),
    (pour, "plain", "splice", errno.ENOMEM, {Reason.INTERNAL}),
    (pour, "mesh", "sendmsg", errno.ENOBUFS, {Reason.INTERNAL}),
    (pour, "mesh", "realloc", errno.ENOMEM, {Reason.INTERNAL}),
]


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # the rig's, which no relay had got yet
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("scenario", "rig", "call", "code", "reasons"),
    CASES,
    ids=[f"{case[0].__name__}-{case[1]}-{case[2]}-{errno.errorcode[case[3]]}" for case in CASES],
)
async def test_a_call_that_fails_ends_one_connection_at_most(
    relay: NativeRelay, faults: Faults, scenario: Scenario, rig: str, call: str, code: int, reasons: set[Reason]
) -> None:
    await scenario(relay, rig, [], lambda: faults.arm(call))
    calls = min(faults.count(call), MOST)
    assert calls, "the scenario makes no such call"
    gc.collect()
    before = descriptors()
    seen: set[Reason] = set()
    for number in range(1, calls + 1):
        ends: Ends = []
        begin = partial(faults.arm, call, code, number)
        try:
            with trio.fail_after(20 * SLOWNESS):
                await scenario(relay, rig, ends, begin)
        except* (MemoryError, ConnectionFailed, trio.BrokenResourceError, OSError):
            assert not ends  # the relay never had them
        faults.arm(call)
        seen |= {reason for reason, _ in ends}
        blamed = {who for reason, who in ends if reason is not Reason.OK}
        if code in OURS:
            assert not blamed & {EndedBy.CLIENT, EndedBy.SERVER}, (number, ends)
    assert reasons <= seen <= reasons | BEHIND[rig] | {Reason.OK}, (seen, reasons)

    def closed() -> bool:
        gc.collect()
        return descriptors() <= before

    await eventually(closed, what="every descriptor closed")
    ends = []
    await scenario(relay, rig, ends, lambda: None)
    assert {reason for reason, _ in ends} <= {Reason.OK}


ELSEWHERE = {"epoll_wait", "pipe2", "fcntl", "getsockopt", "setsockopt"}  # below


@pytest.mark.parametrize(("scenario", "rig"), sorted({case[:2] for case in CASES}, key=str))
async def test_no_kind_of_call_is_left_out(relay: NativeRelay, faults: Faults, scenario: Scenario, rig: str) -> None:
    await scenario(relay, rig, [], faults.count_all)
    assert faults.made() - ELSEWHERE <= {case[2] for case in CASES}


@pytest.mark.parametrize(("call", "code"), [("pipe2", errno.EMFILE), ("splice", errno.EINVAL), ("fcntl", errno.EPERM)])
async def test_where_it_cannot_splice_it_copies(relay: NativeRelay, faults: Faults, call: str, code: int) -> None:
    ends: Ends = []
    started = time.monotonic()
    await pour(relay, "plain", ends, lambda: faults.arm(call, code, last=EVER))
    assert faults.count(call), f"{faults.count('recv')} reads"
    if call == "pipe2":  # once refused, it is asked for again in a second
        assert faults.count(call) <= 1 + time.monotonic() - started
    assert {reason for reason, _ in ends} == {Reason.OK}


STARTS = [
    ("malloc", errno.ENOMEM),
    ("epoll_create1", errno.EMFILE),
    ("eventfd", errno.EMFILE),
    ("epoll_ctl", errno.ENOSPC),
    ("pthread_create", errno.EAGAIN),
    ("realloc", errno.ENOMEM),
]


@pytest.mark.parametrize(("call", "code"), STARTS, ids=[call for call, _ in STARTS])
async def test_a_relay_that_cannot_start_says_why_and_leaves_nothing(faults: Faults, call: str, code: int) -> None:
    async with nothing_left():
        faults.arm(call)
        async with NativeRelay():
            calls = faults.count(call)
        assert calls
        for number in range(1, calls + 1):
            faults.arm(call, code, number)
            with pytest.raises(MemoryError if call == "realloc" else OSError) as caught:
                await NativeRelay().__aenter__()
            if isinstance(caught.value, OSError):
                assert caught.value.errno == code
            del caught
        faults.arm(call)
        assert not _threads("relay")


def _threads(name: str) -> list[Path]:
    tasks = Path("/proc/self/task").iterdir()
    return [task for task in tasks if (task / "comm").read_text().strip() == name]


@pytest.mark.parametrize("call", ["socket", "setsockopt", "getsockopt"])
async def test_a_relay_that_cannot_ask_for_buffers_goes_without(faults: Faults, call: str) -> None:
    ends: Ends = []
    faults.arm(call, errno.ENOBUFS, last=EVER)
    async with NativeRelay() as relay:
        assert faults.count(call)
        await pour(relay, "plain", ends, lambda: None)
    assert {reason for reason, _ in ends} == {Reason.OK}


async def test_what_ends_something_needs_no_memory(relay: NativeRelay, faults: Faults) -> None:
    """To close a channel or a listener, and to revoke a connection that is denied now, succeeds whatever else fails."""
    async with nothing_left():
        core = new_core()
        both = await tunnel_pair(relay.tls, relay.tls)
        link, client, server = plain_link(core)
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        door = core.listen(os.dup(listener.fileno()), 0, False, "door")
        with client, server, listener:
            faults.arm("malloc", errno.ENOMEM, last=EVER)
            link.abort(b"{}")
            both.close()
            door.close()
            wait_for(lambda core=core: "link" in core.news(), what="the link's end")
            faults.arm("malloc")
            assert link.result()[0] == REASONS.index(Reason.DRAIN)  # aborted
        core.stop()
        core.news()  # which gives back what the core has held
        del link, door, core, both


def test_a_relay_that_hears_of_no_events_ends_its_process() -> None:
    """It would hold all connections, and move no byte: whoever looks after the process starts it again."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_EVENTS],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == -signal.SIGABRT, done
    assert "meshnet: the native relay cannot go on: epoll_wait: Bad file descriptor" in done.stderr


_WITHOUT_EVENTS = """
import errno, signal
from tests.relay.native.faults import watched
from tests.relay.leaks import nothing_left
from tests.relay.native.faults import EVER, MOST, OURS, Faults
from tests.relay.native.test_lifetimes import new_core
with watched() as faults:
    faults.arm("epoll_wait", errno.EBADF)
    new_core()
    signal.pause()
"""


@pytest.mark.parametrize(("rig", "legs"), [("plain", 2), ("mesh", 4)])
async def test_a_message_costs_one_recv_and_one_send_a_leg(
    relay: NativeRelay, faults: Faults, rig: str, legs: int
) -> None:
    messages = 200
    async with RIGS[rig](relay) as it:
        for sent in range(messages + 2):
            if sent == 2:  # the first ones meet what the handshakes left
                for call in ("recv", "send", "sendmsg", "splice", "epoll_ctl"):
                    faults.arm(call)
            near, far = (it.client, it.server) if sent % 2 else (it.server, it.client)
            await near.send_all(b"m" * 256)
            assert await read_exactly(far, 256) == b"m" * 256
        counts = {call: faults.count(call) for call in ("recv", "send", "sendmsg", "splice", "epoll_ctl")}
    half = messages * legs // 2  # each leg receives a message or sends it
    assert counts == {"recv": half, "send": half, "sendmsg": 0, "splice": 0, "epoll_ctl": 0}


async def test_much_is_spliced(relay: NativeRelay, faults: Faults) -> None:
    ends: Ends = []
    await pour(relay, "plain", ends, lambda: faults.arm("splice"))
    assert faults.count("splice") > 1, f"{faults.count('recv')} reads, {faults.count('pipe2')} pipes"
    assert {reason for reason, _ in ends} == {Reason.OK}
