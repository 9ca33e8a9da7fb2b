"""How much of a stream may wait in the kernel: little of near peers', what the kernel finds right of a far one's."""

import contextlib
import fcntl
import os
import select
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from meshnet.relay import Link, PlainLeg
from meshnet.relay.native import NativeRelay
from tests.relay.rig import Rig, Run, mesh_rig, plain_rig, read_exactly, running, stream, tcp_pair
from tests.world import Host, World

MEGABYTE = 1 << 20
MUCH = 16 * MEGABYTE
SO_RCVBUFFORCE = 33  # asm-generic/socket.h; Python does not name it
BOUND = MEGABYTE  # twice what is asked for: socket(7)
NO_ROOM = ("TCPRcvQDrop", "TCPZeroWindowDrop", "BeyondWindow", "RcvPruned", "OfoPruned", "TCPBacklogDrop")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x1, 0x1000  # linux/if_tun.h


@pytest.fixture(autouse=True)
def granted() -> None:
    for option in (SO_RCVBUFFORCE, socket.SO_RCVBUF):
        with socket.socket() as probe, contextlib.suppress(PermissionError):
            probe.setsockopt(socket.SOL_SOCKET, option, BOUND // 2)
            if buffer_of(probe) >= BOUND:
                return
    pytest.skip("net.core.rmem_max is below 512 KiB: buffers are left to the kernel")


@pytest.fixture
def host() -> Iterator[Host]:
    with World() as world:
        yield world.host("one")


def buffer_of(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def counted(*counters: str) -> dict[str, str]:
    """Those that TcpExt has counted anything by in this network namespace (/proc/net/netstat)."""
    names, values, *_ = map(str.split, Path("/proc/thread-self/net/netstat").read_text().splitlines())
    return {name: value for name, value in zip(names, values, strict=True) if name in counters and value != "0"}


async def pump(sender: trio.SocketStream, receiver: trio.SocketStream) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.send_all, bytes(MUCH))
        await read_exactly(receiver, MUCH)


@contextlib.contextmanager
def watched(sock: socket.socket) -> Iterator[socket.socket]:
    """For a look at it when the relay owns it."""
    with sock.dup() as look:
        yield look


@contextlib.asynccontextmanager
async def another(relay: NativeRelay) -> AsyncIterator[tuple[Rig, socket.socket, socket.socket]]:
    """A near stream that was there first, and its legs: its bytes come in by the first one."""
    looks: list[socket.socket] = []

    def look(it: Rig) -> None:
        for leg in (it.first.link.client, it.first.link.endpoint):
            assert isinstance(leg, PlainLeg)
            looks.append(leg.sock.dup())

    async with plain_rig(relay, prepare=look) as it:
        await pump(it.client, it.server)
        client, endpoint = looks
        with client, endpoint:
            yield it, client, endpoint


@contextlib.asynccontextmanager
async def moving(it: Rig) -> AsyncIterator[None]:
    """Never quiet for long meanwhile, however slow the machine, or a sanitizer, makes everything."""
    over = trio.Event()

    async def move() -> None:
        while not over.is_set():
            await it.client.send_all(b"x")
            await read_exactly(it.server, 1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(move)
        yield
        over.set()


async def test_a_connection_alone_is_left_to_the_kernel_in_both_directions(relay: NativeRelay) -> None:
    async with another(relay) as (it, client, endpoint):
        with trio.fail_after(10):
            while buffer_of(client) <= BOUND or buffer_of(endpoint) <= BOUND:
                await pump(it.client, it.server)
                await pump(it.server, it.client)


async def test_one_that_is_idle_is_beside_nobody(relay: NativeRelay) -> None:
    async with another(relay):
        buffer = BOUND
        with trio.fail_after(20):
            while buffer == BOUND:
                async with another(relay) as (it, leg, _):
                    await pump(it.client, it.server)
                    buffer = buffer_of(leg)


@pytest.mark.unsanitized
async def test_one_stream_alone_is_left_to_the_kernel_and_the_next_one_once_it_has_ended(relay: NativeRelay) -> None:
    for _ in range(2):
        async with another(relay) as (it, alone, _):
            async with moving(it), another(relay) as (_, second, _):
                assert buffer_of(second) <= BOUND
            with trio.fail_after(10):
                while buffer_of(alone) <= BOUND:
                    await pump(it.client, it.server)


async def test_the_buffers_of_near_peers_are_bounded_and_nothing_is_dropped_for_it(
    relay: NativeRelay, host: Host
) -> None:
    looks: list[socket.socket] = []

    def look(it: Rig) -> None:
        for leg in (it.first.link.client, it.first.link.endpoint):
            assert isinstance(leg, PlainLeg)
            looks.append(leg.sock.dup())

    with host.entered():
        async with another(relay) as (other, *_), moving(other), plain_rig(relay, prepare=look) as it:
            before = buffer_of(looks[1])
            await pump(it.client, it.server)
            assert buffer_of(looks[0]) <= BOUND
            assert buffer_of(looks[1]) == before  # nothing has come from there
            await pump(it.server, it.client)
            assert buffer_of(looks[1]) <= BOUND
            for sock in looks:
                sock.close()
        assert counted("TCPTimeouts", *NO_ROOM) == {}  # a buffer that shrinks drops what is on its way


async def test_so_are_those_of_tunnels(relay: NativeRelay) -> None:
    async with another(relay) as (other, *_), moving(other), mesh_rig(relay) as it:
        await pump(it.client, it.server)
        tunnel = it.last.link.client
        assert not isinstance(tunnel, PlainLeg)
        with socket.socket(fileno=os.dup(tunnel.channel.tunnel.fileno())) as look:  # type: ignore[attr-defined]  # native
            assert buffer_of(look) <= BOUND


async def test_those_of_far_peers_are_the_kernels(relay: NativeRelay, host: Host) -> None:
    with host.entered(), far_away(host) as (ours, theirs):
        app, leg = tcp_pair()
        with watched(ours) as look:
            run = Run(Link(PlainLeg(leg), PlainLeg(ours)))
            async with stream(app) as client, stream(theirs) as server, running(relay, run):
                before = buffer_of(look)
                await pump(server, client)
                assert buffer_of(look) > max(before, BOUND)  # it has grown by itself


@contextlib.contextmanager
def far_away(host: Host) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection whose packets take 2 ms each way: a device that gives back what goes to 10.99.0.2 as from there."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"far", IFF_TUN | IFF_NO_PI))
    host.configure("addr add 10.99.0.1/24 dev far", "link set far mtu 65535 up")
    over, stop = os.pipe()
    thread = threading.Thread(target=mirror, args=(device, over))
    thread.start()
    try:
        with socket.create_server(("10.99.0.1", 0)) as listener:
            one = socket.create_connection(("10.99.0.2", listener.getsockname()[1]), timeout=10)
            other, _ = listener.accept()
        for sock in (one, other):
            sock.setblocking(False)
        yield one, other
    finally:
        os.close(stop)
        thread.join()
        os.close(over)
        os.close(device)


def mirror(device: int, over: int) -> None:
    packets: list[bytes] = []
    while not select.select([over], [], [], 0.002)[0]:
        for packet in packets:
            if packet[0] >> 4 == 4:  # its checksums do not mind who is who
                os.write(device, packet[:12] + packet[16:20] + packet[12:16] + packet[20:])
        packets.clear()
        with contextlib.suppress(BlockingIOError):
            while True:
                packets.append(os.read(device, 65535))
