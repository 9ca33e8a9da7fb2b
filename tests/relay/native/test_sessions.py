"""TLS sessions between processes that serve the same ports: whoever has the secret resumes them, and nobody else."""

import pytest
import trio

from meshnet.net.tls import Channel, Ticket
from meshnet.relay.native import NativeRelay
from tests.relay.rig import new_context, tcp_pair
from tests.world import eventually


async def shake(relay: NativeRelay, client: object, server: NativeRelay, ticket: Ticket | None) -> Channel:
    """The client's end; its peer's is closed, once the ticket has come."""
    near, far = tcp_pair()
    accepted: list[Channel] = []

    async def accept() -> None:
        accepted.append(await server.tls.accept(far, new_context(server.tls, is_server=True), 10.0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        channel = await relay.tls.connect(near, client, ticket, 10.0)
    if not channel.resumed:
        await eventually(lambda: channel.ticket is not None, what="a ticket")
    accepted[0].close()
    return channel


@pytest.mark.parametrize(
    ("first", "second", "resumes"),
    [(b"secret", b"secret", True), (b"secret", b"another", False), (b"secret", b"", False), (b"", b"", False)],
)
async def test_a_session_is_resumed_by_who_has_the_same_secret(first: bytes, second: bytes, resumes: bool) -> None:
    async with NativeRelay() as relay, NativeRelay(first) as one, NativeRelay(second) as other:
        client = new_context(relay.tls, is_server=False)
        begun = await shake(relay, client, one, None)
        again = await shake(relay, client, other, begun.ticket)
        assert (begun.resumed, again.resumed) == (False, resumes)
        assert again.identity == begun.identity
        for channel in (begun, again):
            channel.close()
