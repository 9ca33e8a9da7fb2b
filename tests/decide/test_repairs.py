"""The pace of repairs: at once, and then not so that two programs do nothing but undo each other's work."""

import math

from meshnet.decide.repairs import InboundPace, RepairPace


def test_the_first_few_are_made_at_once() -> None:
    pace = RepairPace()
    for at in range(RepairPace.AT_ONCE - 1):
        pace.repaired(float(at))
        assert not pace.is_fight(float(at))
        assert pace.wait(float(at)) == 0.0


def test_in_a_fight_each_waits_twice_as_long_up_to_a_limit() -> None:
    pace, now, waits = RepairPace(), 0.0, []
    for _ in range(12):
        pace.repaired(now)
        waits.append(pace.wait(now))
        now += waits[-1]
    assert waits == [0, 0, 0, 0, 1, 2, 4, 8, 16, 30, 30, 30]
    assert pace.wait(now - 30 + 29) == 1.0
    assert pace.is_fight(now)


def test_after_a_minute_of_calm_all_is_forgotten() -> None:
    pace = RepairPace()
    for _ in range(RepairPace.AT_ONCE):
        pace.repaired(0.0)
    assert pace.is_fight(59.0)
    assert not pace.is_fight(60.0)
    pace.repaired(100.0)
    assert pace.wait(100.0) == 0.0


def test_one_now_and_then_is_no_fight() -> None:
    pace = RepairPace()
    for number in range(100):
        pace.repaired(number * 20.0)
        assert not pace.is_fight(number * 20.0)


def test_what_comes_in_is_proved_by_the_clock_at_once_on_demand_and_soon_after_others() -> None:
    pace = InboundPace()
    assert pace.is_due(0.0)
    pace.proved(10.0, interval=600.0)
    assert not pace.is_due(609.0)
    assert pace.is_due(610.0)
    pace.others_changed_rules()  # some do so all the time: not before a minute is over
    assert not pace.is_due(69.0)
    assert pace.is_due(70.0)
    pace.proved(70.0, interval=5.0)
    pace.others_changed_rules()  # puts nothing off
    assert pace.is_due(75.0)
    pace.proved(75.0, interval=math.inf)
    assert not pace.is_due(1e9)
    pace.at_once()
    assert pace.is_due(75.0)


def test_before_the_first_proof_it_is_due_whatever_others_do() -> None:
    pace = InboundPace()
    pace.others_changed_rules()
    assert pace.is_due(0.0)
