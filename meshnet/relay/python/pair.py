"""One link in a loop: it begins, ends by two FINs or by the first failure, and is reported once."""

import dataclasses
import logging
from typing import TYPE_CHECKING

import trio

from meshnet.errors import EndedBy, Reason
from meshnet.net.tcp_state import Peer, peer_of
from meshnet.relay import Link, Outcome, PlainLeg, Tally, TunnelLeg
from meshnet.relay.python.plain import PlainSide
from meshnet.relay.python.side import Side
from meshnet.relay.python.tunnel import TunnelSide

if TYPE_CHECKING:  # it holds pairs
    from meshnet.relay.python.loop import RelayLoop

log = logging.getLogger("meshnet.relay")


class Pair:
    """Made in the trio thread; touched only by the thread of its loop from `begin` on until it is reported as ended."""

    def __init__(self, loop: "RelayLoop", link: Link, tally: Tally, task: trio.lowlevel.Task) -> None:
        self.loop = loop
        self.link = link
        self.tally = tally
        self.task = task
        self.raise_cancel: trio.lowlevel.RaiseCancelT | None = None
        self.cancelled = False
        self.over = False
        self._looked_at = 0.0  # what the tally's `moved_at` was when nothing waited at either leg
        self.events = 0  # while it is young
        self._failure: Outcome | None = None
        self._first_fin = EndedBy.PROXY
        self._lingers = False
        self._client = self._side(link.client, EndedBy.CLIENT)
        self._endpoint = self._side(link.endpoint, EndedBy.SERVER)
        self._client.peer, self._endpoint.peer = self._endpoint, self._client
        loop.pairs.add(self)

    def begin(self) -> None:
        if self.link.to_client:
            self._client.write(memoryview(self.link.to_client))
        if self.link.to_endpoint:
            self._endpoint.write(memoryview(self.link.to_endpoint))
        for side in (self._client, self._endpoint):
            if isinstance(side, TunnelSide):
                side.accept(self.link.early_frames)
        self.link.to_client = self.link.to_endpoint = b""
        self.link.early_frames.clear()
        self._watch()

    def leave(self, loop: "RelayLoop") -> None:
        """Into another loop, where `arrive` goes on; the last this one does with it."""
        self.loop.pairs.discard(self)
        self._client.move(loop)
        self._endpoint.move(loop)
        self.loop = loop
        loop.pairs.add(self)

    def arrive(self) -> None:
        self._watch()
        if self._lingers and not self.over:
            self.loop.linger(self)

    def cancel(self) -> None:
        if not self.over and self._failure is None:
            self.cancelled = True
            self.fail(self.link.abort_reason, self.link.abort_by)

    def result(self) -> Outcome:
        """Of a pair that is over."""
        assert self.link.outcome is not None
        return self.link.outcome

    def on_fin(self, side: Side) -> None:
        """`side` will send no more."""
        if self._failure is not None:
            self.settle()
            return
        if not self.tally.client_done and not self.tally.endpoint_done:
            self._first_fin = side.who
        if side is self._client:
            self.tally.client_done = True
        else:
            self.tally.endpoint_done = True
        self.tally.moved_at = self.loop.now
        side.peer.finish()

    def look(self) -> None:
        """Fails it if a peer is gone."""
        moved_at, silence = self.tally.moved_at, self.loop.silence
        if self._failure is not None or moved_at == self._looked_at or self.loop.now - moved_at < silence:
            return
        waits = False
        for side in (self._client, self._endpoint):
            peer = Peer.UP_TO_DATE if side.over else peer_of(side.sock, silence)
            if peer is Peer.GONE:
                side.gone()
                return
            waits |= peer is Peer.WAITED_FOR
        if not waits:
            self._looked_at = moved_at

    def fail(self, reason: Reason, ended_by: EndedBy, detail: str = "") -> None:
        """The first failure is the reason; what it brings about is not."""
        if self._failure is None:
            self._failure = Outcome(reason, ended_by, detail)
            self._client.abort(reason)
            self._endpoint.abort(reason)
        self.settle()

    def settle(self) -> None:
        """Ends the pair if nothing is left to do; a side calls it when that may be so."""
        if self.over:
            return
        if self._failure is None:
            if self._client.out_done and self._endpoint.out_done:
                self._end(Outcome(Reason.OK, self._first_fin))
        elif self._client.over and self._endpoint.over:
            self._end(self._failure)
        elif not self._lingers:
            self._lingers = True
            self.loop.linger(self)

    def cut(self) -> None:
        """Ends without waiting for anybody."""
        if not self.over:
            self.fail(self.link.abort_reason, self.link.abort_by)
            self._client.cut()
            self._endpoint.cut()
            self.settle()

    def crash(self) -> None:
        """A bug of ours: must not raise, whatever state the sides are in."""
        for step in (self._client.cut, self._endpoint.cut, self._client.close, self._endpoint.close):
            try:
                step()
            except Exception:
                log.exception("relay: a leg of a failed link could not be closed")
        if not self.over:
            self._end(Outcome(Reason.INTERNAL, EndedBy.PROXY, "a bug in the relay, see the log"))

    def _end(self, outcome: Outcome) -> None:
        self.over = True
        for side in (self._client, self._endpoint):
            if isinstance(side, TunnelSide):
                outcome = dataclasses.replace(outcome, reusable=side.reusable, late=side.late)
        self.link.outcome = outcome
        # Reported first: should a close fail, its caller must not wait for ever. It is told when this round is over.
        self.loop.pairs.discard(self)
        self.loop.ended.append(self)
        self._client.close()
        self._endpoint.close()

    def _watch(self) -> None:
        for side in (self._client, self._endpoint):
            if not self.over and not side.over:
                side.watch()
                if isinstance(side, TunnelSide) and side.pending:
                    self.loop.unread.append(side)

    def _side(self, leg: PlainLeg | TunnelLeg, who: EndedBy) -> Side:
        if isinstance(leg, PlainLeg):
            return PlainSide(self.loop, self, leg.sock, who)
        return TunnelSide(self.loop, self, leg, who)
