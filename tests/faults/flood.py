"""Garbage in great numbers at one sidecar, in rounds with an account after each.

Over real sockets, a connection for each piece: spoilt ClientHellos, HTTP, PROXY headers and mere bytes at the ports of
tunnels, of inbound and of outbound capture (one failed connection and one line of the log each) and at the health port;
requests at the admin socket; frames in tunnels of somebody who may have them. A ClientHello is OpenSSL's to read, and a
PROXY header nobody's, so those are of sockets alone. In process: frames to the protocol of tunnels and requests to the
decoder of the admin socket, as a sidecar reads them.
"""

import random
import socket
import ssl
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import msgspec

from meshnet.errors import TunnelError
from meshnet.model.admin import Status, decode_request
from meshnet.model.connection import Direction
from meshnet.tunnel.protocol import Role, Tunnel
from tests.bench.load import pss
from tests.faults.books import access_lines, held
from tests.faults.garbage import GOOD, REQUESTS, Frames, spoilt, throw_frames, throw_many
from tests.proxy.metrics import HEALTH_PORT
from tests.proxy.peer import TUNNEL_PORT
from tests.world import Host, Sidecar, wait_for

_EACH, _AT_HEALTH, _REQUESTS, _TUNNELS = (
    200,
    50,
    200,
    40,
)  # pieces of a round: for each kind and port, each kind, in all
_MOST_GROWTH = 64 << 10  # KiB of PSS since the first round; after some ten thousand pieces it grows no more


class Flood:
    """From `source` and from its own host at the sidecar; `context` is what `source` may open tunnels with."""

    def __init__(self, sidecar: Sidecar, source: Host, context: ssl.SSLContext, port: int, dice: random.Random) -> None:
        self.thrown: Counter[str] = Counter()
        self.recorded = 0
        self.grown = 0  # KiB
        self._sidecar = sidecar
        self._host = sidecar.host
        self._source = source
        self._context = context
        self._frames = Frames(sidecar.host.address, port)
        self._dice = dice
        self._round()  # what is made at the first time, and kept
        self._held, self._memory = held(self._pid), pss([self._pid])
        self.thrown.clear()
        self.recorded = 0

    def go_on(self, pieces: int) -> Iterator[int]:
        """So many pieces at least; yields how many there were, after each round. Raises when the account is wrong."""
        while self.thrown.total() < pieces:
            self._round()
            wait_for(lambda: held(self._pid) <= self._held, what=f"no more than {self._held}")
            self.grown = pss([self._pid]) - self._memory
            assert self.grown < _MOST_GROWTH, f"{self.grown} KiB more"
            yield self.thrown.total()

    def _round(self) -> None:
        self._at_ports()
        for kind, good in GOOD.items():
            self._throw(f"{kind} at the health port", self._source, (self._host.address, HEALTH_PORT), good, _AT_HEALTH)
        self._at_admin()
        before = self._settled().opened_total
        for _ in range(_TUNNELS):
            some = self._frames.some(self._dice)
            self.thrown["frames in tunnels"] += len(some)
            throw_frames(self._source, self._host, self._context, some)
        self._account(before)

    def _at_ports(self) -> None:
        proxy = self._sidecar.settings.proxy
        targets = {
            "the tunnel port": (self._source, (self._host.address, TUNNEL_PORT)),
            "the inbound port": (self._source, (self._host.address, proxy.inbound_port)),
            "the outbound port": (self._host, ("127.0.0.1", proxy.outbound_port)),
        }
        for what, (source, where) in targets.items():
            before = self._settled()
            for kind, good in GOOD.items():
                self._throw(f"{kind} at {what}", source, where, good, _EACH)
            after = self._account(before.opened_total)
            count = _EACH * len(GOOD)
            told = (after.opened_total - before.opened_total, after.failed_total - before.failed_total)
            assert told == (count, count), f"{count} at {what}: {told}"

    def _at_admin(self) -> None:
        self.thrown["requests at the admin socket"] += _REQUESTS
        path = self._sidecar.settings.admin.socket
        requests = (spoilt(REQUESTS[number % len(REQUESTS)], self._dice) for number in range(_REQUESTS))
        throw_many(self._host, socket.AF_UNIX, path, requests)

    def _throw(self, what: str, source: Host, where: tuple[str, int], good: bytes, count: int) -> None:
        self.thrown[what] += count
        throw_many(source, socket.AF_INET, where, (spoilt(good, self._dice) for _ in range(count)))

    def _account(self, opened_before: int) -> Status:
        """One line of the log for each connection since then, which no other needs any more."""
        opened = self._settled().opened_total - opened_before
        process = self._sidecar.process
        assert process is not None
        lines = wait_for(lambda: len(found := access_lines(process.output)) == opened and (found or [None]))
        told = [line.id for line in lines if line is not None and line.direction is Direction.OUTBOUND]
        assert len(told) == len(set(told))
        assert "Traceback" not in process.output
        process.log.write_bytes(b"")
        self.recorded += opened
        return self._sidecar.status()

    def _settled(self) -> Status:
        def settled() -> Status | None:
            status = self._sidecar.status()
            return None if status.open_connections else status

        status = wait_for(settled, what="all have ended")
        assert status is not None
        return status

    @property
    def _pid(self) -> int:
        assert self._sidecar.process is not None
        return self._sidecar.process.pid


def parse_frames(count: int, dice: random.Random) -> Iterator[int]:
    """At a server's end of a tunnel, which takes them or says TunnelError; yields how many there were now and then."""
    frames, done = Frames("10.77.0.3", 80), 0
    while done < count:
        some = frames.some(dice)
        tunnel = Tunnel(Role.SERVER)
        with suppress(TunnelError):
            for frame in some:
                tunnel.receive(frame)
        done += len(some)
        yield done


def parse_requests(count: int, dice: random.Random) -> Iterator[int]:
    """As the admin socket reads a line."""
    for number in range(count):
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            decode_request(spoilt(REQUESTS[number % len(REQUESTS)], dice))
        yield number + 1
