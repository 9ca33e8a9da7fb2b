import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.decide.warmth import ConnectTime, warmth
from meshnet.model.service import SlowStart


@pytest.mark.parametrize(("age", "part"), [(0, 0.1), (3, 0.1), (15, 0.5), (29.9, 29.9 / 30), (30, 1), (1e9, 1)])
def test_a_share_grows_evenly_from_the_least(age: float, part: float) -> None:
    assert warmth(SlowStart(), age) == pytest.approx(part)


def test_without_a_window_all_of_it_counts_at_once() -> None:
    assert warmth(SlowStart(window=0.0), 0.0) == 1


def test_the_first_time_counts_whole_and_older_ones_fade() -> None:
    time = ConnectTime()
    assert time.seconds is None
    time.took(0.1, 5.0)
    assert time.seconds == pytest.approx(0.1)
    time.took(0.2, 5.0)  # of many at once each counts for an eighth
    assert time.seconds == pytest.approx(0.1125)
    time.took(0.2, 15.0)
    assert time.seconds == pytest.approx(0.2 - 0.0875 / 2.718281828, rel=1e-6)


def test_one_slow_connect_is_soon_forgotten() -> None:
    time = ConnectTime()
    time.took(0.016, 5.0)
    for _ in range(3):
        time.took(0.001, 5.0)
    assert time.seconds == pytest.approx(0.001 + 0.015 / 8)


@given(st.lists(st.tuples(st.floats(0.0001, 10), st.floats(0, 100)), min_size=1))
def test_it_stays_between_what_was_seen(samples: list[tuple[float, float]]) -> None:
    time, now = ConnectTime(), 0.0
    for seconds, later in samples:
        now += later
        time.took(seconds, now)
    taken = [seconds for seconds, _ in samples]
    assert time.seconds is not None
    assert min(taken) * 0.999999 <= time.seconds <= max(taken) * 1.000001
