"""What every relay keeps, whatever its legs: two applications must not be able to tell that it is there."""

import contextlib
import hashlib
import os
import socket
import time
from collections.abc import Callable

import pytest
import trio

from meshnet.errors import EndedBy, Reason
from meshnet.relay import Relay
from tests.relay.rig import (
    Rig,
    cpu_share,
    fall_silent,
    mesh_rig,
    no_descriptors_leaked,
    plain_rig,
    read_all,
    read_exactly,
    reset,
)
from tests.world import SLOWNESS, eventually

RigMaker = Callable[..., contextlib.AbstractAsyncContextManager[Rig]]
MEGABYTE = 1 << 20
SMALL = 1 << 16  # socket buffers for tests that fill them
QUIET = 1.0  # seconds without an answer, after which the relay takes a peer for gone


@pytest.mark.parametrize("rig", [plain_rig, mesh_rig])
class RelayContract:
    """Subclass it beside a fixture `relay`."""

    async def test_half_close_passes_and_the_other_direction_goes_on(self, relay: Relay, rig: RigMaker) -> None:
        async with rig(relay) as it:
            await it.client.send_all(b"request")
            await it.client.send_eof()
            assert await read_all(it.server) == b"request"
            assert (it.first.tally.client_done, it.first.tally.endpoint_done) == (True, False)
            await it.server.send_all(b"answer")
            assert await read_exactly(it.client, 6) == b"answer"
            await it.server.send_eof()
            assert await read_all(it.client) == b""
            for run in it.runs:
                outcome = await run.result()
                assert (outcome.reason, outcome.ended_by) == (Reason.OK, EndedBy.CLIENT)
                assert (run.tally.sent, run.tally.received) == (7, 6)
                assert outcome.reusable is (rig is mesh_rig)

    async def test_an_end_moves_the_time_of_the_last_movement(self, relay: Relay, rig: RigMaker) -> None:
        """Or a connection that was quiet for long would be half-closed for as long at once."""
        async with rig(relay) as it:
            await it.client.send_all(b"x")
            assert await read_exactly(it.server, 1) == b"x"
            tally = it.first.tally
            tally.refresh()
            before = tally.moved_at
            await it.client.send_eof()
            assert await read_all(it.server) == b""
            tally.refresh()
            assert tally.moved_at > before

    async def test_the_server_may_speak_and_end_first(self, relay: Relay, rig: RigMaker) -> None:
        async with rig(relay) as it:
            await it.server.send_all(b"220 ready")
            await it.server.send_eof()
            assert await read_all(it.client) == b"220 ready"
            await it.client.send_all(b"bye")
            await it.client.send_eof()
            assert await read_all(it.server) == b"bye"
            for run in it.runs:
                outcome = await run.result()
                assert (outcome.reason, outcome.ended_by) == (Reason.OK, EndedBy.SERVER)
                assert (run.tally.sent, run.tally.received) == (3, 9)

    async def test_a_connection_without_a_byte_ends_well(self, relay: Relay, rig: RigMaker) -> None:
        async with rig(relay) as it:
            await it.client.send_eof()
            assert await read_all(it.server) == b""
            await it.server.send_eof()
            for run in it.runs:
                assert (await run.result()).reason is Reason.OK
                assert (run.tally.sent, run.tally.received) == (0, 0)

    @pytest.mark.parametrize("size", [1, 4096, 65520, 65521, 3 * MEGABYTE])
    async def test_a_fin_right_behind_data_loses_neither(self, relay: Relay, rig: RigMaker, size: int) -> None:
        data = os.urandom(size)
        for _ in range(5):
            async with rig(relay) as it, trio.open_nursery() as nursery:
                nursery.start_soon(_send_and_end, it.client, data)
                nursery.start_soon(_send_and_end, it.server, data)
                assert await read_all(it.server) == data
                assert await read_all(it.client) == data
                assert (await it.last.result()).reason is Reason.OK

    async def test_every_byte_arrives_in_order_in_both_directions_at_once(self, relay: Relay, rig: RigMaker) -> None:
        hashes: dict[str, str] = {}
        async with rig(relay) as it, trio.open_nursery() as nursery:
            nursery.start_soon(_hash_of_all, hashes, "at server", it.server)
            nursery.start_soon(_hash_of_all, hashes, "at client", it.client)
            nursery.start_soon(_send_hashed, hashes, "by client", it.client, 64 * MEGABYTE)
            nursery.start_soon(_send_hashed, hashes, "by server", it.server, 24 * MEGABYTE)
            for run in it.runs:
                assert (await run.result()).reason is Reason.OK
                assert (run.tally.sent, run.tally.received) == (64 * MEGABYTE, 24 * MEGABYTE)
        assert hashes["at server"] == hashes["by client"]
        assert hashes["at client"] == hashes["by server"]

    async def test_a_stream_of_many_sizes_arrives_unharmed(self, relay: Relay, rig: RigMaker) -> None:
        pieces = [os.urandom(size) for size in (1, 70_000, 5, 16_380, 16_381, 200_000, 3, 65_520, 32_768)] * 8
        async with rig(relay, buffer=SMALL) as it, trio.open_nursery() as nursery:
            nursery.start_soon(_send_pieces, it.client, pieces)
            assert await read_all(it.server) == b"".join(pieces)

    @pytest.mark.parametrize("half_closed", ["neither", "client", "server"])
    @pytest.mark.parametrize("resetter", [EndedBy.CLIENT, EndedBy.SERVER])
    async def test_a_reset_reaches_the_other_application(
        self, relay: Relay, rig: RigMaker, resetter: EndedBy, half_closed: str
    ) -> None:
        async with rig(relay) as it:
            near, far = (it.client, it.server) if resetter is EndedBy.CLIENT else (it.server, it.client)
            await near.send_all(b"x")
            assert await read_exactly(far, 1) == b"x"
            if half_closed != "neither":
                one, other = (it.client, it.server) if half_closed == "client" else (it.server, it.client)
                await one.send_eof()
                assert await read_all(other) == b""
            reset(near)
            with pytest.raises(OSError):
                await _until_broken(far)
            await it.ended()
            for run in it.runs:
                assert run.outcome is not None
                assert (run.outcome.reason, run.outcome.ended_by) == (Reason.PEER_RST, resetter)
                assert run.outcome.reusable is (rig is mesh_rig)

    async def test_a_reset_is_noticed_behind_a_stuck_reader(self, relay: Relay, rig: RigMaker) -> None:
        async with rig(relay, buffer=SMALL) as it:
            await _send_until_stuck(it.client)
            reset(it.client)
            await it.ended()
            with pytest.raises(OSError):
                await _until_broken(it.server)
            assert it.first.outcome is not None
            assert (it.first.outcome.reason, it.first.outcome.ended_by) == (Reason.PEER_RST, EndedBy.CLIENT)

    async def test_a_leg_whose_host_fell_silent_is_told_from_a_reset(self, relay: Relay, rig: RigMaker) -> None:
        async with rig(relay) as it:
            fall_silent(it.client.socket)
            await it.server.send_all(b"anybody?")
            with pytest.raises(OSError):
                await _until_broken(it.server)
            await it.ended()
            for run in it.runs:
                assert run.outcome is not None
                assert (run.outcome.reason, run.outcome.ended_by) == (Reason.KEEPALIVE_DEAD, EndedBy.CLIENT)

    async def test_who_does_not_read_for_long_is_not_taken_for_one_that_is_gone(
        self, relay: Relay, rig: RigMaker
    ) -> None:
        async with rig(relay, buffer=SMALL) as it:
            await it.server.send_all(b"a little, which waits in the kernel alone")
            taken = await _send_until_stuck(it.client)
            with trio.move_on_after(4 * QUIET) as patience:
                await it.ended()
            assert patience.cancelled_caught, it.first.outcome
            await it.client.send_eof()
            assert len(await read_all(it.server)) == taken

    async def test_what_a_failed_connection_left_behind_reaches_no_other(self, relay: Relay, rig: RigMaker) -> None:
        async with rig(relay) as it:
            await _send_until_stuck(it.client, b"\xff")
            reset(it.server)
            await it.ended()
        async with rig(relay) as it, trio.open_nursery() as nursery:
            nursery.start_soon(it.client.send_all, bytes(16 * MEGABYTE))
            assert await read_exactly(it.server, 16 * MEGABYTE) == bytes(16 * MEGABYTE)

    @pytest.mark.unsanitized
    async def test_a_stuck_reader_stops_the_writer_and_loses_nothing(self, relay: Relay, rig: RigMaker) -> None:
        memory = _resident()
        async with rig(relay, buffer=SMALL) as it:
            taken = await _send_until_stuck(it.client)
            assert taken < 4 * MEGABYTE
            assert _resident() - memory < 8 * MEGABYTE
            assert it.first.tally.sent <= taken
            await it.server.send_all(b"still there")  # the other direction does not care
            assert await read_exactly(it.client, 11) == b"still there"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(it.client.send_eof)
                assert len(await read_all(it.server)) == taken
            assert it.last.tally.sent == taken

    async def test_a_waiting_connection_costs_no_cpu(self, relay: Relay, rig: RigMaker) -> None:
        async with rig(relay, buffer=SMALL) as it:
            await _send_until_stuck(it.client)
            assert await cpu_share() < 0.2
            await it.client.send_eof()
            assert await cpu_share() < 0.2
            await it.server.send_eof()  # now the client's leg is shut in both directions with bytes still in it
            assert await read_all(it.client) == b""
            assert await cpu_share() < 0.2
            await read_all(it.server)
            for run in it.runs:
                assert (await run.result()).reason is Reason.OK

    async def test_cancel_resets_both_legs_and_the_tally_is_exact(self, relay: Relay, rig: RigMaker) -> None:
        async with rig(relay) as it:
            await it.client.send_all(bytes(3 * MEGABYTE))
            assert len(await read_exactly(it.server, 3 * MEGABYTE)) == 3 * MEGABYTE
            await it.server.send_all(bytes(1000))
            assert len(await read_exactly(it.client, 1000)) == 1000
            started = time.monotonic()
            it.first.scope.cancel()
            await it.ended()
            assert time.monotonic() - started < 0.9  # nobody was waited for
            for app in (it.client, it.server):
                with pytest.raises(OSError):
                    await _until_broken(app)
            assert it.first.scope.cancelled_caught
            assert it.first.link.outcome is not None
            assert it.first.link.outcome.reason is Reason.DRAIN
            for run in it.runs:
                assert (run.tally.sent, run.tally.received) == (3 * MEGABYTE, 1000)
            if rig is mesh_rig:
                outcome = await it.last.result()
                assert (outcome.reason, outcome.ended_by) == (Reason.DRAIN, EndedBy.PEER_PROXY)
                assert outcome.reusable
                assert it.first.link.outcome.reusable

    async def test_abort_resets_both_legs_and_the_tunnel_lives_on(self, relay: Relay, rig: RigMaker) -> None:
        async with rig(relay) as it:
            await it.client.send_all(b"x")
            assert await read_exactly(it.server, 1) == b"x"
            link = it.first.link
            link.abort_reason, link.abort_by = Reason.AUTHZ_REVOKED, EndedBy.POLICY
            assert link.abort is not None
            link.abort()
            link.abort()
            outcome = await it.first.result()
            assert (outcome.reason, outcome.ended_by) == (Reason.AUTHZ_REVOKED, EndedBy.POLICY)
            await it.ended()
            for app in (it.client, it.server):
                with pytest.raises(OSError):
                    await _until_broken(app)
            if rig is mesh_rig:
                assert outcome.reusable
                far = await it.last.result()
                assert (far.reason, far.ended_by) == (Reason.AUTHZ_REVOKED, EndedBy.PEER_PROXY)

    async def test_cancel_in_full_flow_counts_no_byte_that_was_not_sent(self, relay: Relay, rig: RigMaker) -> None:
        async with rig(relay, buffer=SMALL) as it, trio.open_nursery() as nursery:
            arrived: list[int] = []
            nursery.start_soon(_send_for_ever, it.client)
            nursery.start_soon(_count_until_broken, it.server, arrived)
            await eventually(lambda: it.last.tally.sent > 20 * MEGABYTE)
            it.first.scope.cancel()
            await it.ended()
            await eventually(lambda: bool(arrived))
            on_the_way = 16 * SMALL  # what an RST throws out of the last socket's send buffer
            assert it.last.tally.sent - on_the_way <= arrived[0] <= it.last.tally.sent <= it.first.tally.sent

    async def test_cancel_with_a_stuck_reader_takes_about_a_second_at_most(self, relay: Relay, rig: RigMaker) -> None:
        async with rig(relay, buffer=SMALL) as it:
            await _send_until_stuck(it.client)
            started = time.monotonic()
            it.first.scope.cancel()
            await it.ended()
            assert time.monotonic() - started < 5.0
            for app in (it.client, it.server):
                with pytest.raises(OSError):
                    await _until_broken(app)

    async def test_cancelled_before_it_began(self, relay: Relay, rig: RigMaker) -> None:
        with no_descriptors_leaked():
            async with rig(relay, prepare=lambda it: it.first.scope.cancel()) as it:
                await it.ended()
                for app in (it.client, it.server):
                    with pytest.raises(OSError):
                        await _until_broken(app)

    async def test_no_descriptor_is_left_open(self, relay: Relay, rig: RigMaker) -> None:
        for measured in (False, True):  # what a relay opens once it opens the first time
            with no_descriptors_leaked() if measured else contextlib.nullcontext():
                for end in ("fin", "reset", "cancel"):
                    async with rig(relay, buffer=SMALL) as it:
                        await _echo_through(it, 2 * MEGABYTE)
                        if end == "cancel":
                            it.first.scope.cancel()
                        elif end == "reset":
                            reset(it.server)
                        else:
                            await it.client.send_eof()
                            await it.server.send_eof()
                        await it.ended()

    async def test_what_was_read_before_the_hand_over_comes_first(self, relay: Relay, rig: RigMaker) -> None:
        before = os.urandom(100_000)

        def prepare(it: Rig) -> None:
            it.first.link.to_client, it.first.link.to_endpoint = b"hello", before

        async with rig(relay, prepare=prepare) as it:
            await it.client.send_all(b" and more")
            await it.server.send_all(b" as usual")
            assert await read_exactly(it.client, 14) == b"hello as usual"
            assert await read_exactly(it.server, 100_009) == before + b" and more"
            link = it.first.link
            assert (link.to_client, link.to_endpoint) == (b"", b""), "kept by a connection that may live long"

    async def test_two_hundred_connections_at_once(self, relay: Relay, rig: RigMaker) -> None:
        async with contextlib.AsyncExitStack() as stack:
            rigs = [await stack.enter_async_context(rig(relay)) for _ in range(200)]
            async with trio.open_nursery() as nursery:
                for number, it in enumerate(rigs):
                    nursery.start_soon(_ping_pong, it, f"connection {number}".encode())
            for it in rigs:
                for run in it.runs:
                    assert (await run.result()).reason is Reason.OK
                    assert run.tally.sent == run.tally.received > 0


