"""What is kept of a connection that came and went under an order says the same as its record would."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.decide.access import Call
from meshnet.errors import EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Connection, Direction, Security
from meshnet.proxy.metrics import Metrics
from meshnet.proxy.passed import Passed, Told
from meshnet.proxy.record import Record
from meshnet.proxy.registry import Registry
from meshnet.relay import Facts, Flow, Outcome

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


def record_of(passed: Passed, here: Registry) -> Record:
    """What would have been made of it, had it lasted a moment longer."""
    record = passed.told.record(here, passed.facts, passed.id)
    record.opened_at = passed.opened_at
    passed.told.note_end(record, passed.facts, Outcome(Reason.OK, passed.ended_by))
    return record


SECONDS = st.floats(0, 100)


@given(
    direction=st.sampled_from(Direction),
    source=st.sampled_from(["10.0.0.1", "fd00::1"]),
    opened=st.floats(1, 1e6),
    took=st.lists(SECONDS, min_size=3, max_size=3),
    counts=st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)),
    moved=st.booleans(),
    ended_by=st.sampled_from([EndedBy.CLIENT, EndedBy.SERVER]),
    wall=st.floats(0, 4e9),
    tls=st.booleans(),
)
def test_its_view_is_that_of_its_record(
    direction: Direction,
    source: str,
    opened: float,
    took: list[float],
    counts: tuple[int, int],
    moved: bool,
    ended_by: EndedBy,
    wall: float,
    tls: bool,
) -> None:
    connected, last, ended = opened + took[0], opened + took[0] + took[1], opened + sum(took)
    facts = Facts(40000, opened, connected, ended, *counts, last if moved else 0.0, True, True, 0, 0, 0, False, -1)
    facts = facts._replace(cipher="TLS_AES_128_GCM_SHA256" if tls else "")
    passed = Passed(told(direction, source, tls=tls), facts, Outcome(Reason.OK, ended_by), wall, "an id")
    record = record_of(passed, registry(Metrics()))
    assert passed.view() == record.view()
    for line in (passed.line(), passed.line(), record.line()):  # the first makes the form
        assert msgspec.json.decode(line, type=Connection) == passed.view()


@pytest.mark.parametrize("direction", Direction)
def test_metrics_count_it_as_they_count_its_record(direction: Direction) -> None:
    facts = Facts(40000, 1.0, 1.5, 3.0, 100, 200, 2.0, True, True, 0, 0, 0, False, -1)
    as_passed, as_record = Metrics(), Metrics()
    passed = Passed(told(direction, "10.0.0.1", judged=True), facts, Outcome(Reason.OK, EndedBy.CLIENT), 1e9, "an id")
    registry(as_passed).passed(passed)
    here = registry(as_record)
    here.ended(record_of(passed, here))
    assert list(map(str, as_passed._families({}, {}))) == list(map(str, as_record._families({}, {})))


def test_a_registry_keeps_it_and_tells_it_to_who_follows() -> None:
    here = registry(Metrics())
    follower = here.follow()
    facts = Facts(40000, 1.0, 1.5, 3.0, 100, 200, 2.0, True, True, 0, 0, 0, False, -1)
    passed = Passed(told(Direction.INBOUND, "10.0.0.1"), facts, Outcome(Reason.OK, EndedBy.CLIENT), 1e9, "an id")
    here.passed(passed)
    assert (here.opened_total, here.failed_total, list(here.open)) == (1, 0, [])
    assert list(here.listing(recent=60.0, everything=True).connections) == [passed.view()]
    event = follower.take()
    assert event
    assert (event.event, event.connection) == ("close", passed.view())
