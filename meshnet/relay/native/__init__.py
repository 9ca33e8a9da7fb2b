"""The fast relay: threads in C, which move bytes without Python's lock and decide nothing (core.h).

It is optional: `MISSING` says why it is not here, and then the Python relay serves.
"""

import logging
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

import outcome
import trio

from meshnet.codec.frames import Data, Fin, Frame, Kind, Reset
from meshnet.errors import Reason, TunnelError
from meshnet.model.address import Address
from meshnet.model.connection import Direction
from meshnet.net.strand import Wait, on_strand
from meshnet.relay import (
    SILENCE,
    Flow,
    Issuer,
    Link,
    Order,
    Outcome,
    PlainLeg,
    Tally,
    Target,
    Through,
    TunnelLeg,
)
from meshnet.relay.native.doors import Door, NativeOrder, direction_of
from meshnet.relay.native.missing import Missing, missing
from meshnet.relay.native.reasons import ABORTED, END_NAMES, REASONS, RESET, link_outcome, reset_payload
from meshnet.relay.native.tls import NativeChannel, NativeDepot, NativeTls

if TYPE_CHECKING:
    from meshnet.relay.native import _core
    from meshnet.relay.native._core import Core, Depot, Tunnel

MISSING: Missing | None = None
try:
    from meshnet.relay.native import _core
except ImportError as error:
    MISSING = missing(error)


_log = logging.getLogger("meshnet.relay")


