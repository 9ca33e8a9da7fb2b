"""A connection that came and went under an order, and ended well: what is kept of it until somebody asks for more.

Nearly all connections of a busy host are such, and a whole record for each would cost more than carrying it.
"""

import functools
from typing import TYPE_CHECKING

import msgspec

from meshnet.errors import EndedBy, Phase, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Attempt, Connection, Direction, Peer, ReasonView, Security, State, TlsView
from meshnet.proxy.record import Record, milliseconds, rfc3339
from meshnet.relay import Facts, Flow, Outcome

if TYPE_CHECKING:
    from meshnet.proxy.metrics import Cell
    from meshnet.proxy.registry import Registry

_PLAIN = TlsView(mode=Security.PLAIN)

# Holes in a form, as JSON writes the control characters that stand for them, which are in nobody's name.
_HOLES = {"\\u0001": "%s", '"\\u0002"': "%d", '"\\u0003"': "%.3f"}
_TEXT, _WHOLE, _MS = "\1", "\2", "\3"


class Told:
    """What the records of all connections under an order say alike."""

    __slots__ = (
        "call",
        "cell",
        "destination",
        "destination_identity",
        "endpoint",
        "flow",
        "forms",
        "original",
        "peer_identity",
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
        self.forms: dict[tuple[str, EndedBy, bool], str] = {}  # of their lines
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

    def record(self, registry: "Registry", facts: Facts, connection_id: str = "") -> Record:
        """Of one that has not ended, as far as it says."""
        source = Address(self.flow.source, facts.port)
        connection_id = connection_id or facts.id
        record = Record(registry, self.flow.direction, source, None, connection_id, opened=facts.opened)
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
    """`opened_at`: seconds since the epoch."""

    __slots__ = ("_outcome", "facts", "id", "opened_at", "told")
    failed = False

    def __init__(self, told: Told, facts: Facts, outcome: Outcome, opened_at: float, connection_id: str) -> None:
        """Only of one that was connected, and whose reason is ok."""
        self.id = connection_id
        self.opened_at = opened_at
        self.told = told
        self.facts = facts
        self._outcome = outcome

    @property
    def ended_at(self) -> float:
        """Seconds since the epoch."""
        return self.opened_at + self.facts.ended - self.facts.opened

    @property
    def ended_by(self) -> EndedBy:
        return self._outcome.ended_by

    @property
    def direction(self) -> Direction:
        return self.told.flow.direction

    def view(self) -> Connection:
        """As `Record.view`."""
        told, facts = self.told, self.facts
        port, opened, connected, ended, sent, received, moved_at = facts[:7]
        connect_ms = milliseconds(connected - opened)
        return Connection(
            id=self.id,
            direction=told.flow.direction,
            state=State.CLOSED,
            source=Peer(address=str(Address(told.flow.source, port)), identity=told.source_identity),
            destination=told.destination,
            original_destination=told.original,
            endpoint=told.endpoint,
            tls=_tls(told.tls_version, facts.cipher, told.peer_identity) if facts.cipher else _PLAIN,
            policy=told.policy,
            relay=told.relay,
            attempts=(Attempt(endpoint=told.endpoint, result="ok", ms=connect_ms),),
            bytes_sent=sent,
            bytes_received=received,
            opened_at=rfc3339(self.opened_at),
            closed_at=rfc3339(self.ended_at),
            duration_ms=milliseconds(ended - opened),
            connect_ms=connect_ms,
            idle_ms=milliseconds(ended - moved_at) if moved_at else None,
            ordered=True,
            reason=_ended(self._outcome.ended_by),
        )

    def line(self) -> bytes:
        """`view` in JSON, in half the time: what such connections say alike is put into words once."""
        port, opened, connected, ended, sent, received, moved_at = self.facts[:7]
        words = (self.facts.cipher, self._outcome.ended_by, moved_at > 0)
        form = self.told.forms.get(words) or self.told.forms.setdefault(words, _form(self.view()))
        connect_ms = (connected - opened) * 1000
        # Where a peer has given the id, no letter of it is one that JSON would escape (open.c).
        holes: tuple[object, ...] = (
            *(self.id, port, connect_ms, sent, received),
            *(rfc3339(self.opened_at), rfc3339(self.opened_at + ended - opened)),
            *((ended - opened) * 1000, connect_ms),
        )
        return (form % ((*holes, (ended - moved_at) * 1000) if moved_at else holes)).encode()


def _form(view: Connection) -> str:
    """The JSON of `view`, with a conversion for each of what differs, in the order of a Connection's fields."""
    fields = msgspec.to_builtins(view)
    fields["id"] = fields["openedAt"] = fields["closedAt"] = _TEXT
    fields["source"]["address"] = fields["source"]["address"].rpartition(":")[0] + ":" + _TEXT
    fields["attempts"][0]["ms"] = fields["durationMs"] = fields["connectMs"] = _MS
    fields["bytesSent"] = fields["bytesReceived"] = _WHOLE
    if view.idle_ms is not None:
        fields["idleMs"] = _MS
    form = msgspec.json.encode(fields).decode().replace("%", "%%")
    for hole, conversion in _HOLES.items():
        form = form.replace(hole, conversion)
    return form


@functools.lru_cache(maxsize=1024)  # as many as there are peers
def _tls(version: str, cipher: str, peer: str) -> TlsView:
    return TlsView(mode=Security.MTLS, version=version, cipher=cipher, peer_identity=peer)


@functools.cache
def _ended(by: EndedBy) -> ReasonView:
    return ReasonView(code=Reason.OK, ended_by=by, phase=Phase.DATA)
