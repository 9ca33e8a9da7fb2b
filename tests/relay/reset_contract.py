"""What every relay keeps of resets, said and heard: they reach the other application, and cost no tunnel."""

import socket
from collections.abc import Callable

import pytest
import trio

from meshnet.codec.frames import MAX_DATA, Fin, Reset
from meshnet.errors import EndedBy, Reason
from meshnet.relay import Relay
from meshnet.tunnel.protocol import Tunnel
from tests.relay.lease_contract import SMALL, HalfRigMaker
from tests.relay.rig import HalfRig, inbound_rig, outbound_rig, read_all, reset


@pytest.mark.parametrize("rig", [outbound_rig, inbound_rig])
class ResetContract:
    """As LeaseContract."""

    @pytest.mark.parametrize(
        ("text", "reason", "from_afar"),
        [
            ("peer.rst", Reason.PEER_RST, True),
            ("keepalive.dead", Reason.KEEPALIVE_DEAD, True),
            ("drain", Reason.DRAIN, False),
            ("authz.revoked", Reason.AUTHZ_REVOKED, False),
            ("a.reason.of.tomorrow", Reason.PEER_RST, False),
        ],
    )
    async def test_a_reset_frame_resets_the_application(
        self, relay: Relay, rig: HalfRigMaker, text: str, reason: Reason, from_afar: bool
    ) -> None:
        async with rig(relay) as it:
            await it.peer.send(it.peer.wire.reset(text))
            assert isinstance(await it.peer.frame(), Reset)  # each side says its end
            outcome = await it.run.result()
            assert (outcome.reason, outcome.ended_by) == (reason, it.far if from_afar else EndedBy.PEER_PROXY)
            assert outcome.reusable
            with pytest.raises(trio.BrokenResourceError):
                await read_all(it.app)

    async def test_a_reset_frame_behind_our_fin_leaves_the_tunnel_usable(self, relay: Relay, rig: HalfRigMaker) -> None:
        async with rig(relay) as it:
            await it.app.send_eof()
            assert await it.peer.read() == Fin()
            await it.peer.send(it.peer.wire.reset("peer.rst"))
            assert (await it.run.result()).reusable

    async def test_a_reset_by_the_application_is_said_and_the_peer_ends(self, relay: Relay, rig: HalfRigMaker) -> None:
        async with rig(relay) as it:
            reset(it.app)
            assert await it.peer.read() == Reset(reason="peer.rst")
            await it.peer.send_data(b"on its way")  # passed over
            assert it.run.outcome is None
            await it.peer.send(it.peer.wire.fin())
            outcome = await it.run.result()
            assert (outcome.reason, outcome.ended_by, outcome.reusable) == (Reason.PEER_RST, it.who, True)
            assert it.counts == (0, 0)

    @pytest.mark.parametrize("end", [Tunnel.fin, lambda wire: wire.reset("peer.rst")])
    async def test_a_reset_by_the_application_behind_its_fin_is_said_too(
        self, relay: Relay, rig: HalfRigMaker, end: Callable[[Tunnel], bytes]
    ) -> None:
        async with rig(relay) as it:
            await it.app.send_eof()
            assert await it.peer.read() == Fin()
            reset(it.app)
            assert await it.peer.read() == Reset(reason="peer.rst")
            await it.peer.send_data(b"on its way")  # passed over
            assert it.run.outcome is None
            await it.peer.send(end(it.peer.wire))
            outcome = await it.run.result()
            assert (outcome.reason, outcome.ended_by, outcome.reusable) == (Reason.PEER_RST, it.who, True)
            assert it.own_wire.lease_over

    async def test_an_application_that_fails_on_the_last_words_of_the_peer_costs_no_tunnel(
        self, relay: Relay, rig: HalfRigMaker
    ) -> None:
        async with rig(relay) as it:
            await it.app.send_eof()
            assert await it.peer.read() == Fin()
            it.own_plain.shutdown(socket.SHUT_WR)  # so that the next send fails, and nothing tells before
            await it.peer.send(it.peer.wire.data(5) + b"words" + it.peer.wire.fin())
            outcome = await it.run.result()
            assert (outcome.reason, outcome.reusable) == (Reason.PEER_RST, True)

    @pytest.mark.parametrize("in_one_record", [True, False])
    async def test_a_reset_frame_behind_a_fin_resets_the_application(
        self, relay: Relay, rig: HalfRigMaker, in_one_record: bool
    ) -> None:
        async with rig(relay) as it:
            said = it.peer.wire.fin()
            if not in_one_record:
                await it.peer.send(said)
                assert await read_all(it.app) == b""
                said = b""
            await it.peer.send(said + it.peer.wire.reset("peer.rst"))
            assert await it.peer.read() == Reset(reason="peer.rst")
            outcome = await it.run.result()
            assert (outcome.reason, outcome.ended_by, outcome.reusable) == (Reason.PEER_RST, it.far, True)
            with pytest.raises((ConnectionResetError, BrokenPipeError)):  # EPIPE for an RST behind a FIN
                while True:
                    await it.app.socket.send(b"anybody?")

    async def test_a_reset_frame_behind_a_fin_is_noticed_though_the_application_is_slow(
        self, relay: Relay, rig: HalfRigMaker
    ) -> None:
        def prepare(it: HalfRig) -> None:
            wire = it.peer.wire
            said = (wire.data(MAX_DATA) + bytes(MAX_DATA)) * 200 + wire.fin()
            it.run.link.early_frames = it.own_wire.receive(said)

        async with rig(relay, buffer=SMALL, prepare=prepare) as it:
            await it.peer.send(it.peer.wire.reset("peer.rst"))
            assert await it.peer.read() == Reset(reason="peer.rst")
            outcome = await it.run.result()
            assert (outcome.reason, outcome.ended_by, outcome.reusable) == (Reason.PEER_RST, it.far, True)
