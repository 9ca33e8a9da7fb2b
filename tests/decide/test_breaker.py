import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from meshnet.decide.breaker import Breaker, BreakerState, counts_against_endpoint, is_endpoints_fault
from meshnet.errors import Reason
from meshnet.model.service import BreakerSettings

EXACT = BreakerSettings(jitter=0.0)


class Fixed:
    """Dice that always show the same."""

    def __init__(self, shown: float) -> None:
        self.shown = shown

    def random(self) -> float:
        return self.shown


LOW = Fixed(0.0)


def fail(breaker: Breaker, times: int, now: float = 0.0) -> None:
    for _ in range(times):
        assert breaker.admit(now)
        breaker.failed(now, LOW)


def opened(settings: BreakerSettings = EXACT) -> Breaker:
    """A breaker that opened at 0."""
    breaker = Breaker(settings)
    fail(breaker, settings.failures)
    return breaker


def test_it_starts_closed_and_lets_everyone_through() -> None:
    breaker = Breaker(EXACT)
    assert breaker.state(0.0) is BreakerState.CLOSED
    assert all(breaker.admit(0.0) for _ in range(100))


@given(st.integers(1, 20))
def test_it_opens_after_exactly_as_many_failures_in_a_row_as_set(failures: int) -> None:
    breaker = Breaker(BreakerSettings(failures=failures))
    fail(breaker, failures - 1)
    assert breaker.state(0.0) is BreakerState.CLOSED
    fail(breaker, 1)
    assert breaker.state(0.0) is BreakerState.OPEN
    assert breaker.failures == failures


def test_a_success_in_between_starts_the_count_again() -> None:
    breaker = Breaker(EXACT)
    fail(breaker, 4)
    assert breaker.admit(0.0)
    breaker.succeeded(0.0)
    assert breaker.failures == 0
    fail(breaker, 4)
    assert breaker.state(0.0) is BreakerState.CLOSED


def test_an_abandoned_attempt_counts_for_nothing() -> None:
    breaker = Breaker(EXACT)
    fail(breaker, 4)
    assert breaker.admit(0.0)
    breaker.abandoned(0.0)
    assert breaker.failures == 4
    fail(breaker, 1)
    assert breaker.state(0.0) is BreakerState.OPEN


def test_that_it_has_opened_lasts_until_it_is_closed_for_long() -> None:
    assert Breaker(EXACT).lasts_until < 0
    breaker = opened()
    assert breaker.lasts_until == 1 + 60
    assert breaker.admit(30.0)
    breaker.succeeded(31.0)
    assert breaker.lasts_until == 31 + 60


def test_a_failure_that_opens_nothing_lasts_as_long_as_one_that_did() -> None:
    breaker = Breaker(EXACT)
    assert breaker.admit(7.0)
    breaker.failed(7.0, random.Random(1))
    assert breaker.lasts_until == 7 + 60
    assert breaker.admit(8.0)
    breaker.succeeded(8.0)
    assert breaker.lasts_until < 0


def test_while_open_it_admits_nobody_and_tells_for_how_long() -> None:
    breaker = opened()
    assert not breaker.admit(0.5)
    assert not breaker.allows(0.5)
    assert breaker.open_for(0.25) == 0.75


def test_half_open_lets_exactly_one_through() -> None:
    breaker = opened()
    assert breaker.state(1.0) is BreakerState.HALF_OPEN
    assert breaker.open_for(1.0) == 0.0
    assert breaker.allows(1.0)
    assert breaker.admit(1.0)
    assert not breaker.allows(1.0)
    assert not breaker.admit(1.0)


def test_looking_does_not_take_the_probe() -> None:
    breaker = opened()
    assert breaker.allows(1.0)
    assert breaker.allows(1.0)
    assert breaker.admit(1.0)


def test_a_probe_that_succeeds_closes_it() -> None:
    breaker = opened()
    assert breaker.admit(1.0)
    breaker.succeeded(1.1)
    assert breaker.state(1.1) is BreakerState.CLOSED
    assert breaker.failures == 0
    fail(breaker, 4, 1.2)
    assert breaker.state(1.2) is BreakerState.CLOSED


def test_a_probe_that_is_abandoned_makes_room_for_the_next() -> None:
    breaker = opened()
    assert breaker.admit(1.0)
    breaker.abandoned(1.1)
    assert breaker.state(1.1) is BreakerState.HALF_OPEN
    assert breaker.admit(1.1)


def test_each_probe_that_fails_doubles_the_open_time_up_to_the_most() -> None:
    breaker, now, lengths = opened(), 0.0, []
    for _ in range(9):
        lengths.append(breaker.open_for(now))
        now += breaker.open_for(now)
        assert breaker.admit(now)
        breaker.failed(now, LOW)
    assert lengths == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_thousands_of_failed_probes_do_no_harm() -> None:
    breaker, now = opened(), 0.0
    for _ in range(3000):
        now += breaker.open_for(now)
        assert breaker.admit(now)
        breaker.failed(now, LOW)
    assert breaker.open_for(now) == 60.0


@pytest.mark.parametrize(("healthy", "open_time"), [(59.9, 2.0), (60.0, 1.0)])
def test_the_open_time_is_forgotten_only_after_a_minute_closed(healthy: float, open_time: float) -> None:
    breaker = opened()
    assert breaker.admit(1.0)
    breaker.succeeded(1.0)
    fail(breaker, 5, 1.0 + healthy)
    assert breaker.open_for(1.0 + healthy) == pytest.approx(open_time)


