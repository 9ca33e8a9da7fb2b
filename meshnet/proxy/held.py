"""Truthful connect: an application's SYN waits in the kernel's queue until its endpoint is reached.

The rules queue it just ahead of the redirect (MESHNET_HOLD). All that an outbound connection goes through happens while
it waits; then it is let go on, to our listener, and the connection that is accepted there from the same address joins
the leg that stands. Or it goes on with a mark for which the rules refuse it, and connect() fails as ours has.
"""

import logging
import socket
import time
from collections.abc import Callable

import trio

from meshnet.codec.nfqueue import Packet, Syn, syn_in
from meshnet.decide.truth import refused
from meshnet.errors import ConnectionFailed, EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.admin import TruthfulStatus
from meshnet.model.canary import is_canary, is_proof
from meshnet.model.settings import Settings
from meshnet.net.original import original_destination
from meshnet.net.strand import in_task
from meshnet.net.syn_queue import SynQueue
from meshnet.relay import PlainLeg

_log = logging.getLogger("meshnet.proxy")

# Seconds for a connection whose SYN was let go on. Where the listener's backlog is full the kernel drops it, and the
# client sends it again after one second and after three.
_COMES_WITHIN = 5.0
_KEPT = 5.0  # seconds that an answer is kept, for who has not heard it and sends the same SYN again

Ends = tuple[Address, Address]
"""Source and destination."""
Flow = tuple[str, Address]
"""Source host and destination."""


class HeldClient:
    """See meshnet.proxy.client.Client. One whose SYN waits; `packets` are the numbers it waits under."""

    def __init__(self, held: "HeldSyns", syn: Syn, packet: Packet) -> None:
        self.syn = syn
        self.packets = [packet]
        self._held = held
        self._came = trio.Event()
        self.sock: socket.socket | None = None
        """Of the connection, once it has come."""
        self.let_go = False

    def gave_up(self) -> bool:
        return False  # the kernel does not say so of who waits

    def early_data(self) -> bytes:
        return b""

    async def leg(self) -> PlainLeg:
        await in_task()
        self._held.accept(self)
        with trio.move_on_after(_COMES_WITHIN):
            await self._came.wait()
        if self.sock is None:
            gone = "the client gave up before its endpoint was reached"
            raise ConnectionFailed(Reason.PEER_RST, gone, ended_by=EndedBy.CLIENT)
        return PlainLeg(self.sock)

    def come(self, sock: socket.socket) -> None:
        self.sock = sock
        self._came.set()


class HeldSyns:
    """All that wait, and how many have. Until `run`, and where that finds no queue, it holds nobody."""

    def __init__(self, settings: Settings) -> None:
        self._number = settings.proxy.outbound_port
        self._reset, self._unreachable = settings.refusal_marks()
        self._queue: SynQueue | None = None
        self._waiting: dict[Flow, dict[int, HeldClient]] = {}  # by the port of the source; the oldest first
        self._told: dict[Ends, tuple[int, int, float]] = {}  # sequence, mark, and until when; the oldest first
        self._held = 0
        self._unheld = 0
        self._problem = ""

    @property
    def in_force(self) -> bool:
        return self._queue is not None

    @property
    def wants_all(self) -> bool:
        """Whether each outbound connection is, or is about to be, one that is held: no order may take it first."""
        return not self._problem

    def status(self) -> TruthfulStatus:
        return TruthfulStatus(
            in_force=self.in_force,
            waiting=sum(map(len, self._waiting.values())),
            held=self._held,
            unheld=self._unheld,
            problem=self._problem,
        )

    async def run(self, begin: Callable[[HeldClient], None]) -> None:
        """Calls `begin` with each new client until it is cancelled; returns at once where there is no right to."""
        try:
            queue = SynQueue(self._number)
        except OSError as error:
            self._problem = f"queue {self._number}: {error.strerror}; it needs the capability NET_ADMIN"
            _log.warning("capture.truthful_connect is not in force: %s", self._problem)
            return
        with queue:
            self._queue = queue
            try:
                while True:
                    await trio.lowlevel.wait_readable(queue)
                    for packet in queue.take():
                        self._take(packet, begin, queue)
            finally:
                self._queue = None

    def arrived(self, sock: socket.socket, source: Address) -> bool:
        """Whether an accepted connection is one that was held: then it is its client's."""
        if self._queue is None and not self._waiting:
            return False
        try:
            destination = original_destination(sock)
        except ConnectionFailed:
            return False
        client = self._whose(source, destination)
        if client is not None:
            self._forget(client)
            client.come(sock)
            return True
        self._unheld += not (is_canary(destination) or is_proof(destination))
        return False

    def accept(self, client: HeldClient) -> None:
        """Its connection may come."""
        client.let_go = True
        self._let_go(client, 0)

    def finish(self, client: HeldClient, reason: Reason | None) -> None:
        """It is over. One that waits still is refused, for that reason."""
        syn = client.syn
        ends = syn.source, syn.destination
        self._forget(client)
        if client.let_go:
            return
        client.let_go = True
        mark = self._reset if refused(reason) else self._unreachable
        self._told.pop(ends, None)
        self._told[ends] = syn.sequence, mark, time.monotonic() + _KEPT
        self._let_go(client, mark)

    def _take(self, packet: Packet, begin: Callable[[HeldClient], None], queue: SynQueue) -> None:
        syn = syn_in(packet.payload)
        if syn is None or is_canary(syn.destination) or is_proof(syn.destination):
            queue.let_go(packet.number)
            return
        ends = syn.source, syn.destination
        alike = self._waiting.get((syn.source.host, syn.destination), {})
        client = alike.get(syn.source.port)
        if client is not None and client.syn.sequence == syn.sequence:
            client.packets.append(packet)  # rules that are written anew drop what waits
            if client.let_go:
                queue.let_go(packet.number)
            return
        mark = self._answer(ends, syn.sequence)
        if mark:
            queue.let_go(packet.number, packet.mark | mark)
            return
        self._held += 1
        client = HeldClient(self, syn, packet)
        self._waiting.setdefault((syn.source.host, syn.destination), {})[syn.source.port] = client
        begin(client)

    def _whose(self, source: Address, destination: Address) -> HeldClient | None:
        """The client whose connection it is. One that may come and has the same way will do.

        Where another connection from the client's port was redirected before and is not forgotten, the kernel gives
        this one another port to tell the two apart. Legs of one flow are alike.
        """
        alike = self._waiting.get((source.host, destination), {})
        return alike.get(source.port) or next((client for client in alike.values() if client.let_go), None)

    def _forget(self, client: HeldClient) -> None:
        syn = client.syn
        flow = syn.source.host, syn.destination
        alike = self._waiting.get(flow, {})
        if alike.get(syn.source.port) is client:
            del alike[syn.source.port]
            if not alike:
                del self._waiting[flow]

    def _answer(self, ends: Ends, sequence: int) -> int:
        """The mark for who has been refused already, and has not heard it; 0 for all others."""
        now = time.monotonic()
        while self._told and next(iter(self._told.values()))[2] < now:
            del self._told[next(iter(self._told))]
        told = self._told.get(ends)
        return told[1] if told is not None and told[0] == sequence else 0

    def _let_go(self, client: HeldClient, mark: int) -> None:
        if self._queue is not None:
            for packet in client.packets:
                self._queue.let_go(packet.number, packet.mark | mark if mark else None)
