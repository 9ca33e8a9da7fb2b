"""How long a program may say nothing, on a clock of the test's own."""

from meshnet_cli.watchdog import Patience


def silent_for(patience: Patience, start: float) -> float:
    """How long until it is over, asked as often as it wants to be."""
    now = start
    while not patience.is_over(now):
        now += patience.step
    return now - start


def test_the_first_word_may_take_longer_than_the_next() -> None:
    patience = Patience(60.0, 30.0, 100.0)
    assert 60 < silent_for(patience, 100.0) <= 60 + patience.step
    patience = Patience(60.0, 30.0, 100.0)
    patience.heard(100.0)
    assert 30 < silent_for(patience, 100.0) <= 30 + patience.step


def test_each_word_begins_anew() -> None:
    patience = Patience(60.0, 30.0, 0.0)
    for now in range(0, 300, 5):
        patience.heard(now)
        assert not patience.is_over(now)


def test_a_machine_that_was_paused_gives_it_all_of_its_time_again() -> None:
    patience = Patience(60.0, 30.0, 0.0)
    patience.heard(0.0)
    assert not patience.is_over(5.0)
    assert not patience.is_over(3600.0)
    assert 30 < silent_for(patience, 3600.0) <= 30 + patience.step
