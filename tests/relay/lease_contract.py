"""What every relay keeps towards a tunnel: the peer sidecar is in the test's own hand here, frame by frame."""

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Callable

import pytest
import trio

from meshnet.codec.frames import HEADER_SIZE, MAX_DATA, Data, Fin, Open, Reset
from meshnet.errors import EndedBy, Reason
from meshnet.relay import Outcome, Relay
from tests.relay.rig import (
    OPEN,
    HalfRig,
    Peer,
    Run,
    cpu_share,
    fall_silent,
    inbound_rig,
    mesh_rig,
    no_descriptors_leaked,
    outbound_rig,
    read_all,
    read_exactly,
    reset,
    tunnel_pair,
)
from tests.world import eventually

HalfRigMaker = Callable[..., contextlib.AbstractAsyncContextManager[HalfRig]]
SMALL = 1 << 16  # socket buffers for tests that fill them


@pytest.mark.parametrize("rig", [outbound_rig, inbound_rig])
class LeaseContract:
    """Subclass it beside a fixture `relay`. Outbound the tunnel is the endpoint's leg, inbound the client's."""

    async def test_a_lease_ends_with_two_fins_and_the_tunnel_is_free(self, relay: Relay, rig: HalfRigMaker) -> None:
        async with rig(relay) as it:
            await it.app.send_all(b"ask")
            await it.app.send_eof()
            assert [await it.peer.read() for _ in range(2)] == [b"ask", Fin()]
            await it.peer.send_data(b"answer")
            await it.peer.send(it.peer.wire.fin())
            assert await read_all(it.app) == b"answer"
            outcome = await it.run.result()
            assert (outcome.reason, outcome.ended_by, outcome.reusable) == (Reason.OK, it.who, True)
            assert it.counts == (3, 6)

    async def test_every_frame_is_one_whole_tls_record(self, relay: Relay, rig: HalfRigMaker) -> None:
        data = os.urandom(300_000)
        async with rig(relay) as it, trio.open_nursery() as nursery:
            nursery.start_soon(it.app.send_all, data)
            received = b""
            while len(received) < len(data):
                record = await it.peer.record()
                assert int.from_bytes(record[:HEADER_SIZE], "big") == len(record) - HEADER_SIZE <= MAX_DATA
                received += record[HEADER_SIZE:]
            assert received == data

    async def test_frames_may_come_in_any_pieces(self, relay: Relay, rig: HalfRigMaker) -> None:
        async with rig(relay) as it:
            wire = it.peer.wire
            several = b"".join(wire.data(len(part)) + part for part in (b"one ", b"two ", b"three "))
            split = wire.data(4) + b"four"
            await it.peer.send(several + split[:2])
            for byte in split[2:]:
                await it.peer.send(bytes([byte]))
            await it.peer.send(wire.fin())
            assert await read_all(it.app) == b"one two three four"

    async def test_what_came_with_the_opening_comes_first(self, relay: Relay, rig: HalfRigMaker) -> None:
        def prepare(it: HalfRig) -> None:
            wire = it.peer.wire
            said = wire.data(5) + b"first" + wire.data(4) + b", ok" + wire.fin()
            it.run.link.early_frames = it.own_wire.receive(said)

        async with rig(relay, prepare=prepare) as it:
            assert await read_all(it.app) == b"first, ok"
            assert not it.run.link.early_frames, "kept by a connection that may live long"
            await it.app.send_eof()
            assert await it.peer.read() == Fin()
            assert (await it.run.result()).reusable

    async def test_a_slow_application_gets_many_frames_and_the_fin_behind_them(
        self, relay: Relay, rig: HalfRigMaker
    ) -> None:
        pieces = [os.urandom(9000) for _ in range(200)]

        def prepare(it: HalfRig) -> None:
            wire = it.peer.wire
            said = b"".join(wire.data(len(piece)) + piece for piece in pieces) + wire.fin()
            it.run.link.early_frames = it.own_wire.receive(said)

        async with rig(relay, buffer=SMALL, prepare=prepare) as it:
            await _until_full(it.own_plain)
            assert await read_all(it.app) == b"".join(pieces)

    async def test_a_tunnel_that_is_lost_behind_its_lease_is_nothing_to_a_slow_application(
        self, relay: Relay, rig: HalfRigMaker
    ) -> None:
        said = os.urandom(MAX_DATA)

        def prepare(it: HalfRig) -> None:
            wire = it.peer.wire
            it.run.link.early_frames = it.own_wire.receive((wire.data(MAX_DATA) + said) * 200 + wire.fin())

        async with rig(relay, buffer=SMALL, prepare=prepare) as it:
            await it.app.send_eof()
            assert await it.peer.read() == Fin()
            it.peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            it.peer.sock.close()
            assert await cpu_share() < 0.2
            assert await read_all(it.app) == said * 200
            assert (await it.run.result()).reason is Reason.OK

    async def test_a_frame_that_was_read_in_part_before_the_hand_over_is_read_on(
        self, relay: Relay, rig: HalfRigMaker
    ) -> None:
        said = b""

        def prepare(it: HalfRig) -> None:
            nonlocal said
            said = it.peer.wire.data(5) + b"hello" + it.peer.wire.data(6) + b" again"
            it.run.link.early_frames = it.own_wire.receive(said[:11])

        async with rig(relay, prepare=prepare) as it:
            await it.peer.send(said[11:])
            assert await read_exactly(it.app, 11) == b"hello again"

    async def test_goaway_within_a_lease_does_not_touch_it(self, relay: Relay, rig: HalfRigMaker) -> None:
        async with rig(relay) as it:
            await it.peer.send_data(b"before")
            await it.peer.send(it.peer.wire.goaway())
            await it.peer.send_data(b" after")
            await it.peer.send(it.peer.wire.fin())
            assert await read_all(it.app) == b"before after"
            await it.app.send_eof()
            assert (await it.run.result()).reason is Reason.OK

    async def test_what_came_behind_the_end_is_handed_on(self, relay: Relay, rig: HalfRigMaker) -> None:
        async with rig(relay) as it:
            await it.app.send_eof()
            assert await it.peer.read() == Fin()
            behind = it.peer.wire.fin()
            behind += it.peer.wire.open(OPEN) if rig is inbound_rig else it.peer.wire.goaway()
            await it.peer.send(behind)
            outcome = await it.run.result()
            assert outcome.reusable
            assert len(outcome.late) == 1
            assert isinstance(outcome.late[0], Open) is (rig is inbound_rig)

    @pytest.mark.parametrize("how", ["fin", "rst"])
    async def test_a_lost_tunnel_resets_the_application(self, relay: Relay, rig: HalfRigMaker, how: str) -> None:
        async with rig(relay) as it:
            await it.peer.send_data(b"half a sen")
            assert await read_exactly(it.app, 10) == b"half a sen"
            if how == "rst":
                it.peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            it.peer.sock.close()
            outcome = await it.run.result()
            assert (outcome.reason, outcome.ended_by) == (Reason.TUNNEL_LOST, EndedBy.PEER_PROXY)
            assert not outcome.reusable
            with pytest.raises(trio.BrokenResourceError):
                await read_all(it.app)

    async def test_a_peer_whose_host_fell_silent_is_told_from_a_lost_tunnel(
        self, relay: Relay, rig: HalfRigMaker
    ) -> None:
        async with rig(relay) as it:
            fall_silent(it.peer.sock)
            await it.app.send_all(b"anybody?")
            outcome = await it.run.result()
            assert (outcome.reason, outcome.ended_by) == (Reason.KEEPALIVE_DEAD, EndedBy.PEER_PROXY)

    async def test_a_lost_tunnel_is_noticed_after_the_peers_fin(self, relay: Relay, rig: HalfRigMaker) -> None:
        async with rig(relay) as it:
            await it.peer.send(it.peer.wire.fin())
            assert await read_all(it.app) == b""
            it.peer.sock.close()
            assert (await it.run.result()).reason is Reason.TUNNEL_LOST

    async def test_a_peer_that_breaks_the_protocol_is_not_listened_to(self, relay: Relay, rig: HalfRigMaker) -> None:
        async with rig(relay) as it:
            await it.peer.send(b"GET / HTTP/1.1\r\n\r\n")
            outcome = await it.run.result()
            assert (outcome.reason, outcome.ended_by) == (Reason.TUNNEL_PROTOCOL, EndedBy.PEER_PROXY)
            assert not outcome.reusable
            with pytest.raises(trio.BrokenResourceError):
                await read_all(it.app)

    async def test_cancel_says_the_reason_and_the_tunnel_lives(self, relay: Relay, rig: HalfRigMaker) -> None:
        async with rig(relay) as it:
            await it.app.send_all(b"abc")
            assert await it.peer.read() == b"abc"
            it.run.link.abort_reason, it.run.link.abort_by = Reason.AUTHZ_REVOKED, EndedBy.POLICY
            it.run.scope.cancel()
            assert await it.peer.read() == Reset(reason="authz.revoked")
            with pytest.raises(trio.BrokenResourceError):
                await read_all(it.app)
            assert not it.run.ended.is_set()
            await it.peer.send(it.peer.wire.fin())
            await it.run.ended.wait()
            assert it.run.scope.cancelled_caught
            outcome = _of_cancelled(it.run)
            assert (outcome.reason, outcome.ended_by) == (Reason.AUTHZ_REVOKED, EndedBy.POLICY)
            assert outcome.reusable
            assert it.counts == (3, 0)

    async def test_cancel_waits_a_second_for_a_silent_peer(self, relay: Relay, rig: HalfRigMaker) -> None:
        async with rig(relay) as it:
            started = time.monotonic()
            it.run.scope.cancel()
            await it.run.ended.wait()
            assert 0.9 < time.monotonic() - started < 1.5
            assert not _of_cancelled(it.run).reusable

    async def test_cancel_behind_our_fin_says_the_reason_and_the_tunnel_lives(
        self, relay: Relay, rig: HalfRigMaker
    ) -> None:
        async with rig(relay) as it:
            await it.app.send_eof()
            assert await it.peer.read() == Fin()
            it.run.scope.cancel()
            assert await it.peer.read() == Reset(reason="drain")
            assert not it.run.ended.is_set()
            await it.peer.send(it.peer.wire.reset("drain"))
            await it.run.ended.wait()
            assert _of_cancelled(it.run).reusable

    async def test_cancel_counts_what_a_blocked_peer_gets_in_the_end(self, relay: Relay, rig: HalfRigMaker) -> None:
        async with rig(relay, buffer=SMALL) as it, trio.open_nursery() as nursery:
            nursery.start_soon(_send_for_ever, it.app)
            await _until_full(it.own_sock, it.app.socket)
            it.run.scope.cancel()
            arrived = 0
            while isinstance(frame := await it.peer.frame(), Data):
                arrived += len(frame.payload)
            assert frame == Reset(reason="drain")  # the record that OpenSSL had begun, and then this
            await it.peer.send(it.peer.wire.fin())
            await it.run.ended.wait()
            assert arrived == it.counts[0]
            assert _of_cancelled(it.run).reusable

    async def test_cancel_with_a_slow_application_hears_the_peer_out(self, relay: Relay, rig: HalfRigMaker) -> None:
        async def flood(peer: Peer) -> None:
            for _ in range(300):
                await peer.send_data(bytes(MAX_DATA))
            await peer.send(peer.wire.fin())

        async with rig(relay, buffer=SMALL) as it, trio.open_nursery() as nursery:
            nursery.start_soon(flood, it.peer)
            await _until_full(it.own_plain, it.peer.sock)
            it.run.scope.cancel()
            assert await it.peer.read() == Reset(reason="drain")
            await it.run.ended.wait()
            assert _of_cancelled(it.run).reusable

    async def test_cancel_kills_the_tunnel_of_a_blocked_peer(self, relay: Relay, rig: HalfRigMaker) -> None:
        async with rig(relay, buffer=SMALL) as it, trio.open_nursery() as nursery:
            nursery.start_soon(_send_for_ever, it.app)
            await _until_full(it.own_sock, it.app.socket)
            started = time.monotonic()
            it.run.scope.cancel()
            await it.run.ended.wait()
            assert time.monotonic() - started < 1.5
            assert not _of_cancelled(it.run).reusable
            with pytest.raises(ConnectionResetError):
                while True:
                    await it.peer.record()


