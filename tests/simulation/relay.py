"""The relay of a simulated mesh: a session's life without its bytes."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import trio

from meshnet.codec.frames import Fin, Frame, Reset
from meshnet.errors import EndedBy, Reason
from meshnet.relay import TUNNEL_CLOSED, Link, Outcome, PlainLeg, Tally, TunnelLeg, reset_by_peer
from meshnet.tunnel.protocol import LocalError
from tests.simulation.network import Network
from tests.simulation.tunnels import Tls


class Relay:
    """Moves nothing for as long as a session lasts, or until its endpoint dies or somebody aborts it.

    How long that is, is up to the side that has the client; of a lease each side hears the other's end.
    """

    name = "simulated"
    takes_orders = False

    def __init__(self, network: Network) -> None:
        self.tls = Tls()
        self._network = network
        self.lasts: Callable[[], float]

    def fits(self, _link: Link) -> bool:
        return True

    def suspend_orders(self) -> None:
        """It takes none."""

    async def run(self, link: Link, tally: Tally) -> Outcome:
        aborted = trio.Event()
        link.abort = aborted.set
        tally.sent = tally.received = 1
        tally.moved_at = trio.current_time()

        async def abort() -> Outcome:
            await aborted.wait()
            return Outcome(link.abort_reason, link.abort_by)

        tunnel = next((leg for leg in (link.endpoint, link.client) if isinstance(leg, TunnelLeg)), None)
        outcome = await _first([abort, *self._ends(link)])
        if tunnel is not None and not outcome.reusable:
            with suppress(OSError, LocalError):  # it is over already
                tunnel.channel.send_now(_wire(tunnel).reset(str(outcome.reason)))
        if isinstance(link.client, PlainLeg):
            link.client.sock.close()
        return outcome

    def _ends(self, link: Link) -> list[Callable[[], Awaitable[Outcome]]]:
        async def finish() -> Outcome:
            await trio.sleep(self.lasts())
            return Outcome(Reason.OK, EndedBy.CLIENT, reusable=True)

        async def die() -> Outcome:
            leg: Any = link.endpoint
            await self._network.hosts[leg.sock.host].dies.wait()
            return Outcome(Reason.PEER_RST, EndedBy.SERVER, "the endpoint's host died")

        async def finish_lease() -> Outcome:
            await finish()
            await _say_end(link.endpoint)
            return await trio.sleep_forever()

        async def hear_server() -> Outcome:
            return await _hear_end(link.endpoint, link.early_frames, EndedBy.SERVER)

        async def hear_client() -> Outcome:
            outcome = await _hear_end(link.client, link.early_frames, EndedBy.CLIENT)
            if outcome.reason is Reason.OK:
                await _say_end(link.client)
            return outcome

        if isinstance(link.endpoint, TunnelLeg):
            return [finish_lease, hear_server]
        return [hear_client if isinstance(link.client, TunnelLeg) else finish, die]


async def _first(waits: Sequence[Callable[[], Awaitable[Outcome]]]) -> Outcome:
    """What the first of them comes to; the others are cancelled."""
    outcomes: list[Outcome] = []

    async def wait(function: Callable[[], Awaitable[Outcome]]) -> None:
        outcomes.append(await function())
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for function in waits:
            nursery.start_soon(wait, function)
    return outcomes[0]


async def _say_end(leg: Any) -> None:
    with suppress(OSError):  # who hears finds that out
        await leg.channel.send_all(_wire(leg).fin())


async def _hear_end(leg: Any, early: list[Frame], far: EndedBy) -> Outcome:
    frames = list(early)
    early.clear()
    while True:
        for frame in frames:
            match frame:
                case Fin():
                    return Outcome(Reason.OK, EndedBy.CLIENT, reusable=True)
                case Reset():
                    return Outcome(*reset_by_peer(frame.reason, far))
                case _:
                    pass
        if not (data := await leg.channel.receive()):
            return Outcome(Reason.TUNNEL_LOST, EndedBy.PEER_PROXY, TUNNEL_CLOSED)
        frames = _wire(leg).receive(memoryview(data))


def _wire(leg: Any) -> Any:
    return leg.wire
