"""What is kept of a connection that came and went under an order says the same as its record would."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from meshnet.decide.access import Call
from meshnet.errors import EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Attempt, Connection, Direction, Security
from meshnet.proxy.histogram import DURATIONS, Histogram
from meshnet.proxy.metrics import Metrics
from meshnet.proxy.passed import Passed, Told
from meshnet.proxy.record import Record
from meshnet.proxy.registry import Registry
from meshnet.relay import Flow, Outcome
from meshnet.relay.native import lines
from meshnet.relay.rows import ROW, Row, Rows
from tests.relay.native.heard import facts_of

SOURCE = Address("10.0.0.1", 1234)


def registry(observer: Metrics) -> Registry:
    return Registry(memory=1 << 20, observer=observer, log=None)


def told(direction: Direction, source: str, *, judged: bool = False, tls: bool = False) -> Told:
    decided = Record(registry(Metrics()), direction, SOURCE, None)
    decided.service, decided.source_identity = "api:80", "spiffe://x/ns/default/sa/web"
    decided.policy, decided.endpoint = '50% \u00e4 "quoted"', "10.0.0.2:80"
    decided.security = Security.MTLS if tls else Security.PLAIN
    if tls:
        decided.destination_identity, decided.tls_version = "spiffe://x/ns/default/sa/api", "TLSv1.3"
    if judged:
        decided.policy = "everybody"
        decided.call = Call(identity="", address=source, port=80, service="api", namespace="default")
    return Told(decided, Flow(direction, source, Address("10.96.0.1", 80)), "10.0.0.2:80", "native")


def passed(told: Told, ended_by: EndedBy, row: Row) -> Passed:
    cipher = "TLS_AES_128_GCM_SHA256" if told.tls_version else ""
    return Passed(told, Rows(ROW.pack(*row), cipher, ended_by))


def record_of(passed: Passed, here: Registry) -> Record:
    """What would have been made of it, had it lasted a moment longer."""
    (row,) = passed.rows
    (facts,) = facts_of(passed.rows)
    record = passed.told.record(here, facts)
    # Not as they add up as floats.
    opened = record.opened = 1000.0
    record.opened_at = row.opened / 1e6
    record.connected = opened + row.connected / 1e6
    record.attempts = [Attempt(endpoint=passed.told.endpoint, result="ok", ms=row.connected / 1000)]
    passed.told.note_end(record, facts, Outcome(Reason.OK, passed.rows.ended_by))
    record.ended = opened + row.ended / 1e6
    record.tally.moved_at = record.ended - row.idle / 1e6
    return record


ROW_OF_ONE = Row(b"an id", 10**15, 500_000, 2_000_000, 1000, 40000, 100, 200)
MICROSECONDS = st.integers(0, 10**8)
rows = st.builds(
    Row,
    name=st.text("0123456789abcdefghjkmnpqrstvwxyz", min_size=1, max_size=15).map(str.encode),
    opened=st.integers(0, 2**50),
    connected=MICROSECONDS,
    ended=MICROSECONDS,
    idle=MICROSECONDS,
    sent=st.integers(0, 2**62),
    received=st.integers(0, 2**62),
    port=st.integers(1, 65535),
)


@given(
    direction=st.sampled_from(Direction),
    source=st.sampled_from(["10.0.0.1", "fd00::1"]),
    row=rows,
    ended_by=st.sampled_from([EndedBy.CLIENT, EndedBy.SERVER]),
    tls=st.booleans(),
)
def test_its_view_is_that_of_its_record(
    direction: Direction, source: str, row: Row, ended_by: EndedBy, tls: bool
) -> None:
    one = passed(told(direction, source, tls=tls), ended_by, row)
    (view,) = one.views()
    record = record_of(one, registry(Metrics()))
    assert told_roughly(view) == told_roughly(record.view())
    for line in (one.lines(), one.lines()):  # the first makes the pieces
        assert msgspec.json.decode(line, type=Connection) == view


def told_roughly(view: Connection) -> Connection:
    """A record adds seconds up, in which a millisecond may be the one before; and what is exactly half rounds either
    way.
    """
    assert view.connect_ms is not None
    assert view.duration_ms is not None
    return structs.replace(
        view,
        opened_at="",
        closed_at="",
        connect_ms=round(view.connect_ms, 1),
        duration_ms=round(view.duration_ms, 1),
        idle_ms=None if view.idle_ms is None else round(view.idle_ms, 1),
    )


@given(made=st.lists(rows, min_size=1, max_size=20))
def test_of_many_each_has_its_line(made: list[Row]) -> None:
    data = b"".join(ROW.pack(*row) for row in made)
    many = Passed(told(Direction.OUTBOUND, "10.0.0.1"), Rows(data, "", EndedBy.CLIENT))
    views = [msgspec.json.decode(line, type=Connection) for line in many.lines().splitlines()]
    assert views == list(many.views())
    assert [view.id for view in views] == [row.name.decode() for row in made]
    assert many.ended_at == pytest.approx((made[-1].opened + made[-1].ended) / 1e6)


@pytest.mark.parametrize("direction", Direction)
def test_metrics_count_it_as_they_count_its_record(direction: Direction) -> None:
    as_passed, as_record = Metrics(), Metrics()
    one = passed(told(direction, "10.0.0.1", judged=True), EndedBy.CLIENT, ROW_OF_ONE)
    registry(as_passed).passed(one)
    here = registry(as_record)
    here.ended(record_of(one, here))
    assert list(map(str, as_passed._families({}, {}))) == list(map(str, as_record._families({}, {})))


def test_a_registry_keeps_it_and_tells_it_to_who_follows() -> None:
    here = registry(Metrics())
    follower = here.follow()
    one = passed(told(Direction.INBOUND, "10.0.0.1"), EndedBy.CLIENT, ROW_OF_ONE)
    here.passed(one)
    assert (here.opened_total, here.failed_total, list(here.open)) == (1, 0, [])
    (view,) = one.views()
    assert list(here.listing(recent=60.0, everything=True).connections) == [view]
    event = follower.take()
    assert event
    assert (event.event, event.connection) == ("close", view)


@given(values=st.lists(st.integers(0, 10**10), max_size=50))
def test_many_are_counted_at_once_as_one_by_one(values: list[int]) -> None:
    at_once, one_by_one = Histogram(DURATIONS), Histogram(DURATIONS)
    at_once.add_all(values)
    for value in values:
        one_by_one.add(value / 1e6)
    assert at_once.buckets()[0] == one_by_one.buckets()[0]
    assert at_once.buckets()[1] == pytest.approx(one_by_one.buckets()[1])


def test_what_is_no_form_of_a_line_is_refused() -> None:
    for pieces in ((), (b"",) * 10, (b"",) * 12):
        with pytest.raises(ValueError, match="pieces"):
            lines(b"", pieces)
    with pytest.raises(TypeError):
        lines(b"", (1,) * 11)  # type: ignore[arg-type] # which is the point
    assert lines(b"", (b"",) * 11) == b""