class TunnelContract:
    """One tunnel, one lease after the other, a relay at both ends."""

    async def test_a_tunnel_carries_five_hundred_leases(self, relay: Relay) -> None:
        tunnel = await tunnel_pair(relay.tls, relay.tls)
        with no_descriptors_leaked():
            for number in range(500):
                message = f"lease {number}".encode()
                async with mesh_rig(relay, tunnel=tunnel) as it:
                    await it.client.send_all(message)
                    assert await read_exactly(it.server, len(message)) == message
                    one, other = (it.client, it.server) if number % 2 else (it.server, it.client)
                    if number % 5 == 4:  # some of them end badly
                        reset(one)
                    elif number % 5 == 3:
                        await one.send_eof()
                        assert await read_all(other) == b""
                        if number % 10 > 5:
                            await other.send_eof()  # and the reset crosses it, or comes too late
                        reset(one)
                    else:
                        await it.server.send_eof()
                        await it.client.send_eof()
                    for run in it.runs:
                        assert (await run.result()).reusable
        tunnel.close()

    async def test_data_of_the_next_lease_is_kept_from_what_others_send(self, relay: Relay) -> None:
        async with inbound_rig(relay) as it:
            await it.app.send_eof()
            assert await it.peer.read() == Fin()
            wire = it.peer.wire
            await it.peer.send(wire.fin() + wire.open(OPEN) + wire.data(5) + b"early" + wire.fin())
            outcome = await it.run.result()
            async with inbound_rig(relay) as other:
                for _ in range(5):
                    await other.peer.send_data(b"x" * 100)
                    assert await read_exactly(other.app, 100) == b"x" * 100
            opened, data, fin = outcome.late
            assert (opened, fin) == (OPEN, Fin())
            assert isinstance(data, Data)
            assert bytes(data.payload) == b"early"


def _of_cancelled(run: Run) -> Outcome:
    assert run.outcome is None
    assert run.link.outcome is not None
    return run.link.outcome


async def _send_for_ever(app: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while True:
            await app.send_all(bytes(SMALL))


async def _until_full(*socks: socket.socket | trio.socket.SocketType) -> None:
    """Until the kernel takes no more for any of them: who should read at the other end does not."""
    poll = select.poll()
    for sock in socks:
        poll.register(sock.fileno(), select.POLLOUT)
    await eventually(lambda: not poll.poll(0))
