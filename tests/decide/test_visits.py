"""Whether somebody who came again and again has stopped coming."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.decide.visits import Visits


def after(*times: float) -> Visits:
    visits = Visits()
    for time in times:
        visits.came(time)
    return visits


def test_who_never_came_or_came_once_or_twice_is_not_waited_for() -> None:
    for times in ((), (1.0,), (1.0, 6.0), (1.0, 6.0, 11.0)):
        visits = after(*times)
        assert (visits.every, visits.is_late(1e9)) == (0.0, False)


def test_who_came_every_five_seconds_is_late_after_four_times_as_long() -> None:
    visits = after(100.0, 105.0, 110.0, 115.0)
    assert visits.every == 5.0
    assert not visits.is_late(135.0)
    assert visits.is_late(135.1)


def test_who_comes_often_has_ten_seconds_all_the_same() -> None:
    visits = after(100.0, 100.1, 100.2, 100.3)
    assert not visits.is_late(110.0)
    assert visits.is_late(110.4)


def test_a_pause_in_which_nobody_could_come_is_forgotten_after_a_few_visits() -> None:
    visits = after(100.0, 105.0, 110.0, 115.0, 1000.0)
    assert (visits.every, visits.last) == (0.0, 1000.0)
    for time in range(1005, 1045, 5):
        assert not visits.is_late(time)
        visits.came(time)
    assert visits.every == 5.0
    assert visits.is_late(1061.0)


@pytest.mark.parametrize(
    ("before", "since"),
    [([5.0] * 20, [60.0]), ([0.5] * 9, [60.0]), ([5.0] * 20, [1.0, 1.0, 1.0, 1.0, 60.0])],
    ids=["slower", "a person among them", "in bursts"],
)
def test_who_comes_less_often_from_now_on_is_late_once(before: list[float], since: list[float]) -> None:
    visits, now, late = Visits(), 0.0, 0
    visits.came(now)
    for pause in (*before, *since * 20):
        now += pause
        late += visits.is_late(now)
        visits.came(now)
    assert late == 1
    assert (visits.every, visits.is_late(now + 241.0)) == (60.0, True)


@given(st.lists(st.floats(0.01, 100.0), min_size=3, max_size=40), st.floats(0.0, 4.0))
def test_nobody_is_late_within_four_of_his_longest_pauses_of_late(pauses: list[float], share: float) -> None:
    visits, now = Visits(), 0.0
    visits.came(now)
    taken: list[float] = []
    for pause in pauses:
        if visits.is_late(now + pause):
            taken.clear()
        taken.append(pause)
        now += pause
        visits.came(now)
    longest = max(taken[-8:], default=0.0)
    assert abs(visits.every - (longest if len(taken) >= 3 else 0.0)) < 1e-6
    assert not visits.is_late(now + share * longest * 0.999)
