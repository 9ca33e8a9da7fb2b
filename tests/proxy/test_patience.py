"""How much of a connection's patience is for our own queue, and how much an endpoint gets in any case."""

import time

import pytest

from meshnet.proxy.patience import Patience


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> float:
    began = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: began)
    return began


@pytest.mark.parametrize(
    ("total", "attempt", "for_turn", "then"),
    [
        (5.0, 2.0, 3.0, 2.0),
        (5.0, 2.5, 2.5, 2.5),
        (5.0, 5.0, 2.5, 2.5),
    ],
)
def test_who_has_waited_for_a_turn_as_long_as_it_may_has_the_seconds_of_a_try(
    now: float, total: float, attempt: float, for_turn: float, then: float
) -> None:
    assert Patience(now, total, attempt).for_turn() == for_turn
    assert Patience(now - for_turn, total, attempt).for_attempt() == pytest.approx(then)
    assert Patience(now - for_turn, total, attempt).for_turn() == pytest.approx(0.0)


def test_a_later_try_may_wait_for_no_turn_that_would_cost_it_its_seconds(now: float) -> None:
    late = Patience(now - 3.5, 5.0, 2.0)
    assert (late.for_turn(), late.for_attempt(), late.for_attempt(1.0)) == (0.0, 1.5, 1.0)
    assert Patience(now - 6.0, 5.0, 2.0).for_attempt() == 0.0
