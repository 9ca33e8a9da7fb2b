"""What is remembered of connections that have ended: all that says something, in few bytes, failures the longest."""

import itertools
from datetime import datetime
from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from meshnet.errors import EndedBy, Phase, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Attempt, Connection, Direction, Security
from meshnet.proxy.metrics import Metrics
from meshnet.proxy.packed import Segment
from meshnet.proxy.passed import Passed
from meshnet.proxy.past import Past
from meshnet.proxy.record import Record, new_id
from meshnet.proxy.registry import Registry
from meshnet.relay import Outcome
from meshnet.relay.rows import ROW, Row, Rows
from tests.proxy.test_passed import SOURCE, rows, told

TOLD = [told(direction, "10.0.0.1", tls=tls) for direction in Direction for tls in (False, True)]
REGISTRY = Registry(memory=0, observer=Metrics(), log=None)
clock = itertools.count(1_790_000_000)


def passed(number: int = 0, *, wall: float | None = None, sent: int = 120) -> Passed:
    """They differ as those of a busy service do."""
    wall = float(next(clock)) if wall is None else wall
    took, lasted = 200 + number * 7919 % 1000, number * 104729 % 100_000 * 10
    row = Row(
        *(new_id(wall).encode(), int(wall * 1e6), took, took + lasted, 100, 32768 + number * 31 % 28000),
        *(sent, 1500 + number % 7),
    )
    by = EndedBy.SERVER if number % 5 else EndedBy.CLIENT
    return Passed(TOLD[number % 4], Rows(ROW.pack(*row), "TLS_AES_128_GCM_SHA256" if number % 4 % 2 else "", by))


def view_of(ended: Passed | Record) -> Connection:
    (view,) = ended.views()
    return view


def failed(detail: str = "nobody listens", *, connection_id: str = "") -> Record:
    record = Record(REGISTRY, Direction.OUTBOUND, SOURCE, None, connection_id)
    record.opened_at = float(next(clock))
    record.end(Reason.CONNECT_REFUSED, EndedBy.PROXY, detail)
    record.let_go()
    return record


def carried(number: int, wall: float) -> Record:
    """One that no order covered: a service has three endpoints, behind tunnels that stood already."""
    source, endpoint = Address("10.0.0.1", 32768 + number * 31 % 28000), f"10.0.0.{2 + number % 3}:80"
    record = Record(REGISTRY, Direction.OUTBOUND, source, None, new_id(wall))
    record.opened_at, record.original = wall, Address("10.96.0.10", 80)
    record.service, record.endpoint, record.relay, record.phase = "api:80", endpoint, "native", Phase.DATA
    record.security, record.tls_version, record.cipher = Security.MTLS, "TLSv1.3", "TLS_AES_128_GCM_SHA256"
    record.source_identity, record.destination_identity = (f"spiffe://mesh/ns/default/sa/{it}" for it in ("web", "api"))
    record.connected = record.opened + 0.0002 + number * 7919 % 1000 / 1e6
    record.attempts = [Attempt(endpoint=endpoint, result="ok", ms=(number * 7919 % 1000) / 1000)]
    record.tally.sent, record.tally.received = 100 + number % 400, 1500 + number % 7
    record.finish(Outcome(Reason.OK, EndedBy.SERVER if number % 5 else EndedBy.CLIENT))
    record.let_go()
    return record


@given(row=rows, ended_by=st.sampled_from(EndedBy), kind=st.integers(0, len(TOLD) - 1))
def test_nothing_is_lost(row: Row, ended_by: EndedBy, kind: int) -> None:
    before = Passed(TOLD[kind], Rows(ROW.pack(*row), "", ended_by))
    segment = Segment()
    segment.add([before], 1)
    assert list(segment.packed().views()) == [view_of(before)]