class _Waiter(Wait):
    """Who waits for the end of one link: a strand, or a task that can be cancelled."""

    __slots__ = ("handle", "link", "raise_cancel", "task")
    handle: "_core.Link"

    def __init__(self, link: Link) -> None:
        super().__init__()
        self.link = link
        self.task: trio.lowlevel.Task | None = None
        self.raise_cancel: trio.lowlevel.RaiseCancelT | None = None

    def abort(self) -> None:
        self.handle.abort(reset_payload(self.link.abort_reason))

    def cancel(self, raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
        self.raise_cancel = raise_cancel
        self.abort()
        return trio.lowlevel.Abort.FAILED

    def wake(self) -> None:
        if self.task is None:
            self.done()
        elif self.raise_cancel is not None:
            trio.lowlevel.reschedule(self.task, outcome.capture(self.raise_cancel))
        else:
            trio.lowlevel.reschedule(self.task)


class NativeRelay:
    """Use as an async context manager. Raises RuntimeError where the core is MISSING, OSError if it cannot start."""

    name = "native"
    takes_orders = True

    def __init__(self, ticket_secret: bytes = b"", *, silence: float = SILENCE, id_suffix: str = "") -> None:
        """`ticket_secret`: of all processes that serve the same ports, so that they resume each other's sessions.

        `silence`: see meshnet.relay. `id_suffix`: of the ids that it makes, in which they differ from those of others.
        """
        self._ticket_secret = ticket_secret
        self._silence = silence
        self._id_suffix = id_suffix
        self._cores: list[Core] = []
        self._tls: NativeTls | None = None
        self._orders: set[NativeOrder] = set()  # in force
        self._untold: deque[object] = deque()  # news that the core has given away

    @property
    def tls(self) -> NativeTls:
        """Raises RuntimeError when the relay has not been started."""
        if self._tls is None:
            raise RuntimeError("the relay is not started")
        return self._tls

    async def __aenter__(self) -> Self:
        if MISSING:
            raise RuntimeError(MISSING.why)
        resets = tuple(reset_payload(reason) for reason in REASONS)
        relay, dialled, accepted = self._cores = [
            _core.Core(resets, "relay", self._silence, self._id_suffix),
            _core.Core(resets, "handshakes"),
            _core.Core(resets, "handshakes-in"),
        ]
        self._tls = NativeTls(dialled, accepted, relay, self._ticket_secret)
        for core in self._cores:
            trio.lowlevel.spawn_system_task(self._listen, core)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        cores, self._cores, self._tls = self._cores, [], None
        for order in list(self._orders):
            order.revoke()
        for core in cores:
            core.stop()
            trio.lowlevel.notify_closing(core.fileno())
            self._tell(core)

    async def _listen(self, core: "Core") -> None:
        try:
            while self._cores:  # or it would wait once more, had it just been woken when the relay stopped
                await trio.lowlevel.wait_readable(core.fileno())
                self._tell(core)
        except trio.ClosedResourceError:
            pass  # the relay has stopped

    def _tell(self, core: "Core", *, everything: bool = False) -> None:
        """Who is told may ask to `catch_up`: what was fetched before is told first, or a link's end would be known
        before its beginning."""
        _wake(self._untold)
        self._untold.extend(core.news(everything))
        _wake(self._untold)

    def fits(self, link: Link) -> bool:
        tunnels = [leg for leg in (link.client, link.endpoint) if isinstance(leg, TunnelLeg)]
        return len(tunnels) < 2 and all(isinstance(leg.channel, NativeChannel) for leg in tunnels)

    async def run(self, link: Link, tally: Tally) -> Outcome:
        """See meshnet.relay.Relay. Raises RuntimeError when the relay has not been started."""
        if not self._cores:
            raise RuntimeError("the relay is not started")
        waiter = _Waiter(link)
        early = _Early(link)
        handle = waiter.handle = self._cores[0].start(
            _leg(link.client),
            _leg(link.endpoint),
            early.to_client,
            early.to_endpoint,
            tally.sent,
            early.received_end,
            early.unread,
            waiter,
        )
        for leg in (link.client, link.endpoint):
            if isinstance(leg, PlainLeg):
                leg.sock.detach()
        early.forget(link)
        tally.live = handle.counts
        link.abort = waiter.abort
        if early.reset:
            handle.abort(early.reset)
        if on_strand():
            await waiter
            return _end(link, tally, handle, early)
        waiter.task = trio.lowlevel.current_task()
        try:
            await trio.lowlevel.wait_task_rescheduled(waiter.cancel)
        finally:
            _end(link, tally, handle, early)
        assert link.outcome is not None
        return link.outcome

    async def accept_forever(
        self,
        listener: socket.socket,
        direction: Direction,
        carry: Callable[[socket.socket, Address], object],
        *,
        shared: bool,
    ) -> None:
        """See meshnet.relay.Relay. Raises RuntimeError when the relay has not been started."""
        if not self._cores:
            raise RuntimeError("the relay is not started")
        await Door(direction, shared, carry).accept_forever(self._cores[0], listener)

    def order(self, flow: Flow, target: Target, places: int, issuer: Issuer, through: Through | None = None) -> Order:
        """See meshnet.relay.Relay. Raises RuntimeError when the relay has not been started."""
        if not self._cores:
            raise RuntimeError("the relay is not started")
        order = NativeOrder(issuer, self._orders, serves=bool(flow.identity))
        order.handle = self._cores[0].order(
            direction_of(flow),
            self.tls.number_of(flow.identity) if flow.identity else 0,
            flow.source,
            (flow.original.host, flow.original.port),
            (target.address.host, target.address.port),
            target.mark,
            target.local,
            target.patience,
            places,
            through and _pieces(through),
            order,
        )
        self._orders.add(order)
        return order

    def suspend_orders(self) -> None:
        if self._cores:
            self._cores[0].suspend_orders()

    def catch_up(self) -> None:
        if self._cores:
            self._tell(self._cores[0], everything=True)


class _Early:
    """What a link begins with: bytes for both legs, and how far the tunnel's peer is with its half of the lease."""

    __slots__ = ("leg", "received_end", "reset", "to_client", "to_endpoint", "unread")

    def __init__(self, link: Link) -> None:
        to_application = b"".join(bytes(frame.payload) for frame in link.early_frames if isinstance(frame, Data))
        client_is_tunnel = isinstance(link.client, TunnelLeg)
        self.to_client = link.to_client + (b"" if client_is_tunnel else to_application)
        self.to_endpoint = link.to_endpoint + (to_application if client_is_tunnel else b"")
        self.leg = next((leg for leg in (link.client, link.endpoint) if isinstance(leg, TunnelLeg)), None)
        self.unread = self.leg.wire.hand_over() if self.leg else b""
        self.received_end = 0
        self.reset = b""
        for frame in link.early_frames:
            if isinstance(frame, Fin):
                self.received_end = Kind.FIN
            elif isinstance(frame, Reset):
                self.received_end = Kind.RESET
                self.reset = reset_payload(frame.reason)

    def forget(self, link: Link) -> None:
        """The core has its own copies, for as long as it needs them."""
        self.to_client = self.to_endpoint = self.unread = link.to_client = link.to_endpoint = b""
        link.early_frames.clear()


def lines(rows: bytes, pieces: tuple[bytes, ...]) -> bytes:
    """What is between the pieces is told by each row: see _core.lines. Where the core is MISSING, there are no rows."""
    return _core.lines(rows, pieces)


def _pieces(through: Through) -> "tuple[Depot, tuple[bytes, bytes, bytes]]":
    assert isinstance(through.depot, NativeDepot)
    return through.depot.handle, through.opening


def _leg(leg: PlainLeg | TunnelLeg) -> "int | Tunnel":
    if isinstance(leg, PlainLeg):
        return leg.sock.fileno()
    assert isinstance(leg.channel, NativeChannel)
    return leg.channel.tunnel


def _end(link: Link, tally: Tally, handle: "_core.Link", early: _Early) -> Outcome:
    tally.refresh()
    tally.live = link.abort = None
    link.outcome = _outcome(link, handle, early)
    return link.outcome


def _outcome(link: Link, handle: "_core.Link", early: _Early) -> Outcome:
    reason, ended_by, error, reusable, unread, sent, received, reset = handle.result()
    late: Sequence[Frame] = ()
    leg = early.leg
    if leg is not None:
        assert isinstance(leg.channel, NativeChannel)
        leg.wire.take_back(END_NAMES.get(sent, ""), END_NAMES.get(received, ""))
        if reusable and unread:
            leg.channel.tunnel.go_on()
        if reusable and (data := leg.channel.tunnel.take()):
            try:
                late = leg.wire.receive(memoryview(data))
            except TunnelError:
                reusable = False
    if reason == ABORTED and not early.reset:
        return Outcome(link.abort_reason, link.abort_by, reusable=reusable, late=late)
    reason = RESET if reason == ABORTED else reason  # by the RESET that it began with
    told = link_outcome(reason, ended_by, error, early.reset or reset, leg is not None and leg is link.client)
    if told.reason is Reason.TUNNEL_PROTOCOL:
        return told
    return Outcome(told.reason, told.ended_by, told.detail, reusable=reusable, late=late)


def _wake(news: deque[object]) -> None:
    while news:
        said = news.popleft()
        try:
            if type(said) is tuple:
                who, what, about = said
                who.hear(what, about)
            else:
                said.wake()  # type: ignore[attr-defined] # a _Waiter, a NativeChannel or one of doors.py
        except Exception:  # of one connection; the others are still to be told
            _log.exception("what the relay tells could not be taken in")
