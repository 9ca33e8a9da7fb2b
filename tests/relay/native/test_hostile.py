"""What a peer sidecar may do to the native relay, and what it must not get by it."""

import contextlib
import os
import socket
import ssl
import subprocess

import pytest
import trio

from meshnet.codec.frames import MAX_DATA, Fin, GoAway, Pong, Reset, encode
from meshnet.errors import EndedBy, Reason
from meshnet.net.python_tls import PythonTls
from meshnet.relay.native import NativeRelay
from tests.relay.lease_contract import SMALL, HalfRigMaker
from tests.relay.native.test_orders import asleep
from tests.relay.rig import (
    HalfRig,
    Peer,
    _files,
    context,
    fall_silent,
    inbound_rig,
    outbound_rig,
    read_all,
    read_exactly,
    tunnel_pair,
)
from tests.world import SLOWNESS, eventually

MEGABYTE = 1 << 20
both_rigs = pytest.mark.parametrize("rig", [outbound_rig, inbound_rig])


@both_rigs
async def test_what_openssl_says_to_one_peer_never_reaches_another(relay: NativeRelay, rig: HalfRigMaker) -> None:
    async with rig(relay) as other:
        for garbage in (
            b"\x17\x03\x03\x00\x20" + bytes(32),
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x16\x03\x03\x40\x00" + bytes(99),
        ):
            async with rig(relay) as it:
                _send_raw(it.peer.sock, garbage)  # OpenSSL answers with an alert
                if len(garbage) > 100:
                    it.peer.sock.close()
                outcome = await it.run.result()
                assert (outcome.reason, outcome.ended_by) == (Reason.TUNNEL_LOST, EndedBy.PEER_PROXY)
                assert not outcome.reusable
            await other.app.send_all(b"unharmed")
            assert await other.peer.read() == b"unharmed"


@both_rigs
async def test_an_application_that_takes_no_more_costs_no_tunnel(relay: NativeRelay, rig: HalfRigMaker) -> None:
    async with rig(relay) as it:
        it.own_plain.shutdown(socket.SHUT_WR)  # so that the next send fails, and nothing tells before
        await it.peer.send_data(b"words")
        assert await it.peer.read() == Reset(reason="peer.rst")
        assert it.run.outcome is None
        await it.peer.send(it.peer.wire.fin())
        outcome = await it.run.result()
        assert (outcome.reason, outcome.ended_by, outcome.reusable) == (Reason.PEER_RST, it.who, True)


@both_rigs
@pytest.mark.parametrize("frame", [GoAway(), Pong()])
async def test_what_belongs_between_leases_cannot_be_piled_up_in_one(
    relay: NativeRelay, rig: HalfRigMaker, frame: GoAway | Pong
) -> None:
    async with rig(relay) as it:
        with contextlib.suppress(OSError):
            for _ in range(16):
                await it.peer.send(encode(frame) * 4000)
        outcome = await it.run.result()
        assert (outcome.reason, outcome.reusable) == (Reason.TUNNEL_PROTOCOL, False)


async def test_an_end_right_behind_the_last_bytes_of_a_tunnel_is_found(relay: NativeRelay) -> None:
    """Both wait in the kernel when the core reads on: one event has told of the two, and none will tell of the end."""
    pair = await tunnel_pair(relay.tls, PythonTls())
    peer = Peer(pair.server)
    for _ in range(5):  # more than the core keeps for Python: it reads no further
        await peer.send(encode(GoAway()) * 4000)
    await eventually(lambda: asleep("relay") == 1, what="the core has read them")
    await peer.send(encode(GoAway()))
    peer.sock.close()
    await eventually(lambda: asleep("relay") == 1, what="the core has heard of the end")
    with trio.fail_after(10 * SLOWNESS):
        while await pair.client.channel.receive():
            pass
    pair.close()


