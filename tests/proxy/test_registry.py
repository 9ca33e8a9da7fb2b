"""What a sidecar remembers of its connections, and whom it tells."""

import pytest
import trio

from meshnet.errors import ConnectionFailed, EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Direction
from meshnet.proxy.record import Record
from meshnet.proxy.registry import Follower, Registry

SOURCE = Address("10.0.0.1", 1234)


class Observed:
    def __init__(self) -> None:
        self.records: list[Record] = []

    def ended(self, record: Record) -> None:
        self.records.append(record)


@pytest.fixture
def observed() -> Observed:
    return Observed()


@pytest.fixture
def logged() -> list[Record]:
    return []


@pytest.fixture
def registry(observed: Observed, logged: list[Record]) -> Registry:
    return Registry(keep=3, observer=observed, log=logged.append)


def begin(registry: Registry, connection_id: str, direction: Direction = Direction.OUTBOUND) -> Record:
    return registry.life(direction, SOURCE, None, connection_id).__enter__()


def end(record: Record, reason: Reason = Reason.OK) -> None:
    record.end(reason, EndedBy.CLIENT, "")
    record.__exit__(None, None, None)


def ids(registry: Registry, *, everything: bool = True, recent: float = 60.0) -> list[str]:
    return [record.id for record in registry.listing(recent=recent, everything=everything)]


def test_the_last_ended_ones_are_kept_and_older_ones_are_forgotten(registry: Registry) -> None:
    for name in "abcde":
        end(begin(registry, name))
    assert ids(registry) == ["c", "d", "e"]
    assert registry.find("b") is None
    assert registry.opened_total == 5


def test_what_failed_is_remembered_however_much_goes_well(registry: Registry) -> None:
    end(begin(registry, "a"))
    end(begin(registry, "failed"), Reason.PEER_RST)
    for name in "bcde":
        end(begin(registry, name))
    assert ids(registry) == ["failed", "c", "d", "e"]
    assert ids(registry, everything=False) == ["failed"]
    assert registry.find("failed") is not None
    for name in ("f1", "f2", "f3"):
        end(begin(registry, name), Reason.CONNECT_REFUSED)
    assert ids(registry) == ["c", "d", "e", "f1", "f2", "f3"]


def test_open_ones_are_never_forgotten(registry: Registry) -> None:
    stays = begin(registry, "stays")
    for name in "abcde":
        end(begin(registry, name))
    assert ids(registry) == ["c", "d", "e", "stays"]
    assert registry.find("stays") is stays


def test_the_usual_list_has_the_open_ones_and_what_failed_of_late(registry: Registry) -> None:
    begin(registry, "open")
    end(begin(registry, "fine"))
    end(begin(registry, "failed"), Reason.PEER_RST)
    assert ids(registry, everything=False) == ["failed", "open"]
    assert ids(registry, everything=False, recent=-1.0) == ["open"]
    assert registry.failed_total == 1


def test_the_newest_of_those_with_one_id_is_found(registry: Registry) -> None:
    first, second = begin(registry, "same"), begin(registry, "same")
    assert ids(registry) == ["same", "same"]
    assert registry.find("same") is second
    end(second)
    assert registry.find("same") is first


def test_a_peer_that_gives_one_of_its_own_our_id_does_not_hide_ours(registry: Registry) -> None:
    ours = begin(registry, "same")
    first, second = (begin(registry, "same", Direction.INBOUND) for _ in range(2))
    assert registry.find("same") is ours
    end(ours)
    assert registry.find("same") is ours
    end(second)
    for name in "abc":
        end(begin(registry, name))
    assert registry.find("same") is first


def test_each_end_is_told_once_to_the_log_and_to_the_observer(
    registry: Registry, observed: Observed, logged: list[Record]
) -> None:
    with registry.life(Direction.INBOUND, SOURCE, None) as record:
        raise ConnectionFailed(Reason.NOT_LOCAL)
    assert observed.records == [record]
    assert [line.id for line in logged] == [record.id]


async def test_the_registry_says_when_none_is_open(registry: Registry) -> None:
    assert registry.empty.is_set()
    first, second = begin(registry, "first"), begin(registry, "second")
    assert not registry.empty.is_set()
    end(first)
    assert not registry.empty.is_set()
    end(second)
    assert registry.empty.is_set()


async def test_a_slow_follower_is_told_how_much_it_lost_and_then_hears_on(registry: Registry) -> None:
    follower = registry.follow()
    for number in range(1500):
        end(begin(registry, str(number)))
    heard = drained(follower)
    assert len(heard) == 1024
    assert {event for event, _ in heard} == {"close"}
    end(begin(registry, "after"), Reason.PEER_RST)
    assert drained(follower) == [("lost", 1500 - 1024), ("fail", 0)]


async def test_a_follower_of_very_many_is_told_how_many_it_does_not_hear_of(registry: Registry) -> None:
    records = [begin(registry, str(number)) for number in range(1500)]
    follower = registry.follow()
    assert drained(follower) == [("open", 0)] * 1024
    end(records[0])
    assert drained(follower) == [("lost", 1500 - 1024), ("close", 0)]


async def test_who_hung_up_is_told_no_more(registry: Registry) -> None:
    begin(registry, "open")
    follower = registry.follow()
    registry.unfollow(follower)
    end(begin(registry, "later"))
    assert drained(follower) == [("open", 0)]


async def test_a_denied_connection_is_an_event_of_its_own(registry: Registry) -> None:
    follower = registry.follow()
    end(begin(registry, "denied"), Reason.AUTHZ_DENIED)
    assert drained(follower) == [("deny", 0)]


def drained(follower: Follower) -> list[tuple[str, int]]:
    """What waits for it: the event, and how many were lost."""
    events: list[tuple[str, int]] = []
    while True:
        try:
            event = follower.receive.receive_nowait()
        except trio.WouldBlock:
            return events
        events.append((event.event, event.count))
