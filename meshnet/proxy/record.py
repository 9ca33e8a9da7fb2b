"""What is known of one connection. It follows the connection, and ends exactly once however that ends."""

import functools
import itertools
import logging
import random
import socket
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from meshnet.decide.access import Call
from meshnet.errors import ConnectionFailed, EndedBy, Phase, Reason
from meshnet.model.address import Address
from meshnet.model.admin import ConnectionKey
from meshnet.model.connection import Attempt, Connection, Direction, Peer, ReasonView, Security, State, TlsView, Weighed
from meshnet.net import sockets
from meshnet.relay import Link, OrderedLink, Outcome, Tally

if TYPE_CHECKING:
    from meshnet.proxy.registry import Registry

_log = logging.getLogger("meshnet.proxy")

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no letter looks like a digit
_PAIRS = [high + low for high in _ALPHABET for low in _ALPHABET]
_MILLISECONDS = [f".{number:03d}Z" for number in range(1000)]
_sequence = itertools.count(random.randrange(512))

_STATES = dict.fromkeys(
    (Reason.AUTHZ_DENIED, Reason.AUTHZ_REVOKED, Reason.AUTHN_PLAINTEXT, Reason.AUTHN_DISABLED), State.DENIED
)
_REFUSALS = (Phase.ACCEPT, Phase.QUEUE)


def new_id(wall: float) -> str:
    """Eight letters that sort by time: 31 bits of milliseconds (24 days), 9 of a counter.

    The upper half of that counter is for a relay that dials by itself, as relay/native/dial.c does.
    """
    number = (int(wall * 1000) & 0x7FFFFFFF) << 9 | next(_sequence) & 0xFF
    return _PAIRS[number >> 30] + _PAIRS[number >> 20 & 1023] + _PAIRS[number >> 10 & 1023] + _PAIRS[number & 1023]


def number_in_letters(number: int) -> str:
    """In the same alphabet, as few letters as it takes."""
    digits = ""
    while number or not digits:
        number, digit = divmod(number, len(_ALPHABET))
        digits = _ALPHABET[digit] + digits
    return digits


