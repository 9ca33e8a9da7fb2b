"""Connections that came and went under an order, and ended well: what is kept of them until somebody asks for more.

Nearly all connections of a busy host are such, and a whole record for each would cost more than carrying it.
"""

import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from meshnet.errors import EndedBy, Phase, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Attempt, Connection, Direction, Peer, ReasonView, Security, State, TlsView
from meshnet.proxy.record import Record, milliseconds, moment
from meshnet.relay import Facts, Flow, Outcome
from meshnet.relay.native import lines
from meshnet.relay.rows import ROW, Row, Rows

if TYPE_CHECKING:
    from meshnet.proxy.metrics import Cell
    from meshnet.proxy.registry import Registry

_PLAIN = TlsView(mode=Security.PLAIN)

# Where a line differs from others of its kind: in JSON control characters are written so, and nobody's name has one.
_TEXT, _NUMBER = "\1", "\2"
_HOLE = re.compile(rb'"\\u0002"|\\u0001')


class Told:
    """What the records of all connections under an order say alike."""

    __slots__ = (
        "call",
        "cell",
        "destination",
        "destination_identity",
        "endpoint",
        "flow",
        "original",
        "peer_identity",
        "pieces",
        "policy",
        "relay",
        "security",
        "service",
        "source_identity",
        "tls_version",
    )

    def __init__(self, of: Record, flow: Flow, endpoint: str, relay: str) -> None:
        """`of` is the record of the connection for which it was decided."""
        self.flow = flow
        self.cell: Cell | None = None  # of their metrics
        self.pieces: dict[tuple[str, EndedBy], tuple[bytes, ...]] = {}  # of their lines
        self.endpoint = endpoint
        self.relay = relay
        self.service = of.service
        self.source_identity = of.source_identity
        self.policy = of.policy
        self.call = of.call
        self.security = of.security
        self.destination_identity = of.destination_identity
        self.tls_version = of.tls_version
        is_outbound = flow.direction is Direction.OUTBOUND
        self.peer_identity = of.destination_identity if is_outbound else of.source_identity
        self.original = str(flow.original)
        self.destination = Peer(address=self.original, identity=self.destination_identity, service=self.service)

    def record(self, registry: "Registry", facts: Facts) -> Record:
        """Of one that has not ended, as far as it says."""
        source = Address(self.flow.source, facts.port)
        record = Record(registry, self.flow.direction, source, None, facts.id, opened=facts.opened)
        record.original = self.flow.original
        record.service = self.service
        record.source_identity = self.source_identity
        record.policy = self.policy
        record.call = self.call
        record.endpoint = self.endpoint
        record.phase = Phase.CONNECT
        if facts.cipher:
            record.security = self.security
            record.destination_identity = self.destination_identity
            record.tls_version, record.cipher = self.tls_version, facts.cipher
        if facts.connected:
            self.note_connected(record, facts)
        return record

    def note_connected(self, record: Record, facts: Facts) -> None:
        ms = milliseconds(facts.connected - facts.opened)
        record.attempts.append(Attempt(endpoint=self.endpoint, result="ok", ms=ms))
        record.connected = facts.connected
        record.phase = Phase.DATA
        record.security = self.security
        record.relay = self.relay

    def note_end(self, record: Record, facts: Facts, outcome: Outcome) -> None:
        tally = record.tally
        tally.live = None
        tally.sent, tally.received, tally.moved_at = facts.sent, facts.received, facts.moved_at
        tally.client_done, tally.endpoint_done = facts.client_done, facts.endpoint_done
        record.finish(outcome)
        record.ended = facts.ended


class Passed:
    """Some that ended one after another."""

    __slots__ = ("rows", "told")
    failed = False

    def __init__(self, told: Told, rows: Rows) -> None:
        """At least one."""
        self.told = told
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ended_at(self) -> float:
        """When the last one did, in seconds since the epoch."""
        row = Row._make(ROW.unpack_from(self.rows.data, len(self.rows.data) - ROW.size))
        return (row.opened + row.ended) / 1e6

    def views(self) -> Iterator[Connection]:
        """As `Record.view`, of each."""
        return map(self._view, self.rows)

    def lines(self) -> bytes:
        """The `views` in JSON, a line each, in a tenth of the time: what they say alike is put into words once."""
        rows = self.rows
        kind = (rows.cipher, rows.ended_by)
        pieces = self.told.pieces.get(kind) or self.told.pieces.setdefault(kind, self._pieces())
        # Where a peer has given an id, no letter of it is one that JSON would escape (open.c).
        return lines(rows.data, pieces)

    def _view(self, row: Row) -> Connection:
        told, rows = self.told, self.rows
        connect_ms = row.connected / 1000
        return Connection(
            id=row.id,
            direction=told.flow.direction,
            state=State.CLOSED,
            source=Peer(address=str(Address(told.flow.source, row.port)), identity=told.source_identity),
            destination=told.destination,
            original_destination=told.original,
            endpoint=told.endpoint,
            tls=_tls(told.tls_version, rows.cipher, told.peer_identity) if rows.cipher else _PLAIN,
            policy=told.policy,
            relay=told.relay,
            attempts=(Attempt(endpoint=told.endpoint, result="ok", ms=connect_ms),),
            bytes_sent=row.sent,
            bytes_received=row.received,
            opened_at=moment(row.opened // 1000),
            closed_at=moment((row.opened + row.ended) // 1000),
            duration_ms=row.ended / 1000,
            connect_ms=connect_ms,
            idle_ms=row.idle / 1000,
            ordered=True,
            reason=_ended(rows.ended_by),
        )

    def _pieces(self) -> tuple[bytes, ...]:
        """A line without what differs, which comes in the order of a Connection's fields (lines.c)."""
        fields = msgspec.to_builtins(next(self.views()))
        fields["id"] = fields["openedAt"] = fields["closedAt"] = _TEXT
        fields["source"]["address"] = fields["source"]["address"].rpartition(":")[0] + ":" + _TEXT
        fields["attempts"][0]["ms"] = fields["durationMs"] = fields["connectMs"] = fields["idleMs"] = _NUMBER
        fields["bytesSent"] = fields["bytesReceived"] = _NUMBER
        return tuple(_HOLE.split(msgspec.json.encode(fields) + b"\n"))


@functools.lru_cache(maxsize=1024)  # as many as there are peers
def _tls(version: str, cipher: str, peer: str) -> TlsView:
    return TlsView(mode=Security.MTLS, version=version, cipher=cipher, peer_identity=peer)


@functools.cache
def _ended(by: EndedBy) -> ReasonView:
    return ReasonView(code=Reason.OK, ended_by=by, phase=Phase.DATA)
