from hypothesis import given
from hypothesis import strategies as st

from meshnet.decide.outlier import Outcomes, to_eject
from meshnet.model.service import Outlier

SETTINGS = Outlier()


class Thrown:
    """Dice that show the same each time."""

    def __init__(self, shown: float) -> None:
        self.random = lambda: shown


DICE = Thrown(0.0)
SHARES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=12)


def seen(good: int, bad: int, now: float = 100.0) -> Outcomes:
    outcomes = Outcomes()
    for ok in (*[True] * good, *[False] * bad):
        outcomes.note(ok, SETTINGS.window, now)
    return outcomes


def ejected(outcomes: dict[str, Outcomes], endpoints: int = 0, settings: Outlier = SETTINGS) -> list[str]:
    return [each.endpoint for each in to_eject(outcomes, endpoints or len(outcomes), settings, 100.0)]


def test_who_fails_half_of_the_time_is_ejected_and_nobody_else() -> None:
    outcomes = {"a": seen(5, 5), "b": seen(6, 5), "c": seen(100, 0), "d": seen(0, 9)}  # too few to tell of d
    assert ejected(outcomes) == ["a"]


def test_the_worst_come_first_and_only_half_of_all() -> None:
    outcomes = {"a": seen(5, 15), "b": seen(0, 20), "c": seen(8, 12), "d": seen(20, 0)}
    assert ejected(outcomes) == ["b", "a"]
    outcomes["b"].eject(SETTINGS, 100.0, DICE)
    assert ejected(outcomes) == ["a"]
    outcomes["a"].eject(SETTINGS, 100.0, DICE)
    assert ejected(outcomes) == []


@given(SHARES, st.floats(0, 1), st.integers(2, 20))
def test_never_the_last_one_whatever_the_settings_say(
    shares: list[tuple[int, int]], most: float, endpoints: int
) -> None:
    outcomes = {str(name): seen(good, bad) for name, (good, bad) in enumerate(shares[:endpoints])}
    settings = Outlier(max_ejected_share=most, min_endpoints=2)
    found = ejected(outcomes, endpoints, settings)
    assert len(found) <= min(endpoints * most, endpoints - 1)
    for name in found:
        connects, failures = outcomes[name].seen(settings.window, 100.0)
        assert connects >= 10
        assert failures >= connects / 2


def test_of_few_endpoints_none_is_an_outlier_and_zero_turns_it_off() -> None:
    outcomes = {"a": seen(0, 20), "b": seen(20, 0)}
    assert ejected(outcomes) == []
    assert ejected(outcomes, 3) == ["a"]
    assert ejected(outcomes, 3, Outlier(failure_share=0)) == []


def test_what_is_older_than_the_window_is_forgotten() -> None:
    outcomes = seen(0, 20, now=100.0)
    assert outcomes.seen(30.0, 119.0) == (20, 20)
    assert outcomes.seen(30.0, 131.0) == (0, 0)
    outcomes.note(True, 30.0, 140.0)
    assert outcomes.seen(30.0, 141.0) == (1, 0)


def test_each_ejection_in_a_row_is_twice_as_long_and_calm_makes_it_short_again() -> None:
    outcomes, now, lengths = Outcomes(), 0.0, []
    for _ in range(6):
        lengths.append(outcomes.eject(SETTINGS, now, DICE))
        assert outcomes.is_ejected(now + lengths[-1] - 1)
        now += lengths[-1]
        assert not outcomes.is_ejected(now)
    assert lengths == [30, 60, 120, 240, 300, 300]
    assert outcomes.eject(SETTINGS, now + 301, DICE) == 30


def test_it_lasts_as_long_as_a_failure_counts_or_the_next_ejection_would_be_longer() -> None:
    assert Outcomes().lasts_until == seen(20, 0).lasts_until < 0
    outcomes = seen(0, 1)
    assert outcomes.lasts_until == 130
    outcomes.eject(SETTINGS, 100.0, DICE)
    assert outcomes.lasts_until == 130 + 60


def test_who_comes_back_is_judged_anew() -> None:
    outcomes = seen(0, 20)
    outcomes.eject(SETTINGS, 100.0, DICE)
    assert outcomes.seen(SETTINGS.window, 100.0) == (0, 0)


def test_an_ejection_is_longer_by_a_share_that_dice_decide() -> None:
    """Or those that were ejected together would come back, and be asked by everybody, together."""
    settings = Outlier(jitter=0.5)
    assert [Outcomes().eject(settings, 0.0, Thrown(shown)) for shown in (0.0, 0.5, 1.0)] == [30.0, 37.5, 45.0]
    outcomes = Outcomes()
    assert [outcomes.eject(settings, 45.0 * at, Thrown(1.0)) for at in range(2)] == [45.0, 90.0]
