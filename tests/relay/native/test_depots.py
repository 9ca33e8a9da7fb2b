"""Tunnels that orders lease by themselves: who has them when, under real kernel rules; frame by frame at the far end.

What a sidecar makes of it is in tests/proxy/test_asked_orders.py. These also run where memory and threads are watched.
"""

import contextlib
import errno
import socket
import struct
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import trio

from meshnet.codec.frames import Fin, GoAway, Open, Ping, Refused, Reset, encode
from meshnet.decide.demand import Demand
from meshnet.errors import EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Direction
from meshnet.net.deadline import Deadlines
from meshnet.net.python_tls import PythonTls
from meshnet.net.strand import Wait
from meshnet.net.tls import Channel, Returned
from meshnet.relay import Facts, Flow, OrderedLink, Outcome, Target, Through
from meshnet.relay.native import NativeRelay
from meshnet.relay.native.tls import NativeChannel, NativeDepot
from meshnet.relay.rows import Rows
from meshnet.tunnel.client import ClientTunnel
from meshnet.tunnel.peer import Peer as KnownPeer
from meshnet.tunnel.protocol import Role, Tunnel
from tests.relay.leaks import nothing_left
from tests.relay.native.heard import facts_of
from tests.relay.native.test_orders import DIALLED
from tests.relay.rig import Peer, TunnelPair, tunnel_pair
from tests.world import Host, eventually

pytestmark = pytest.mark.netns

FLOW = Flow(Direction.OUTBOUND, "127.0.0.1", Address(*DIALLED))
TARGET = Target(Address("127.0.0.1", 9), 0, False, 5.0)
IMPATIENT = Target(Address("127.0.0.1", 9), 0, False, 0.2)
OPENING = (b'{"host":"10.0.0.1","port":80,"source":"127.0.0.1:', b'","id":"', b'"}')


@dataclass
class Told:
    """What an order has told."""

    begun: list[OrderedLink] = field(default_factory=list)
    ended: list[tuple[Facts, Outcome]] = field(default_factory=list)

    def began(self, link: OrderedLink) -> "Watched":
        self.begun.append(link)
        return Watched(self, link)

    def came_and_went(self, facts: Facts, outcome: Outcome) -> None:
        self.ended.append((facts, outcome))

    def passed(self, rows: Rows) -> None:
        self.ended += [(facts, Outcome(Reason.OK, rows.ended_by)) for facts in facts_of(rows)]

    async def one(self) -> tuple[Facts, Outcome]:
        await eventually(lambda: len(self.ended) == 1, what="the end of the connection")
        return self.ended.pop()


@dataclass
class Watched:
    told: Told
    link: OrderedLink

    def connected(self) -> None:
        pass

    def ended(self) -> None:
        self.told.ended.append((self.link.facts(), self.link.outcome()))


@dataclass
class Stand:
    """A relay that accepts what is redirected, a depot, what came back from it by itself, connections for Python."""

    host: Host
    relay: NativeRelay
    told: Told = field(default_factory=Told)
    back: list[Returned] = field(default_factory=list)
    decided: list[socket.socket] = field(default_factory=list)
    pairs: list[TunnelPair] = field(default_factory=list)
    depot: NativeDepot = field(init=False)

    def __post_init__(self) -> None:
        self.depot = self.relay.tls.depot(self.back.append)

    async def tunnel(self) -> tuple[TunnelPair, Peer]:
        """One more, parked."""
        pair = await tunnel_pair(self.relay.tls, PythonTls())
        self.pairs.append(pair)
        self.depot.park(pair.client.channel)
        return pair, Peer(pair.server)

    def order(self, target: Target = TARGET) -> None:
        self.relay.order(FLOW, target, 1000, self.told, Through(self.depot, OPENING))

    def call(self, data: bytes = b"") -> socket.socket:
        client = self.host.connect(*DIALLED)
        client.sendall(data)
        client.setblocking(False)
        return client

    def close(self) -> None:
        for pair in self.pairs:
            pair.close()
        for sock in self.decided:
            sock.close()
        vars(self).clear()  # or the fixture would keep a core's last descriptor

    async def counts(self, parked: int, leased: int) -> None:
        await eventually(lambda: self.depot.counts()[:2] == (parked, leased), what=f"{parked} parked, {leased} leased")


