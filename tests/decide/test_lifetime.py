import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.decide.lifetime import overdue, surplus
from meshnet.errors import Reason
from meshnet.model.service import Timeouts

NEVER = Timeouts(half_closed=0.0)
LOADS = st.dictionaries(st.integers(0, 20), st.tuples(st.integers(0, 60), st.integers(0, 5)), max_size=12)


def why(
    timeouts: Timeouts, *, age: float = 0.0, idle: float | None = None, half: bool = False, name: str = "a"
) -> Reason | None:
    found = overdue(timeouts, age=age, idle=idle, half_closed=half, connection=name)
    return found and found[0]


def test_without_timeouts_a_connection_lives_for_ever() -> None:
    assert why(NEVER, age=1e9, idle=1e9, half=True) is None


def test_a_half_closed_connection_may_be_quiet_for_a_while_and_no_longer() -> None:
    assert why(Timeouts(), age=1e6, idle=299, half=True) is None
    assert why(Timeouts(), age=1e6, idle=300, half=True) is Reason.HALF_CLOSE_TIMEOUT
    assert why(Timeouts(), age=1e6, idle=1e6, half=False) is None
    assert why(Timeouts(), age=300, idle=None, half=True) is Reason.HALF_CLOSE_TIMEOUT  # nothing ever moved


def test_idle_counts_from_the_last_byte_or_from_the_beginning() -> None:
    timeouts = Timeouts(idle=60)
    assert why(timeouts, age=1e6, idle=59.9) is None
    assert why(timeouts, age=1e6, idle=60) is Reason.IDLE
    assert why(timeouts, age=60) is Reason.IDLE


def test_an_old_one_ends_when_it_is_idle_for_a_moment_or_when_its_grace_is_over() -> None:
    timeouts = Timeouts(max_age=1000, max_age_grace=100)
    assert why(timeouts, age=799, idle=9) is None
    assert why(timeouts, age=1201, idle=0.1) is Reason.MAX_AGE
    assert why(timeouts, age=1300, idle=0.0) is Reason.MAX_AGE


def test_ages_are_spread_by_a_fifth_either_way_and_stay_what_they_are() -> None:
    timeouts = Timeouts(max_age=1000)
    ends = [
        next(age for age in range(790, 1210) if why(timeouts, age=age, idle=1.0, name=str(name))) for name in range(200)
    ]
    assert min(ends) in range(800, 830)
    assert max(ends) in range(1170, 1201)
    assert ends[0] == next(age for age in range(790, 1210) if why(timeouts, age=age, idle=1.0, name="0"))


def test_who_has_more_than_its_share_gives_some_away_to_who_has_less() -> None:
    assert surplus({"a": (30, 1), "b": (0, 1), "c": (0, 1)}, 1.5) == {"a": 20}
    assert surplus({"a": (10, 1), "b": (20, 2)}, 1.5) == {}
    assert surplus({"a": (14, 1), "b": (10, 1)}, 1.5) == {}  # not so far above
    assert surplus({"a": (2, 1), "b": (1, 1)}, 1.1) == {}  # it would only turn the tables
    assert surplus({"a": (30, 1), "b": (0, 1)}, 0) == {}
    assert surplus({"a": (30, 0), "b": (0, 1)}, 1.5) == {"a": 29}  # weight 0: it is to be left


@given(LOADS, st.sampled_from([1.1, 1.5, 3.0]))
def test_afterwards_nobody_is_below_its_share_who_was_above(loads: dict[int, tuple[int, int]], above: float) -> None:
    total = sum(connections for connections, _ in loads.values())
    weights = sum(weight for _, weight in loads.values())
    for key, number in surplus(loads, above).items():
        connections, weight = loads[key]
        assert 0 < number < connections
        assert connections - number >= total * weight / weights - 1e-9
        assert connections > above * total * weight / weights


@pytest.mark.parametrize("half", [False, True])
def test_the_first_thing_that_is_over_is_told(half: bool) -> None:
    timeouts = Timeouts(idle=10, half_closed=5, max_age=20)
    assert why(timeouts, age=100, idle=7, half=half) is (Reason.HALF_CLOSE_TIMEOUT if half else Reason.MAX_AGE)
