"""How many tunnels should stand by: followed through any life of a peer."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from meshnet.decide.demand import Demand


@dataclass(frozen=True)
class Step:
    """So many more in use, or fewer, and so many seconds pass."""

    change: int
    seconds: float


steps = st.lists(
    st.builds(Step, change=st.integers(-50, 50), seconds=st.one_of(st.just(0.0), st.floats(0, 120))), max_size=40
)


@dataclass
class Peer:
    demand: Demand
    leased: int = 0
    now: float = 100.0
    most: int = 0

    def go(self, step: Step) -> None:
        for _ in range(step.change):
            self.leased += 1
            self.demand.asked(self.leased, self.now)
        self.leased = max(0, self.leased + min(0, step.change))
        self.most = max(self.most, self.leased)
        self.now += step.seconds

    def spares(self, later: float = 0.0) -> int:
        return self.demand.spares(self.leased, self.now + later)


def lived(life: list[Step]) -> Peer:
    peer = Peer(Demand(100.0))
    for step in life:
        peer.go(step)
    return peer


@given(steps)
def test_it_is_never_less_than_none_and_never_more_than_was_in_use_at_once_and_an_eighth_of_what_was_asked_for(
    life: list[Step],
) -> None:
    peer = lived(life)
    asked = sum(max(0, step.change) for step in life)
    assert 0 <= peer.spares() <= peer.most - peer.leased + asked / 8


@given(steps, st.floats(0, 1000), st.floats(0, 1000))
def test_it_only_gets_fewer_while_nobody_asks(life: list[Step], sooner: float, later: float) -> None:
    peer = lived(life)
    assert peer.spares(max(sooner, later)) <= peer.spares(min(sooner, later))


@given(steps)
def test_in_the_end_there_is_none_for_a_peer_that_nobody_asks_for(life: list[Step]) -> None:
    assert lived(life).spares(later=600) == 0


@given(steps)
def test_to_look_changes_nothing(life: list[Step]) -> None:
    looked, other = Peer(Demand(100.0)), Peer(Demand(100.0))
    for step in life:
        looked.spares(), looked.spares(later=50)
        looked.go(step)
        other.go(step)
    assert looked.spares() == other.spares()


@given(st.integers(0, 200), st.integers(0, 200))
def test_what_was_in_use_a_moment_ago_is_wanted_still(at_once: int, given_back: int) -> None:
    peer = lived([Step(at_once, 0.0), Step(-min(at_once, given_back), 0.0)])
    assert peer.spares() >= min(at_once, given_back)


@given(st.integers(1, 200))
def test_what_is_held_for_long_is_wanted_when_it_comes_back(at_once: int) -> None:
    peer = lived([Step(at_once, 0.0)])
    for _ in range(200):
        peer.now += 5.0
        peer.demand.hold(peer.leased, peer.now)
    assert peer.spares() == 0
    peer.leased = 0
    assert peer.spares() == at_once


@given(steps, st.integers(0, 50))
def test_what_was_not_needed_for_long_is_not_wanted(life: list[Step], standing: int) -> None:
    peer = lived(life)
    peer.demand.limit(peer.leased + standing)
    assert peer.spares() <= standing


@given(st.integers(1, 20), st.integers(20, 200))
def test_what_grows_has_more_standing_by_than_it_grows_by_in_a_second(each_second: int, seconds: int) -> None:
    peer = lived([Step(each_second, 1.0)] * seconds)
    assert peer.spares() >= each_second


@given(st.integers(0, 7))
def test_a_few_connections_cause_no_handshake_that_nobody_waits_for(count: int) -> None:
    assert lived([Step(count, 0.0)]).spares() == 0


def test_half_of_it_is_forgotten_in_half_a_minute() -> None:
    peer = lived([Step(8, 0.0), Step(-8, 0.0)])
    assert [peer.spares(seconds) for seconds in (30, 60, 90, 120)] == [4, 2, 1, 0]


def test_time_that_goes_back_is_taken_as_standing_still() -> None:
    peer = lived([Step(20, 30.0)])
    peer.demand.hold(20, peer.now)
    before = peer.spares()
    peer.now -= 60.0
    assert peer.spares() == before
    peer.leased += 1
    peer.demand.asked(21, peer.now)
    assert peer.spares() >= before


@given(st.integers(100, 20_000), st.integers(1, 8), st.floats(0.001, 0.2))
def test_who_needs_as_many_as_ever_is_not_taken_to_grow(held: int, at_a_time: int, pause: float) -> None:
    """So many long ones, and a few short ones one after the other."""
    peer = lived([Step(held + at_a_time, 0.0), Step(0, 120.0)])
    peer.demand.hold(peer.leased, peer.now)
    for _ in range(100):
        peer.go(Step(-at_a_time, pause))
        peer.go(Step(at_a_time, pause))
    assert peer.spares() <= 1