@contextlib.asynccontextmanager
async def standing(host: Host) -> AsyncIterator[Stand]:
    """Connections that no order covers are kept."""
    with socket.create_server(("127.0.0.1", 15101), backlog=4096) as listener:
        listener.setblocking(False)
        async with NativeRelay(id_suffix="w2") as relay, trio.open_nursery() as nursery:
            stand = Stand(host, relay)

            async def accept() -> None:
                def decide(sock: socket.socket, peer: Address) -> None:
                    stand.decided.append(sock)

                await relay.accept_forever(listener, Direction.OUTBOUND, decide, shared=False)

            nursery.start_soon(accept)
            await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(60):
                yield stand
            nursery.cancel_scope.cancel()


@pytest.fixture
async def stand(host: Host) -> AsyncIterator[Stand]:
    with host.entered():
        async with nothing_left():
            async with standing(host) as stand:
                yield stand
            stand.close()


async def asked(peer: Peer) -> Open:
    frame = await peer.frame()
    assert isinstance(frame, Open), frame
    return frame


async def converse(client: socket.socket, peer: Peer) -> None:
    with trio.socket.from_stdlib_socket(client) as talking:
        await talking.send(b"question")
        assert await peer.read() == b"question"
        await peer.send_data(b"answer")
        assert await talking.recv(64) == b"answer"
        talking.shutdown(socket.SHUT_WR)
        assert await peer.read() == Fin()
        await peer.send(peer.wire.fin())
        assert await talking.recv(1) == b""


async def test_one_lease_after_another_and_each_tunnel_is_told_when_it_is_taken_back(stand: Stand) -> None:
    pair, peer = await stand.tunnel()
    stand.order()
    ids, before = set(), time.monotonic()
    for _ in range(3):
        await stand.counts(1, 0)
        client = stand.call()
        open_ = await asked(peer)
        assert open_.source == f"127.0.0.1:{client.getsockname()[1]}"
        ids.add(open_.id)
        await peer.send(peer.wire.opened())
        await converse(client, peer)
        facts, outcome = await stand.told.one()
        assert (facts.id, outcome.reason, outcome.ended_by) == (open_.id, Reason.OK, EndedBy.CLIENT)
        assert (facts.sent, facts.received, facts.client) == (8, 6, -1)
    assert len(ids) == 3
    assert all(each.endswith("w2") and len(each) == 10 for each in ids)
    await stand.counts(1, 0)
    back = stand.depot.take()
    assert back is not None
    assert (back.channel, back.leases) == (pair.client.channel, 3)
    assert before < back.idle_since <= time.monotonic()
    assert back.channel.last_ends() == ("FIN", "FIN")
    assert stand.depot.take() is None


async def test_a_suspended_order_leases_no_tunnel_and_the_lease_it_has_goes_on(stand: Stand) -> None:
    await stand.tunnel()
    _, peer = await stand.tunnel()  # who came last goes first
    stand.order()
    client = stand.call()
    await asked(peer)
    await peer.send(peer.wire.opened())
    stand.relay.suspend_orders()
    with stand.call():
        await eventually(lambda: stand.decided, what="the next connection is for Python")
    await stand.counts(1, 1)
    await converse(client, peer)
    assert not (await stand.told.one())[0].owes
    await stand.counts(2, 0)


async def test_one_that_lasts_tells_the_port_of_its_tunnel(stand: Stand) -> None:
    _, peer = await stand.tunnel()
    stand.order()
    client = stand.call()
    await asked(peer)
    await peer.send(peer.wire.opened())
    await eventually(lambda: stand.told.begun and stand.told.begun[0].leg_port, what="the port of its tunnel")
    (link,) = stand.told.begun
    assert link.leg_port == peer.sock.getpeername()[1]
    await converse(client, peer)
    await stand.told.one()
    await stand.counts(1, 0)
    assert link.leg_port == peer.sock.getpeername()[1]