async def _send_and_end(app: trio.SocketStream, data: bytes) -> None:
    await app.send_all(data)
    await app.send_eof()


async def _send_pieces(app: trio.SocketStream, pieces: list[bytes]) -> None:
    for piece in pieces:
        await app.send_all(piece)
    await app.send_eof()


async def _send_hashed(hashes: dict[str, str], name: str, app: trio.SocketStream, size: int) -> None:
    block = os.urandom(MEGABYTE + 1)
    digest = hashlib.blake2b()
    while size:
        piece = block[:size]
        digest.update(piece)
        await app.send_all(piece)
        size -= len(piece)
    await app.send_eof()
    hashes[name] = digest.hexdigest()


async def _hash_of_all(hashes: dict[str, str], name: str, app: trio.SocketStream) -> None:
    digest = hashlib.blake2b()
    while piece := await app.receive_some(1 << 18):
        digest.update(piece)
    hashes[name] = digest.hexdigest()


async def _send_until_stuck(app: trio.SocketStream, byte: bytes = b"x") -> int:
    """Sends until nothing more is taken for a quarter of a second; the bytes that were."""
    block, taken = byte * MEGABYTE, 0
    while True:
        with trio.move_on_after(0.25) as patience:
            taken += await app.socket.send(block)
        if patience.cancelled_caught:
            return taken


