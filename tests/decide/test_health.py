import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from meshnet.decide.health import Health, Healths, first_check_after, next_check_after
from meshnet.model.address import Address
from meshnet.model.service import CheckSettings


def said(health: Health, checks: str) -> str:
    """What each check (`+` passed, `-` failed) makes of it: `+` or `-` where it changes, else a dot."""
    changes = []
    for check in checks:
        changed = health.passed() if check == "+" else health.failed()
        changes.append(("+" if health.healthy else "-") if changed else ".")
    return "".join(changes)


@pytest.mark.parametrize(
    ("checks", "changes"),
    [
        ("---", "..-"),
        ("--+---", ".....-"),
        ("---++", "..-.+"),
        ("---+-++", "..-...+"),
        ("------", "..-..."),
        ("++++", "...."),
    ],
)
def test_so_many_in_a_row_change_it(checks: str, changes: str) -> None:
    assert said(Health(CheckSettings(rise=2, fall=3)), checks) == changes


def test_new_settings_hold_for_the_run_that_goes_on() -> None:
    health = Health(CheckSettings(fall=10))
    assert said(health, "--") == ".."
    health.settings = CheckSettings(fall=3)
    assert said(health, "-") == "-"


@given(st.text("+-", max_size=60), st.integers(1, 4), st.integers(1, 4))
def test_it_changes_exactly_after_a_whole_run_of_the_opposite(checks: str, rise: int, fall: int) -> None:
    health = Health(CheckSettings(rise=rise, fall=fall))
    since = ""  # the last change
    for check in checks:
        needed, opposite = (fall, "-") if health.healthy else (rise, "+")
        since += check
        due = since.endswith(opposite * needed)
        assert (said(health, check) != ".") == due
        since = "" if due else since


@given(st.floats(0.1, 3600), st.integers())
def test_checks_are_due_within_a_tenth_of_the_interval_and_the_first_anywhere_in_it(interval: float, seed: int) -> None:
    settings, dice = CheckSettings(interval=interval), random.Random(seed)
    assert 0 <= first_check_after(settings, dice) <= interval
    assert 0.899 * interval <= next_check_after(settings, dice) <= 1.101 * interval


ADDRESSES = [Address("10.0.0.1", port) for port in range(1, 6)]


class Group(RuleBasedStateMachine):
    """Against what is said of it in words."""

    def __init__(self) -> None:
        super().__init__()
        self.healths = Healths()
        self.usable: set[Address] = set()
        self.failing: set[Address] = set()

    @rule(usable=st.sets(st.sampled_from(ADDRESSES)))
    def now(self, usable: set[Address]) -> None:
        self.usable = usable
        self.healths.now(usable)

    @rule(address=st.sampled_from(ADDRESSES), healthy=st.booleans())
    def changed(self, address: Address, healthy: bool) -> None:
        (self.failing.discard if healthy else self.failing.add)(address)
        self.healths.changed(address, healthy)

    @invariant()
    def never_the_last_one(self) -> None:
        all_fail = bool(self.usable) and self.usable <= self.failing
        assert self.healths.panic == all_fail
        assert set(self.healths.passed_over()) == (set() if all_fail else self.failing)
        assert not self.usable or self.usable - set(self.healths.passed_over())
        assert self.healths.failing() == len(self.failing)


TestGroup = Group.TestCase