def test_of_each_kind_everything_that_its_view_says_is_found_again() -> None:
    segment, ended = Segment(), [passed(1), failed("why: \u00e4 \x00"), passed(2), failed(""), passed(3)]
    segment.add(ended[:2], 2)
    assert list(segment.packed().views()) == [view_of(each) for each in ended[:2]]
    segment.add(ended[2:], 3)
    packed = segment.packed()
    assert list(packed.views()) == [view_of(each) for each in ended]
    assert [packed.find(view.id) for view in map(view_of, ended)] == [[view_of(each)] for each in ended]
    assert packed.find("none") == []
    assert packed.find("api:80") == []  # said by all, and nobody's id


def test_what_was_looked_at_before_more_came_stays_as_it_was() -> None:
    segment = Segment()
    segment.add([passed(1)], 1)
    early = segment.packed()
    while not segment.is_full:
        segment.add([passed(number) for number in range(32)], 32)
    assert len(list(early.views())) == 1
    assert len(list(segment.packed().views())) == segment.count


def kept(past: Past, *, well: bool = True) -> list[Connection]:
    views, cursor = past.newest(well=well)
    found = list(views)
    while (page := past.page(cursor)) is not None:
        found += page.packed.views()
        cursor = page.cursor
    return found


def test_an_hour_of_four_hundred_a_second_is_remembered_in_32_mib() -> None:
    """A tenth of it here, in a tenth of the memory."""
    past, count = Past((32 << 20) // 10), 400 * 360
    for number in range(count):
        past.keep(passed(number, wall=1_790_000_000 + number / 400, sent=100 + number % 400))
    assert past.well.forgotten == 0
    assert len(kept(past)) == count


def test_without_orders_it_is_an_hour_of_a_hundred_and_eighty_a_second() -> None:
    """A fortieth of it here, in a fortieth of the memory."""
    past, count = Past((32 << 20) // 40), 180 * 90
    for number in range(count):
        past.keep(carried(number, 1_790_000_000 + number / 180))
    assert past.well.forgotten == 0
    assert len(kept(past)) == count


def test_the_oldest_are_forgotten_and_that_is_told() -> None:
    past = Past(1 << 18)
    for number in range(60_000):
        past.keep(passed(number))
    found = kept(past)
    assert past.well.forgotten + len(found) == 60_000
    assert past.well.forgotten > 0
    # Every one that ended later than it says is there, and not one more.
    assert len(found) == 60_000 - past.well.forgotten
    assert min(datetime.fromisoformat(it.closed_at).timestamp() for it in found) > past.well.since
    assert past.failed.since == 0.0


def test_what_failed_is_remembered_however_much_goes_well() -> None:
    past = Past(1 << 18)
    bad = [failed(f"failure {number}") for number in range(500)]
    for each in bad:
        past.keep(each)
    for number in range(60_000):
        past.keep(passed(number))
    assert kept(past, well=False) == [view_of(each) for each in bad]
    assert past.well.forgotten > 0


def test_a_storm_of_failures_leaves_the_others_half_of_the_memory() -> None:
    past = Past(1 << 20)
    for number in range(5_000):
        past.keep(passed(number))
    for number in range(30_000):
        past.keep(failed(sha256(b"%d" % number).hexdigest()))
    assert (past.well.forgotten, past.failed.forgotten > 0) == (0, True)
    assert past.well.size + past.failed.size <= 1 << 20


def test_without_memory_little_is_kept_and_nothing_breaks() -> None:
    past = Past(0)
    for number in range(20_000):
        past.keep(passed(number))
        past.keep(failed())
    assert len(kept(past)) < 10_000
    assert past.well.size + past.failed.size < 1 << 17


def test_who_asks_for_what_has_been_forgotten_meanwhile_gets_what_is_left() -> None:
    past = Past(1 << 18)
    for number in range(20_000):
        past.keep(passed(number))
    _, cursor = past.newest(well=True)
    for number in range(20_000):
        past.keep(passed(number))
    assert past.page(cursor) is None
    assert past.page((1 << 40, 1 << 40)) is not None  # of one that was started again