async def _send_for_ever(app: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while True:
            await app.send_all(bytes(SMALL))


async def _count_until_broken(app: trio.SocketStream, counts: list[int]) -> None:
    count = 0
    with contextlib.suppress(OSError):
        while piece := await app.socket.recv(SMALL):
            count += len(piece)
    counts.append(count)


async def _until_broken(app: trio.SocketStream) -> None:
    """Raises OSError for an RST, and TooSlowError if none comes: neither for a FIN, nor for what answers a send."""
    with trio.fail_after(10 * SLOWNESS):
        while await app.socket.recv(SMALL):
            pass
        while not (error := app.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
            await trio.sleep(0.001)
    raise OSError(error, os.strerror(error))


async def _echo_through(it: Rig, size: int) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.client.send_all, bytes(size))
        assert len(await read_exactly(it.server, size)) == size
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.server.send_all, bytes(size))
        assert len(await read_exactly(it.client, size)) == size


async def _ping_pong(it: Rig, message: bytes) -> None:
    for _ in range(5):
        await it.client.send_all(message)
        assert await read_exactly(it.server, len(message)) == message
        await it.server.send_all(message)
        assert await read_exactly(it.client, len(message)) == message
    await it.client.send_eof()
    assert await read_all(it.server) == b""
    await it.server.send_eof()


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
