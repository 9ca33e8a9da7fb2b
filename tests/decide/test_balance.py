import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from meshnet.decide.balance import Balancer, Candidate
from meshnet.model.address import Address
from meshnet.model.service import Balance, Endpoint

SEEDS = st.integers(0, 2**32)
WEIGHTS = st.integers(1, 20)


def endpoint(name: int, weight: int = 1) -> Endpoint:
    return Endpoint(address=Address(f"10.0.0.{name}", 80), weight=weight)


def candidates(*weights: int) -> list[Candidate]:
    return [Candidate(endpoint(name, weight), 0, 0) for name, weight in enumerate(weights)]


def rounds(balancer: Balancer, among: list[Candidate], picks: int) -> str:
    """The picks as letters: a for the first candidate's address, b for the second's."""
    chosen = [balancer.pick(Balance.ROUND_ROBIN, among, random.Random(0)) for _ in range(picks)]
    return "".join(chr(ord("a") + int(one.address.host.rpartition(".")[2])) for one in chosen)


LOADS = st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 4))


@given(st.lists(LOADS, min_size=1, max_size=8), SEEDS)
def test_least_conn_never_picks_an_endpoint_that_another_beats(loads: list[tuple[int, int, int]], seed: int) -> None:
    among = [Candidate(endpoint(name, weight), opened, pending) for name, (opened, pending, weight) in enumerate(loads)]
    chosen = Balancer().pick(Balance.LEAST_CONN, among, random.Random(seed))
    scores = {one.endpoint.address: (one.open + one.pending + 1) / one.endpoint.weight for one in among}
    assert scores[chosen.address] == min(scores.values())


def test_least_conn_counts_connections_that_are_still_being_dialled() -> None:
    among = [Candidate(endpoint(0), 2, 0), Candidate(endpoint(1), 0, 3)]
    assert Balancer().pick(Balance.LEAST_CONN, among, random.Random(0)) == endpoint(0)


def test_least_conn_gives_a_heavier_endpoint_more_while_both_are_idle() -> None:
    among = [Candidate(endpoint(0, 1), 0, 0), Candidate(endpoint(1, 3), 1, 0)]
    assert Balancer().pick(Balance.LEAST_CONN, among, random.Random(0)) == endpoint(1, 3)


def test_least_conn_shares_evenly_among_equals() -> None:
    dice = random.Random(7)
    balancer, among = Balancer(), candidates(1, 1, 1)
    seen = Counter(balancer.pick(Balance.LEAST_CONN, among, dice).address for _ in range(3000))
    assert len(seen) == 3
    assert min(seen.values()) > 900


@given(st.lists(st.integers(0, 50), min_size=9, max_size=40), SEEDS)
def test_among_many_the_better_of_two_different_ones_is_taken(loads: list[int], seed: int) -> None:
    among = [Candidate(endpoint(name), opened, 0) for name, opened in enumerate(loads)]
    chosen = Balancer().pick(Balance.LEAST_CONN, among, random.Random(seed))
    worst = max(loads)
    if loads.count(worst) == 1:
        assert chosen != endpoint(loads.index(worst))


def test_among_many_everyone_gets_its_turn() -> None:
    dice = random.Random(7)
    balancer, among = Balancer(), candidates(*[1] * 20)
    seen = Counter(balancer.pick(Balance.LEAST_CONN, among, dice).address for _ in range(4000))
    assert len(seen) == 20
    assert min(seen.values()) > 120


def test_round_robin_is_smooth() -> None:
    assert rounds(Balancer(), candidates(5, 1, 1), 14) == "aabacaa" * 2


def test_round_robin_without_weights_goes_round() -> None:
    assert rounds(Balancer(), candidates(1, 1, 1), 7) == "abcabca"


@given(st.lists(WEIGHTS, min_size=1, max_size=6), st.integers(1, 3))
def test_round_robin_keeps_to_the_weights_exactly_in_every_round(weights: list[int], times: int) -> None:
    balancer, among = Balancer(), candidates(*weights)
    for _ in range(times):
        seen = Counter(rounds(balancer, among, sum(weights)))
        assert [seen[chr(ord("a") + name)] for name in range(len(weights))] == weights


@given(st.lists(WEIGHTS, min_size=2, max_size=6))
def test_round_robin_never_runs_more_than_one_pick_ahead_of_a_weight(weights: list[int]) -> None:
    seen, total = Counter[str](), sum(weights)
    for count, one in enumerate(rounds(Balancer(), candidates(*weights), 2 * total), start=1):
        seen[one] += 1
        assert seen[one] * total < count * weights[ord(one) - ord("a")] + total


def test_an_endpoint_that_was_away_is_not_made_up_to() -> None:
    balancer, all_three = Balancer(), candidates(1, 1, 1)
    rounds(balancer, all_three, 1)
    rounds(balancer, all_three[:2], 100)
    assert rounds(balancer, all_three, 6).count("c") <= 3


HISTORY = st.lists(
    st.lists(st.tuples(st.integers(0, 5), WEIGHTS), min_size=2, max_size=5, unique_by=lambda one: one[0]), max_size=30
)


@given(HISTORY, st.lists(WEIGHTS, min_size=2, max_size=5))
def test_whatever_came_and_went_before_the_weights_hold_soon_again(
    history: list[list[tuple[int, int]]], weights: list[int]
) -> None:
    balancer = Balancer()
    for moment in history:
        among = [Candidate(endpoint(name, weight), 0, 0) for name, weight in moment]
        assert balancer.pick(Balance.ROUND_ROBIN, among, random.Random(0)) in {one.endpoint for one in among}
    among, total = candidates(*weights), sum(weights)
    rounds(balancer, among, len(weights) * total)
    seen = Counter(rounds(balancer, among, total))
    for name, weight in enumerate(weights):
        assert abs(seen[chr(ord("a") + name)] - weight) <= 1


def test_a_heavy_endpoint_made_light_is_not_left_out_for_what_it_had_before() -> None:
    balancer = Balancer()
    rounds(balancer, candidates(1000, 1), 400)
    assert set(rounds(balancer, candidates(1, 1), 6)) == {"a", "b"}


def test_endpoints_that_are_gone_for_good_are_forgotten() -> None:
    balancer = Balancer()
    for generation in range(0, 200, 2):
        pair = [Candidate(endpoint(generation + one), 0, 0) for one in range(2)]
        balancer.pick(Balance.ROUND_ROBIN, pair, random.Random(0))
    assert len(balancer._credit) <= 24