async def test_where_no_tunnel_stands_python_decides(stand: Stand) -> None:
    stand.order()
    with stand.call():
        await eventually(lambda: len(stand.decided) == 1, what="a connection for Python")
    assert stand.depot.counts() == (0, 0, 0)


async def test_the_one_used_last_goes_first(stand: Stand) -> None:
    pairs = [await stand.tunnel() for _ in range(3)]
    taken = [stand.depot.take() for _ in range(3)]
    assert [back.channel for back in taken if back] == [pair.client.channel for pair, _ in reversed(pairs)]
    assert {back.leases for back in taken if back} == {0}


async def test_what_is_recalled_while_it_is_leased_comes_when_its_lease_is_over(stand: Stand) -> None:
    pair, peer = await stand.tunnel()
    stand.order()
    client = stand.call()
    await asked(peer)
    assert stand.depot.counts() == (0, 1, 1)
    assert stand.depot.recall() == []
    await peer.send(peer.wire.opened())
    await converse(client, peer)
    await eventually(lambda: len(stand.back) == 1, what="the tunnel comes back")
    assert (stand.back[0].channel, stand.back[0].leases) == (pair.client.channel, 1)
    assert stand.depot.counts() == (0, 0, 1)
    assert stand.depot.recall() == []
    assert stand.depot.counts() == (0, 0, 0)


async def test_who_has_said_something_is_not_asked_and_comes_back(stand: Stand) -> None:
    _, peer = await stand.tunnel()
    other, another = await stand.tunnel()
    heard = Wait()
    assert isinstance(other.client.channel, NativeChannel)
    other.client.channel._waiting = heard
    await another.send(encode(GoAway()))
    await eventually(lambda: heard.is_done, what="the core has heard it")
    stand.order()
    client = stand.call()
    await asked(peer)
    await eventually(lambda: len(stand.back) == 1, what="the other comes back")
    assert stand.back[0].channel is other.client.channel
    await peer.send(peer.wire.opened())
    await converse(client, peer)


@pytest.mark.parametrize("how", ["refused", "lost", "breach", "silent"])
async def test_a_client_whose_endpoint_is_not_reached_is_given_back_with_its_words(stand: Stand, how: str) -> None:
    pair, peer = await stand.tunnel()
    stand.order(target=IMPATIENT if how == "silent" else TARGET)
    with stand.call(b"early") as client:
        await asked(peer)
        assert await peer.read() == b"early"
        if how == "refused":
            await peer.send(peer.wire.refused(Refused(reason="connect.refused")))
        elif how == "lost":
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.sock.close()
        elif how == "breach":
            await peer.send(encode(Fin()))
        facts, outcome = await stand.told.one()
        assert (facts.early, facts.sent, facts.connected) == (b"early", 0, 0.0)
        with socket.socket(fileno=facts.client) as near:
            near.send(b"still here")
            await trio.lowlevel.wait_readable(client)
            assert client.recv(64) == b"still here"
    expected = {"refused": Reason.PEER_RST, "lost": Reason.TUNNEL_LOST, "breach": Reason.TUNNEL_PROTOCOL}
    if how == "refused":
        assert facts.reset == b'{"reason":"connect.refused"}'
        await stand.counts(1, 0)
    else:
        if how == "silent":
            assert facts.error == errno.ETIMEDOUT
        else:
            assert outcome.reason is expected[how]
        await eventually(lambda: [back.channel for back in stand.back] == [pair.client.channel], what="it comes back")


async def test_a_client_that_gives_up_before_the_answer(stand: Stand) -> None:
    _, peer = await stand.tunnel()
    stand.order()
    client = stand.call()
    await asked(peer)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    assert isinstance(await peer.frame(), Reset)
    await peer.send(peer.wire.opened() + peer.wire.fin())
    facts, outcome = await stand.told.one()
    assert (outcome.reason, outcome.ended_by, facts.connected) == (Reason.PEER_RST, EndedBy.CLIENT, 0.0)
    await stand.counts(1, 0)