@pytest.mark.unsanitized
async def test_a_peer_that_pings_and_never_reads_is_not_listened_to_for_ever(relay: NativeRelay) -> None:
    pair = await tunnel_pair(PythonTls(), relay.tls, SMALL)
    peer, own = Peer(pair.client), pair.server.channel
    peer.sock.setblocking(False)
    memory, answered = _resident(), 0

    async def answer() -> None:
        nonlocal answered
        while data := await own.receive():
            answered += len(data) // 4
            own.send_now(b"".join(encode(Pong()) for _ in range(len(data) // 4)))

    asked, blocked = 0, trio.Event()
    block = bytes([6, 0, 0, 0]) * 4096
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        while not blocked.is_set():
            with trio.move_on_after(0.25) as patience:
                await peer.send(block)
                asked += 4096
            if patience.cancelled_caught:
                blocked.set()
            assert _resident() - memory < 16 * MEGABYTE
        nursery.cancel_scope.cancel()
    assert answered <= asked
    pair.close()


@both_rigs
async def test_a_peer_that_floods_a_lease_that_was_aborted_is_cut(relay: NativeRelay, rig: HalfRigMaker) -> None:
    # Frames of one byte: more work for who reads them than for who writes them, so there is always more to read.
    flood = b"\0\0\0\1x" * (MAX_DATA // 5)
    for _ in range(2):
        async with rig(relay) as it, trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, _flood, it.peer.sock, flood)
            assert await read_exactly(it.app, MEGABYTE)
            with trio.fail_after(5):
                it.run.scope.cancel()
                await it.run.ended.wait()
            assert it.run.link.outcome is not None
            assert not it.run.link.outcome.reusable


@both_rigs
@pytest.mark.parametrize(
    "offence", ["data behind fin", "fin twice", "a frame too large", "open", "an empty data frame"]
)
async def test_a_lease_that_breaks_the_rules_ends_its_tunnel(
    relay: NativeRelay, rig: HalfRigMaker, offence: str
) -> None:
    fin, data = encode(Fin()), b"\0\0\0\1x"
    said = {
        "data behind fin": fin + data,
        "fin twice": fin + fin,
        "a frame too large": b"\0\0\x3f\xfd",
        "open": b"\1\0\0\2{}",
        "an empty data frame": b"\0\0\0\0",
    }[offence]
    async with rig(relay) as it:
        await it.peer.send(said)
        outcome = await it.run.result()
        assert (outcome.reason, outcome.ended_by) == (Reason.TUNNEL_PROTOCOL, EndedBy.PEER_PROXY)
        assert not outcome.reusable


@both_rigs
@pytest.mark.parametrize("payload", [b"", b"{}", b"\0" * 4096])
async def test_a_reset_that_says_nothing_of_sense_is_still_a_reset(
    relay: NativeRelay, rig: HalfRigMaker, payload: bytes
) -> None:
    async with rig(relay) as it:
        await it.peer.send(b"\5" + len(payload).to_bytes(3, "big") + payload)
        outcome = await it.run.result()
        assert (outcome.reason, outcome.reusable) == (Reason.TUNNEL_PROTOCOL, False)
        with pytest.raises(trio.BrokenResourceError):
            await read_all(it.app)


async def test_frames_at_the_limit_pass_in_any_pieces(relay: NativeRelay) -> None:
    async with outbound_rig(relay) as it:
        data = os.urandom(MAX_DATA)
        said = it.peer.wire.data(MAX_DATA) + data
        for size in (1, 2, 3, 4, 5, 16383):
            await it.peer.send(said[:size])
            await it.peer.send(said[size:])
            assert await read_exactly(it.app, MAX_DATA) == data


async def test_small_frames_overtake_none_that_wait_for_a_slow_application(relay: NativeRelay) -> None:
    """A record has thousands of them: some wait while the application makes room, and others come behind them."""
    words = bytes(range(251)) * 12
    rounds = 200
    async with inbound_rig(relay, buffer=4096) as it, trio.open_nursery() as nursery:

        async def send() -> None:
            record = b"".join(it.peer.wire.data(1) + bytes([byte]) for byte in words)
            for _ in range(rounds):
                await it.peer.send(record)
            await it.peer.send(it.peer.wire.fin())

        nursery.start_soon(send)
        assert await read_all(it.app) == words * rounds


async def test_a_peer_may_update_its_keys_at_any_time(relay: NativeRelay) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    certificate, key, bundle = _files()
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    arguments = ["-connect", address, "-alpn", "meshnet/1", "-CAfile", bundle]
    with subprocess.Popen(
        ["openssl", "s_client", *arguments, "-cert", certificate, "-key", key, "-tls1_3"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        with listener:
            sock, _ = listener.accept()
        sock.setblocking(False)
        channel = await relay.tls.accept(sock, context(relay.tls, is_server=True), 10.0)
        for number in range(3):
            client.stdin.write(b"K\n")  # a new key, and please change yours
            client.stdin.flush()
            await trio.to_thread.run_sync(_read_until, client.stdout, b"KEYUPDATE")
            client.stdin.write(b"asked %d\n" % number)
            client.stdin.flush()
            assert await channel.receive() == b"asked %d\n" % number
            await channel.send_all(b"answer %d\n" % number)
            await trio.to_thread.run_sync(_read_until, client.stdout, b"answer %d\n" % number)
        channel.close()
        client.stdin.close()
        client.wait(10)


async def test_a_silent_peer_costs_no_more_than_it_has_sent(relay: NativeRelay) -> None:
    def prepare(it: HalfRig) -> None:
        it.own_sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 100)

    async with outbound_rig(relay, prepare=prepare) as it:
        _send_raw(it.peer.sock, b"\x17\x03\x03\x40\x00")  # a record that never comes
        fall_silent(it.peer.sock)
        await it.app.send_all(b"anybody?")
        assert (await it.run.result()).reason is Reason.KEEPALIVE_DEAD


def _send_raw(sock: socket.socket, data: bytes) -> None:
    """Past TLS."""
    with socket.fromfd(sock.fileno(), sock.family, sock.type) as raw:
        raw.send(data)


def _flood(sock: ssl.SSLSocket, block: bytes) -> None:
    with socket.fromfd(sock.fileno(), sock.family, sock.type) as raw:
        raw.setblocking(True)
    sock.setblocking(True)
    with contextlib.suppress(OSError, ValueError):
        while True:
            sock.sendall(block)


def _read_until(file: object, wanted: bytes) -> None:
    line = b""
    while wanted not in line:
        line = file.readline()  # type: ignore[attr-defined] # what Popen has for a pipe
        assert line, "openssl has ended"


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