class Record:
    """Mutable while the connection lives. Times are monotonic seconds; `opened_at` is seconds since the epoch."""

    __slots__ = (
        "_final",
        "_is_over",
        "_registry",
        "abort_by",
        "abort_detail",
        "abort_reason",
        "attempts",
        "by_order",
        "call",
        "cipher",
        "client",
        "connected",
        "destination_identity",
        "detail",
        "direction",
        "ended",
        "ended_by",
        "endpoint",
        "flushed_received",
        "flushed_sent",
        "handshake_ms",
        "held",
        "hidden",
        "id",
        "leg_port",
        "link",
        "opened",
        "opened_at",
        "original",
        "passed_over",
        "phase",
        "policy",
        "queued",
        "reason",
        "relay",
        "resumed",
        "retry_denied",
        "security",
        "service",
        "source",
        "source_identity",
        "tally",
        "tls_version",
        "weighed",
    )

    def __init__(
        self,
        registry: "Registry",
        direction: Direction,
        source: Address,
        client: socket.socket | None,
        connection_id: str = "",
        *,
        opened: float | None = None,
    ) -> None:
        """`opened`: when it was, of one that an order began."""
        self._registry = registry
        self._is_over = False  # and nothing of it changes any more
        self._final: Connection | None = None  # the view, then
        self.opened_at = time.time()
        self.opened = time.monotonic()
        self.by_order = opened is not None
        if opened is not None:
            self.opened_at += opened - self.opened
            self.opened = opened
        self.id = connection_id or new_id(self.opened_at) + registry.id_suffix
        self.direction = direction
        self.source = source
        self.client = client
        self.source_identity = ""
        self.destination_identity = ""
        self.service = ""
        self.original: Address | None = None
        self.endpoint = ""
        self.security = Security.NONE
        self.tls_version = ""
        self.cipher = ""
        self.handshake_ms: float | None = None
        self.resumed = False
        self.policy = ""
        self.relay = ""
        self.attempts: list[Attempt] = []
        self.weighed: tuple[Weighed, ...] = ()  # endpoints, for the attempt that is being made
        self.passed_over: tuple[str, ...] = ()  # endpoints, with why, when there was none left to try
        self.tally = Tally()
        self.flushed_sent = 0
        self.flushed_received = 0
        self.queued: float | None = None
        self.connected: float | None = None
        self.ended: float | None = None
        self.phase = Phase.ACCEPT
        self.retry_denied = False  # another attempt was to be made, and the budget was used up
        self.held = False  # its client's connect() waited for the endpoint
        self.hidden = False  # nobody's traffic: it leaves no trace when it has ended
        self.reason: Reason | None = None
        self.ended_by: EndedBy | None = None
        self.detail = ""
        self.call: Call | None = None
        self.link: Link | OrderedLink | None = None
        self.leg_port = 0  # of one that has ended; the link's before
        self.abort_reason: Reason | None = None
        self.abort_by = EndedBy.PROXY
        self.abort_detail = ""

    def __enter__(self) -> "Record":
        self._registry.began(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Ends the record; a failed connection's client leg is reset. Only trio's own exceptions go on."""
        if isinstance(error, ConnectionFailed):
            self.fail(error)
        elif isinstance(error, MemoryError):
            self.end(Reason.LIMIT_HOST, EndedBy.LIMIT, "no memory is left")
        elif isinstance(error, Exception):
            _log.error("connection %s failed inside the proxy", self.id, exc_info=error)
            self.end(Reason.INTERNAL, EndedBy.PROXY, f"{type(error).__name__}: {error}")
        elif self.reason is None:
            self.end(self.abort_reason or Reason.DRAIN, self.abort_by, self.abort_detail)
        if self.client is not None:
            sockets.reset(self.client)  # a relay that ran to an end has closed it already; then this does nothing
        self._registry.ended(self)
        return isinstance(error, Exception)

    def abort(self, reason: Reason, ended_by: EndedBy, detail: str = "", policy: str = "") -> None:
        """Ends the connection from outside: at once while bytes move, else before its next phase."""
        if self.reason is not None or self.abort_reason is not None:
            return
        self.abort_reason, self.abort_by, self.abort_detail = reason, ended_by, detail
        if policy:
            self.policy = policy
        if self.link is not None:
            self.link.abort_reason, self.link.abort_by = reason, ended_by
            if self.link.abort is not None:
                self.link.abort()

    def forget_tunnel(self) -> None:
        """The next try may be in plain text, or reach nobody: nothing of the last one's tunnel is true of it."""
        self.security = Security.NONE
        self.destination_identity = self.tls_version = self.cipher = ""
        self.handshake_ms, self.resumed = None, False

    def go_on(self) -> None:
        """Raises ConnectionFailed if somebody has aborted the connection meanwhile."""
        if self.abort_reason is not None:
            raise ConnectionFailed(self.abort_reason, self.abort_detail, ended_by=self.abort_by, policy=self.policy)

    def fail(self, failure: ConnectionFailed) -> None:
        if failure.policy:
            self.policy = failure.policy
        self.end(failure.reason, failure.ended_by, failure.detail)

    def finish(self, outcome: Outcome) -> None:
        self.end(outcome.reason, outcome.ended_by, outcome.detail or self.abort_detail)

    def end(self, reason: Reason, ended_by: EndedBy, detail: str) -> None:
        """The first end counts; what follows from it does not."""
        if self.reason is None:
            self.reason, self.ended_by, self.detail = reason, ended_by, detail
            self.ended = time.monotonic()
            if (
                self.phase is Phase.DATA
                and (self.tally.client_done or self.tally.endpoint_done)
                and reason is not Reason.OK
            ):
                self.phase = Phase.HALF_CLOSED

    def let_go(self) -> None:
        """Of what only a living connection needs."""
        if self.link is not None:
            self.leg_port = self.link.leg_port
        self.client = self.link = None
        self._is_over = True

    @property
    def retries(self) -> int:
        return max(0, len(self.attempts) - 1)

    @property
    def failed(self) -> bool:
        return self.reason is not None and self.reason is not Reason.OK

    @property
    def state(self) -> State:
        if self.reason is None:
            return self._open_state()
        if self.reason is Reason.OK:
            return State.CLOSED
        return _STATES.get(self.reason) or (State.REFUSED if self.phase in _REFUSALS else State.FAILED)

    def _open_state(self) -> State:
        if self.phase is Phase.QUEUE:
            return State.QUEUED
        if self.phase is not Phase.DATA:
            return State.CONNECTING
        if self.tally.client_done:
            return State.HALF_IN
        return State.HALF_OUT if self.tally.endpoint_done else State.OPEN

    @property
    def ended_at(self) -> float:
        """Seconds since the epoch; of one that is open, when it was opened."""
        return self.opened_at + (self.ended or self.opened) - self.opened

    def view(self) -> Connection:
        """The struct that tables, JSON and the access log are made of."""
        view = self._final or self._view()
        if self._is_over:
            self._final = view  # the log wants it, and so does the memory of what has ended
        return view

    def _view(self) -> Connection:
        now = time.monotonic()
        until = self.ended or now
        tally = self.tally
        tally.refresh()
        return Connection(
            id=self.id,
            direction=self.direction,
            state=self.state,
            source=Peer(address=str(self.source), identity=self.source_identity),
            destination=Peer(
                address=str(self.original or ""), identity=self.destination_identity, service=self.service
            ),
            original_destination=str(self.original or ""),
            endpoint=self.endpoint,
            tls=TlsView(
                mode=self.security,
                version=self.tls_version,
                cipher=self.cipher,
                peer_identity=self.destination_identity
                if self.direction is Direction.OUTBOUND
                else self.source_identity,
                handshake_ms=None if self.handshake_ms is None else round(self.handshake_ms, 3),
                resumed=self.resumed,
            )
            if self.security is Security.MTLS
            else TlsView(mode=self.security),
            policy=self.policy,
            relay=self.relay,
            attempts=tuple(self.attempts),
            bytes_sent=tally.sent,
            bytes_received=tally.received,
            opened_at=rfc3339(self.opened_at),
            closed_at=rfc3339(self.ended_at) if self.ended else "",
            duration_ms=milliseconds(until - self.opened),
            connect_ms=None if self.connected is None else milliseconds(self.connected - self.opened),
            queue_ms=None if self.queued is None else milliseconds(self.queued),
            idle_ms=milliseconds(until - tally.moved_at) if tally.moved_at else None,
            retries=self.retries,
            retry_denied=self.retry_denied,
            held=self.held,
            ordered=self.by_order,
            passed_over=self.passed_over,
            leg_port=(self.link.leg_port if self.link is not None else self.leg_port) or None,
            reason=None
            if self.reason is None
            else ReasonView(code=self.reason, message=self.detail, ended_by=self.ended_by, phase=self.phase),
        )

    def key(self) -> ConnectionKey:
        return ConnectionKey(
            id=self.id, direction=self.direction, opened_at=rfc3339(self.opened_at), source=str(self.source)
        )

    def views(self) -> list[Connection]:
        return [self.view()]

    def lines(self) -> bytes:
        """`view` in JSON, as the access log has it."""
        return msgspec.json.encode(self.view()) + b"\n"


def milliseconds(seconds: float) -> float:
    """As records show them."""
    return round(seconds * 1000, 3)


def rfc3339(wall: float) -> str:
    return moment(int(wall * 1000))


def moment(milliseconds: int) -> str:
    """As `rfc3339`."""
    return _second(milliseconds // 1000) + _MILLISECONDS[milliseconds % 1000]


@functools.lru_cache(maxsize=64)  # a busy second has many records
def _second(wall: int) -> str:
    return datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%dT%H:%M:%S")