async def test_one_that_is_aborted_before_the_answer(stand: Stand) -> None:
    _, peer = await stand.tunnel()
    stand.order()
    with stand.call():
        await asked(peer)
        await eventually(lambda: len(stand.told.begun) == 1, what="it is told")
        abort = stand.told.begun[0].abort
        assert abort is not None
        abort()
        assert isinstance(await peer.frame(), Reset)
        await peer.send(peer.wire.opened() + peer.wire.fin())
        _, outcome = await stand.told.one()
        assert outcome.reason is Reason.DRAIN
    await stand.counts(1, 0)


async def test_a_relay_that_is_closed_while_tunnels_stand_and_are_asked(host: Host) -> None:
    with host.entered():
        async with nothing_left():
            async with standing(host) as stand:
                await stand.tunnel()
                _, peer = await stand.tunnel()
                stand.order()
                client = stand.call(b"early")
                await asked(peer)
            await eventually(lambda: len(stand.told.ended) == 1, what="its end is told")
            facts, _ = stand.told.ended[0]
            if facts.client >= 0:
                socket.socket(fileno=facts.client).close()
            client.close()
            assert stand.depot.counts()[:2] == (1, 0)
            for back in (*stand.depot.recall(), *stand.back):
                back.channel.close()
            stand.close()
            del peer, back


async def test_who_has_said_half_a_frame_is_not_parked(stand: Stand) -> None:
    """The core would take the rest for a new one."""
    pair, _ = await stand.tunnel()
    back = stand.depot.take()
    assert back is not None
    wire = Tunnel(Role.CLIENT)
    kept = ClientTunnel((TARGET.address, ""), 0, back.channel, wire, 0.0, 0.0, 0.0, Deadlines())
    peer = KnownPeer(Demand(0.0), depot=stand.depot, orders=1)
    wire.receive(encode(Reset(reason="peer.rst"))[:6])
    peer.keep(kept)
    peer.park()
    assert (list(peer.idle), stand.depot.counts()[0]) == ([kept], 0)
    assert pair.client.channel is kept.channel


async def test_a_ping_is_not_said_within_a_lease(stand: Stand) -> None:
    """Recalled, pinged and parked as the pool does it, while connections come: orders overtake some of the pings."""
    pairs = [await stand.tunnel() for _ in range(8)]
    wires: dict[Channel, Tunnel] = {pair.client.channel: Tunnel(Role.CLIENT) for pair, _ in pairs}
    stand.order()
    leases = pings = 0

    async def serve(peer: Peer) -> None:
        nonlocal leases, pings
        while True:
            match await peer.frame():  # raises TunnelError for a PING in a lease
                case Open():
                    leases += 1
                    await peer.send(peer.wire.opened() + peer.wire.fin())
                case Ping():
                    pings += 1
                    await peer.send(peer.wire.pong())

    async def call() -> None:
        while True:
            with trio.socket.from_stdlib_socket(stand.call()) as client:
                client.shutdown(socket.SHUT_WR)
                with trio.move_on_after(1):
                    await client.recv(1)

    async with trio.open_nursery() as nursery:
        for _, peer in pairs:
            nursery.start_soon(serve, peer)
        for _ in range(6):
            nursery.start_soon(call)
        while leases < 1000:
            for back in (*stand.depot.recall(), *stand.back):
                while (data := back.channel.receive_now()) is not None:
                    assert data, "the peer has hung up"
                wires[back.channel] = Tunnel(Role.CLIENT)
                back.channel.send_now(wires[back.channel].ping())
                stand.depot.park(back.channel)
            stand.back.clear()
            for sock in stand.decided:
                sock.close()
            stand.decided.clear()
            await trio.sleep(0)
        nursery.cancel_scope.cancel()
    assert pings
    for facts, _ in stand.told.ended:
        if facts.client >= 0:
            socket.socket(fileno=facts.client).close()
