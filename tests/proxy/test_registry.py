"""What a sidecar remembers of its connections, and whom it tells."""

import pytest
import trio
import trio.testing

from meshnet.errors import ConnectionFailed, EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Direction, State
from meshnet.proxy.passed import Passed
from meshnet.proxy.record import Record
from meshnet.proxy.registry import Follower, Registry, choose

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
    def log(ended: Record, count: int = 1) -> None:
        logged.append(ended)

    return Registry(memory=1 << 20, observer=observed, log=log)


def begin(registry: Registry, connection_id: str, direction: Direction = Direction.OUTBOUND) -> Record:
    return registry.life(direction, SOURCE, None, connection_id).__enter__()


def end(record: Record, reason: Reason = Reason.OK) -> None:
    record.end(reason, EndedBy.CLIENT, "")
    record.__exit__(None, None, None)


def ids(registry: Registry, *, everything: bool = True, recent: float = 60.0) -> list[str]:
    return [it.id for it in registry.listing(recent=recent, everything=everything).connections]


def test_ended_ones_are_listed_as_they_ended_and_then_the_open_ones(registry: Registry) -> None:
    stays = begin(registry, "stays")
    for number, (name, reason) in enumerate({"a": Reason.OK, "failed": Reason.PEER_RST, "b": Reason.OK}.items()):
        record = begin(registry, name)
        record.opened_at += number  # or all have ended in one millisecond
        end(record, reason)
    assert ids(registry) == ["a", "failed", "b", "stays"]
    assert ids(registry, everything=False) == ["failed", "stays"]
    assert (registry.opened_total, registry.failed_total, list(registry.open.values())) == (4, 1, [stays])


async def test_everything_is_listed_once_part_by_part_the_newest_first(registry: Registry) -> None:
    names = [str(number) for number in range(20_000)]
    for name in names:
        end(begin(registry, name), Reason.OK if int(name) % 3 else Reason.PEER_RST)
    begin(registry, "open")
    assert sorted(parts(registry, everything=True)) == sorted([*names, "open"])
    failed = [name for name in names if not int(name) % 3]
    assert sorted(parts(registry, everything=False)) == sorted([*failed, "open"])
    assert parts(registry, everything=False, recent=-1.0) == ["open"]
    assert [it.id for it in await registry.find("9")] == ["9"]


def parts(registry: Registry, *, everything: bool, recent: float = 60.0) -> list[str]:
    """The ids of all parts. While one is looked at more connections end."""
    listing, found, last = registry.listing(recent=recent, everything=everything), list[str](), ""
    while True:
        part = [view for it in listing.connections for view in (it.views() if isinstance(it, Passed) else [it])]
        found += [it.id for it in part if not it.id.startswith("later")]
        if listing.before is None:
            return found
        newest = max(it.closed_at for it in part if it.closed_at)
        assert not last or newest <= last
        last = newest
        for number in range(100):
            end(begin(registry, f"later {number}"), Reason.PEER_RST)
        listing = registry.listing(recent=recent, everything=everything, before=listing.before)


def test_the_usual_list_has_the_open_ones_and_what_failed_of_late(registry: Registry) -> None:
    begin(registry, "open")
    end(begin(registry, "fine"))
    end(begin(registry, "failed"), Reason.PEER_RST)
    assert ids(registry, everything=False) == ["failed", "open"]
    assert ids(registry, everything=False, recent=-1.0) == ["open"]
    assert registry.failed_total == 1


async def test_those_with_one_id_are_found_open_ones_and_the_newest_first(registry: Registry) -> None:
    old, ended, *_ = (begin(registry, "same") for _ in range(4))
    end(old)
    for number in range(100):  # so that it lies deeper than the others
        end(begin(registry, str(number)))
    ended.opened_at += 1  # or all have ended in one millisecond
    end(ended, Reason.PEER_RST)
    found = await registry.find("same")
    assert [it.state for it in found] == [State.CONNECTING, State.CONNECTING, State.REFUSED, State.CLOSED]
    assert await registry.find("none") == []


async def test_a_peer_that_gives_one_of_its_own_our_id_does_not_hide_ours(registry: Registry) -> None:
    ours = begin(registry, "same")
    first, second = (begin(registry, "same", Direction.INBOUND) for _ in range(2))
    chosen = choose(await registry.find("same"))
    assert chosen is not None
    assert chosen.direction is Direction.OUTBOUND
    end(ours)
    assert choose(await registry.find("same")) == ours.view()
    assert len(await registry.find("same")) == 3
    end(first)
    end(second)


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
    *heard, last = drained(follower)
    assert heard == [("close", 0)] * 1024
    assert last == ("lost", 1500 - 1024)  # though nothing happens any more
    end(begin(registry, "after"), Reason.PEER_RST)
    assert drained(follower) == [("fail", 0)]


async def test_a_follower_that_reads_on_is_told_in_its_place_what_it_lost(registry: Registry) -> None:
    follower = registry.follow()
    for number in range(1500):
        end(begin(registry, str(number)))
    for _ in range(24):
        assert follower.take()
    end(begin(registry, "after"), Reason.PEER_RST)
    assert drained(follower) == [*[("close", 0)] * 1000, ("lost", 1500 - 1024), ("fail", 0)]


async def test_a_follower_that_waits_hears_what_comes(registry: Registry) -> None:
    follower = registry.follow()
    heard: list[str] = []

    async def listen() -> None:
        heard.append((await anext(follower)).event)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        await trio.testing.wait_all_tasks_blocked()
        end(begin(registry, "ended"))
    assert heard == ["close"]


async def test_a_follower_of_very_many_is_told_how_many_it_does_not_hear_of(registry: Registry) -> None:
    records = [begin(registry, str(number)) for number in range(1500)]
    follower = registry.follow()
    assert drained(follower) == [*[("open", 0)] * 1024, ("lost", 1500 - 1024)]
    end(records[0])
    assert drained(follower) == [("close", 0)]


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
    while event := follower.take():
        events.append((event.event, event.count))
    return events
