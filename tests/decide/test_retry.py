import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.decide.breaker import counts_against_endpoint
from meshnet.decide.retry import Dial, GiveUp, RetryBudget, Try, Wait, is_retryable
from meshnet.errors import Reason
from meshnet.model.service import ConnectSettings

DICE = random.Random(1)
REFUSED = Reason.CONNECT_REFUSED


def ask(
    dial: Dial,
    now: float,
    last: Reason | None = None,
    *,
    left: bool = True,
    budget: RetryBudget | None = None,
) -> Try | Wait | GiveUp:
    return dial.next(now, left, last, budget or RetryBudget(), DICE)


def empty_budget(now: float) -> RetryBudget:
    budget = RetryBudget()
    while budget.take(now):
        pass
    return budget


def test_an_attempt_may_begin_until_the_total_timeout() -> None:
    dial = Dial(ConnectSettings(), 10.0)
    assert ask(dial, 10.0) == Try()
    assert ask(dial, 14.9, Reason.CONNECT_TIMEOUT) == Try()
    assert ask(dial, 15.0, Reason.CONNECT_TIMEOUT) == GiveUp(Reason.CONNECT_TIMEOUT)


def test_a_refusal_is_followed_at_once_by_another_endpoint() -> None:
    dial = Dial(ConnectSettings(), 0.0)
    ask(dial, 0.0)
    assert ask(dial, 0.001, REFUSED) == Try()


def test_it_gives_up_after_as_many_attempts_as_set_with_the_reason_of_the_last() -> None:
    dial = Dial(ConnectSettings(attempts=2), 0.0)
    ask(dial, 0.0)
    ask(dial, 0.1, REFUSED)
    assert ask(dial, 0.2, Reason.TLS_HANDSHAKE) == GiveUp(Reason.TLS_HANDSHAKE)


def test_it_gives_up_when_the_time_is_over() -> None:
    dial = Dial(ConnectSettings(), 0.0)
    ask(dial, 0.0)
    assert ask(dial, 5.0, Reason.CONNECT_TIMEOUT) == GiveUp(Reason.CONNECT_TIMEOUT)
    assert ask(Dial(ConnectSettings(), 0.0), 5.0) == GiveUp(Reason.CONNECT_TIMEOUT)


def test_with_no_endpoint_at_all_there_is_nothing_to_wait_for() -> None:
    assert ask(Dial(ConnectSettings(), 0.0), 0.0, left=False) == GiveUp(Reason.NO_ENDPOINT)


def test_when_all_were_tried_it_pauses_and_begins_again() -> None:
    dial = Dial(ConnectSettings(), 0.0)
    ask(dial, 0.0)
    pause = ask(dial, 0.0, REFUSED, left=False)
    assert isinstance(pause, Wait)
    assert 0.025 <= pause.seconds <= 0.250
    assert ask(dial, pause.seconds, REFUSED) == Try()


def test_when_nobody_is_left_after_a_pause_it_gives_up() -> None:
    dial = Dial(ConnectSettings(), 0.0)
    ask(dial, 0.0)
    assert isinstance(ask(dial, 0.0, REFUSED, left=False), Wait)
    assert ask(dial, 0.2, REFUSED, left=False) == GiveUp(REFUSED)


def test_it_does_not_pause_beyond_the_end() -> None:
    dial = Dial(ConnectSettings(), 0.0)
    ask(dial, 0.0)
    assert ask(dial, 4.99, REFUSED, left=False) == GiveUp(REFUSED)


@pytest.mark.parametrize(
    "reason",
    [Reason.AUTHZ_DENIED, Reason.AUTHN_DISABLED, Reason.TLS_NO_IDENTITY, Reason.PEER_RST, Reason.LOOP, Reason.INTERNAL],
)
def test_policy_the_client_and_our_own_faults_are_not_retried(reason: Reason) -> None:
    dial = Dial(ConnectSettings(), 0.0)
    ask(dial, 0.0)
    assert not is_retryable(reason)
    assert ask(dial, 0.1, reason) == GiveUp(reason)
    assert ask(dial, 0.1, reason, left=False) == GiveUp(reason)


def test_an_endpoint_that_drains_or_is_full_is_left_for_another_but_not_blamed() -> None:
    for reason in (Reason.DRAIN, Reason.LIMIT_CONNECTIONS, Reason.LIMIT_HOST):
        assert is_retryable(reason)
        assert not counts_against_endpoint(reason)


def test_an_empty_budget_forbids_retries_but_no_first_attempt() -> None:
    budget = empty_budget(0.0)
    dial = Dial(ConnectSettings(), 0.0)
    assert ask(dial, 0.0, budget=budget) == Try()
    assert ask(dial, 0.1, REFUSED, budget=budget) == GiveUp(REFUSED, denied=True)


def test_a_quiet_service_gets_three_retries_a_second() -> None:
    budget = empty_budget(0.0)
    retries = sum(budget.take(tick / 10) for tick in range(1, 1001))
    assert 285 <= retries <= 300


def test_a_busy_service_gets_a_fifth_of_its_connects() -> None:
    budget = RetryBudget()
    taken = 0
    for tick in range(100_000):
        now = tick / 1000
        budget.dialled(now)
        if tick >= 50_000:  # by now the count of recent connects is steady
            taken += budget.take(now)
    assert taken / 50_000 == pytest.approx(0.2, abs=0.05)


@given(st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=200))
def test_the_budget_never_gives_more_than_its_burst_and_its_rate(moments: list[tuple[float, bool]]) -> None:
    budget, now, connects, retries = RetryBudget(), 0.0, 0, 0
    for seconds, retry in moments:
        now += seconds
        if retry:
            retries += budget.take(now)
        else:
            connects += 1
            budget.dialled(now)
    assert retries <= 30 + 3 * now + 0.2 * connects


@given(st.data(), st.integers(1, 5), st.integers(0, 2**32))
def test_every_plan_ends_in_time_and_within_its_attempts(data: st.DataObject, attempts: int, seed: int) -> None:
    settings, budget, dice = ConnectSettings(attempts=attempts), RetryBudget(), random.Random(seed)
    dial, now, last, tries, waits = Dial(settings, 0.0), 0.0, None, 0, 0
    while True:
        step = dial.next(now, data.draw(st.booleans()), last, budget, dice)
        if isinstance(step, GiveUp):
            assert step.reason is (last or Reason.NO_ENDPOINT)
            break
        if isinstance(step, Wait):
            waits += 1
            now += step.seconds
            continue
        tries += 1
        assert now < settings.total_timeout
        now = data.draw(st.floats(now, min(now + settings.attempt_timeout, settings.total_timeout)))
        last = data.draw(st.sampled_from([REFUSED, Reason.CONNECT_TIMEOUT, Reason.DRAIN]))
    assert tries <= attempts
    assert waits <= tries
    assert now <= settings.total_timeout


def test_attempts_that_were_made_elsewhere_count() -> None:
    dial = Dial(ConnectSettings(attempts=2), 0.0, tried=1)
    assert ask(dial, 0.0, last=Reason.CONNECT_REFUSED) == Try()
    assert ask(dial, 0.0, last=Reason.CONNECT_REFUSED) == GiveUp(Reason.CONNECT_REFUSED)
