"""Tunnels that stand idle: what memory they keep, and what they leave to those that come after them."""

import contextlib
import ctypes
import gc
import socket

import pytest
import trio
import trio.testing

from meshnet.errors import ConnectionFailed
from meshnet.net.tls import Channel, Ticket
from meshnet.relay.native import NativeRelay
from tests.relay.leaks import nothing_left
from tests.relay.rig import context, tcp_pair

TUNNELS = 50
KIB = 1024
# Of a tunnel: 39 with OpenSSL 3.0, and 88 where it keeps the buffers that it reads into, 104 with those it writes from.
BOTH_ENDS = 64 * KIB


class Mallinfo(ctypes.Structure):
    """Of mallinfo2(3), which counts every arena."""

    _fields_ = [(f"field_{number}", ctypes.c_size_t) for number in range(10)]


def allocated() -> int:
    """Bytes. Of the C library: glibc 2.33 and later can tell."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    found = mallinfo()
    return int(found.field_7 + found.field_4)  # uordblks, hblkhd


async def open_tunnel(relay: NativeRelay, ticket: Ticket | None = None, buffer: int = 0) -> tuple[Channel, Channel]:
    """Both ends. Who dialled has read everything, and written nothing since. `buffer` as in tcp_pair."""
    near, far = tcp_pair(buffer)
    served: list[Channel] = []

    async def accept(sock: socket.socket) -> None:
        served.append(await relay.tls.accept(sock, context(relay.tls, is_server=True), 10.0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept, far)
        dialled = await relay.tls.connect(near, context(relay.tls, is_server=False), ticket, 10.0)
    await served[0].send_all(b"x")
    assert await dialled.receive() == b"x"
    return dialled, served[0]


async def size_of_hello(relay: NativeRelay, ticket: Ticket | None) -> int:
    near, far = tcp_pair()

    async def connect() -> None:
        with contextlib.suppress(ConnectionFailed):
            await relay.tls.connect(near, context(relay.tls, is_server=False), ticket, 10.0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connect)
        await trio.lowlevel.wait_readable(far)
        hello = far.recv(16 * KIB)
        far.close()
    return len(hello)


def close(*tunnels: tuple[Channel, Channel]) -> None:
    for ends in tunnels:
        for end in ends:
            end.close()


@pytest.mark.unsanitized
async def test_an_idle_tunnel_keeps_no_buffer(relay: NativeRelay) -> None:
    close(await open_tunnel(relay))  # what is made once is made
    gc.collect()
    before = allocated()
    tunnels = [await open_tunnel(relay) for _ in range(TUNNELS)]
    opened = allocated()
    assert (opened - before) / TUNNELS < BOTH_ENDS
    for dialled, served in tunnels:  # which writes, and OpenSSL lets go of a buffer for writing
        await dialled.send_all(b"y")
        assert await served.receive() == b"y"
    written = allocated()
    assert (opened - written) / TUNNELS < 4 * KIB  # it would be 16
    assert (written - before) / TUNNELS < BOTH_ENDS
    close(*tunnels)


async def test_a_tunnel_whose_peer_was_slow_keeps_no_buffer_for_it(relay: NativeRelay) -> None:
    waited = 2 * 1024 * KIB

    async def fill_and_drain() -> tuple[Channel, Channel]:
        dialled, served = await open_tunnel(relay, buffer=64 * KIB)
        dialled.send_now(bytes(waited))
        left = waited
        while left:
            left -= len(await served.receive())
        return dialled, served

    first = await fill_and_drain()  # and what the thread has for all of them is made
    before = allocated()
    second = await fill_and_drain()
    assert allocated() - before < waited / 4
    close(first, second)


async def test_a_ticket_names_a_session_and_does_not_carry_it(relay: NativeRelay) -> None:
    """Carried, it would have the certificate in it, and be made anew from that for each tunnel."""
    first = await open_tunnel(relay)
    assert await size_of_hello(relay, first[0].ticket) - await size_of_hello(relay, None) < 200
    close(first)


async def test_who_resumed_a_session_is_given_no_other(relay: NativeRelay) -> None:
    first = await open_tunnel(relay)
    second = await open_tunnel(relay, first[0].ticket)
    assert first[0].ticket is not None
    assert second[0].ticket is None
    close(first, second)


@pytest.mark.parametrize("resumed", [0, 1])
async def test_a_session_outlives_the_tunnels_that_had_it(relay: NativeRelay, resumed: int) -> None:
    async with nothing_left():
        first = await open_tunnel(relay)
        ticket = first[0].ticket
        close(first, *[await open_tunnel(relay, ticket) for _ in range(resumed)])
        del first
    await trio.testing.wait_all_tasks_blocked()
    second = await open_tunnel(relay, ticket)
    assert second[0].resumed
    close(second)