@given(st.floats(0, 1, exclude_max=True), st.floats(0, 2))
def test_jitter_makes_an_open_time_longer_by_at_most_its_share(shown: float, jitter: float) -> None:
    breaker = Breaker(BreakerSettings(failures=1, jitter=jitter))
    assert breaker.admit(0.0)
    breaker.failed(0.0, Fixed(shown))
    assert 1.0 <= breaker.open_for(0.0) <= 1.0 + jitter


def test_attempts_from_before_the_opening_neither_prolong_nor_close_it() -> None:
    breaker = Breaker(EXACT)
    assert all(breaker.admit(0.0) for _ in range(7))
    for _ in range(5):
        breaker.failed(0.0, LOW)
    breaker.failed(0.9, LOW)
    assert breaker.open_for(0.9) == pytest.approx(0.1)
    breaker.succeeded(0.9)
    assert breaker.state(0.9) is BreakerState.OPEN
    assert breaker.failures == 5


def test_the_probe_waits_until_attempts_from_before_the_opening_are_over() -> None:
    breaker = Breaker(EXACT)
    assert all(breaker.admit(0.0) for _ in range(6))
    for _ in range(5):
        breaker.failed(0.0, LOW)
    assert breaker.state(1.5) is BreakerState.HALF_OPEN
    assert not breaker.admit(1.5)
    breaker.failed(1.6, LOW)
    assert breaker.admit(1.6)


def test_settings_can_change_while_it_runs() -> None:
    breaker = Breaker(EXACT)
    fail(breaker, 2)
    breaker.settings = BreakerSettings(failures=3, open_time=10.0, jitter=0.0)
    fail(breaker, 1)
    assert breaker.open_for(0.0) == 10.0


@pytest.mark.parametrize(
    "reason",
    [
        Reason.CONNECT_REFUSED,
        Reason.CONNECT_TIMEOUT,
        Reason.CONNECT_UNREACHABLE,
        Reason.TLS_HANDSHAKE,
        Reason.TLS_PEER_IDENTITY,
        Reason.TLS_EXPIRED,
        Reason.TUNNEL_LOST,
    ],
)
def test_what_the_endpoint_did_counts_against_it(reason: Reason) -> None:
    assert counts_against_endpoint(reason)
    assert is_endpoints_fault(reason)


def test_a_certificate_that_has_not_begun_by_our_clock_is_left_alone_and_blamed_on_nobody() -> None:
    assert counts_against_endpoint(Reason.TLS_NOT_YET_VALID)
    assert not is_endpoints_fault(Reason.TLS_NOT_YET_VALID)


@pytest.mark.parametrize(
    "reason",
    [
        Reason.OK,
        Reason.TLS_NO_IDENTITY,
        Reason.AUTHN_PLAINTEXT,
        Reason.AUTHN_DISABLED,
        Reason.AUTHZ_DENIED,
        Reason.AUTHZ_REVOKED,
        Reason.LIMIT_CONNECTIONS,
        Reason.LIMIT_QUEUE_TIMEOUT,
        Reason.LIMIT_HOST,
        Reason.BREAKER_OPEN,
        Reason.DRAIN,
        Reason.ADMIN_KILLED,
        Reason.PEER_RST,
        Reason.INTERNAL,
    ],
)
def test_policy_limits_drain_the_client_and_our_own_faults_do_not(reason: Reason) -> None:
    assert not counts_against_endpoint(reason)
    assert not is_endpoints_fault(reason)


class BreakerLife(RuleBasedStateMachine):
    """Attempts that overlap in every way, each judged by the state in which it was admitted."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.dice = random.Random(1)
        self.breaker = Breaker(BreakerSettings(failures=3))
        self.running: list[BreakerState] = []  # the state in which each was admitted
        self.in_a_row = 0

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.5, 3.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def somebody_asks(self) -> None:
        state, allowed = self.breaker.state(self.now), self.breaker.allows(self.now)
        assert self.breaker.admit(self.now) is allowed
        assert allowed or state is not BreakerState.CLOSED
        assert not allowed or state is not BreakerState.OPEN
        if allowed:
            self.running.append(state)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from(["succeeded", "failed", "abandoned"]))
    def one_ends(self, data: st.DataObject, outcome: str) -> None:
        begun = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        before = self.breaker.state(self.now)
        if outcome == "failed":
            self.breaker.failed(self.now, self.dice)
        else:
            getattr(self.breaker, outcome)(self.now)
        after = self.breaker.state(self.now)
        if begun is BreakerState.HALF_OPEN:
            ends = {"succeeded": BreakerState.CLOSED, "failed": BreakerState.OPEN, "abandoned": BreakerState.HALF_OPEN}
            assert after is ends[outcome]
            self.in_a_row = 0
        elif before is BreakerState.CLOSED:
            self.in_a_row = {"succeeded": 0, "failed": self.in_a_row + 1, "abandoned": self.in_a_row}[outcome]
            assert after is (BreakerState.OPEN if self.in_a_row >= 3 else BreakerState.CLOSED)
        else:
            assert after is before

    @invariant()
    def never_more_than_one_probe_and_never_beside_others(self) -> None:
        if BreakerState.HALF_OPEN in self.running:
            assert self.running == [BreakerState.HALF_OPEN]

    @invariant()
    def the_open_time_stays_within_its_bounds(self) -> None:
        assert 0.0 <= self.breaker.open_for(self.now) <= 60.0 * 1.5

    @invariant()
    def it_never_stays_shut(self) -> None:
        if not self.running:
            assert self.breaker.allows(self.now + self.breaker.open_for(self.now))


TestBreakerLife = BreakerLife.TestCase
