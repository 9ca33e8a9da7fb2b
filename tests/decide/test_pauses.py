from meshnet.decide.pauses import Pauses


def test_each_pause_is_twice_as_long_as_the_last_up_to_the_longest() -> None:
    pauses = Pauses()
    assert [pauses.after(0.0) for _ in range(5)] == [0.2, 0.4, 0.8, 1.6, 3.2]
    assert [pauses.after(0.0) for _ in range(5)] == [6.4, 12.8, 25.6, 30.0, 30.0]


def test_after_a_long_life_it_begins_anew() -> None:
    pauses = Pauses()
    for _ in range(8):
        pauses.after(Pauses.STEADY)
    assert [pauses.after(Pauses.STEADY + 1), pauses.after(0.0)] == [0.2, 0.4]
