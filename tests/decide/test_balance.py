import random
from collections import Counter
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from meshnet.decide.balance import Balancer
from meshnet.model.address import Address
from meshnet.model.service import Balance, Endpoint

SEEDS = st.integers(0, 2**32)
WEIGHTS = st.integers(1, 20)

Endpoints = tuple[Endpoint, ...]


def endpoint(name: int, weight: int = 1) -> Endpoint:
    return Endpoint(address=Address(f"10.0.{name >> 8}.{name & 255}", 80), weight=weight)


def weighing(*weights: int) -> Endpoints:
    return tuple(endpoint(name, weight) for name, weight in enumerate(weights))


def number(one: Endpoint) -> int:
    _, _, high, low = one.address.host.split(".")
    return int(high) << 8 | int(low)


class Loads:
    """What the balancer asks of each endpoint: its connections, or None where it may not be tried."""

    def __init__(self, loads: list[int | None]) -> None:
        self.loads = loads
        self.asked = 0

    def __call__(self, one: Endpoint) -> int | None:
        self.asked += 1
        return self.loads[number(one)]


def idle(_: Endpoint) -> int | None:
    return 0


def among(endpoints: Endpoints, *names: str) -> Loads:
    """Only the named may be tried."""
    return Loads([0 if chr(ord("a") + number(one)) in names else None for one in endpoints])


def least(endpoints: Endpoints, loads: list[int | None], seed: int = 0) -> Endpoint | None:
    return Balancer().pick(Balance.LEAST_CONN, endpoints, Loads(loads), random.Random(seed))


def rounds(balancer: Balancer, endpoints: Endpoints, picks: int, *names: str) -> str:
    """The picks as letters: a for the first endpoint, b for the second. If there are `names`, of those only."""
    load = among(endpoints, *names) if names else idle
    chosen = [balancer.pick(Balance.ROUND_ROBIN, endpoints, load, random.Random(0)) for _ in range(picks)]
    return "".join(chr(ord("a") + number(one)) for one in chosen if one is not None)


LOADS = st.tuples(st.none() | st.integers(0, 8), st.integers(0, 4))
KINDS = st.sampled_from(Balance)


@given(KINDS, st.lists(LOADS, min_size=1, max_size=60), SEEDS)
def test_one_is_picked_whenever_one_may_be_and_only_such_a_one(
    kind: Balance, known: list[tuple[int | None, int]], seed: int
) -> None:
    endpoints, loads = weighing(*(weight for _, weight in known)), [load for load, _ in known]
    willing = {one for one in endpoints if one.weight and loads[number(one)] is not None}
    balancer, dice = Balancer(), random.Random(seed)
    for _ in range(5):
        chosen = balancer.pick(kind, endpoints, Loads(loads), dice)
        assert chosen in willing if willing else chosen is None


@given(KINDS, st.integers(0, 2999), SEEDS)
def test_the_only_one_of_thousands_is_found_and_at_once_when_it_changes(kind: Balance, name: int, seed: int) -> None:
    endpoints, loads = THOUSANDS, Loads([None] * len(THOUSANDS))
    balancer, dice = Balancer(), random.Random(seed)
    assert balancer.pick(kind, endpoints, loads, dice) is None
    loads.loads[name] = 3
    assert balancer.pick(kind, endpoints, loads, dice) is endpoints[name]
    loads.loads[name] = None
    assert balancer.pick(kind, endpoints, loads, dice) is None


THOUSANDS = weighing(*[1] * 3000)


@given(KINDS, SEEDS)
def test_as_long_as_most_will_do_few_are_asked_however_many_there_are(kind: Balance, seed: int) -> None:
    dice = random.Random(seed)
    loads = Loads([None if dice.random() < 0.3 else 1 for _ in THOUSANDS])
    balancer = Balancer()
    for _ in range(50):
        loads.asked = 0
        assert balancer.pick(kind, THOUSANDS, loads, dice) is not None
        assert loads.asked <= 32


@given(st.lists(LOADS, min_size=1, max_size=8), SEEDS)
def test_least_conn_never_picks_an_endpoint_that_another_beats(known: list[tuple[int | None, int]], seed: int) -> None:
    endpoints = weighing(*(weight for _, weight in known))
    scores = {
        one: Fraction(load + 1, one.weight)
        for one, (load, _) in zip(endpoints, known, strict=True)
        if load is not None and one.weight
    }
    chosen = least(endpoints, [load for load, _ in known], seed)
    assert scores[chosen] == min(scores.values()) if chosen else not scores


def test_least_conn_gives_a_heavier_endpoint_more_while_both_are_idle() -> None:
    endpoints = weighing(1, 3)
    assert least(endpoints, [0, 1]) is endpoints[1]


def test_least_conn_shares_evenly_among_equals() -> None:
    dice = random.Random(7)
    balancer, endpoints = Balancer(), weighing(1, 1, 1)
    seen = Counter(balancer.pick(Balance.LEAST_CONN, endpoints, idle, dice) for _ in range(3000))
    assert len(seen) == 3
    assert min(seen.values()) > 900


@given(st.lists(st.none() | st.integers(0, 50), min_size=9, max_size=40), SEEDS)
def test_among_many_the_better_of_two_different_ones_is_taken(loads: list[int | None], seed: int) -> None:
    willing = [load for load in loads if load is not None]
    endpoints = weighing(*[1] * len(loads))
    chosen = least(endpoints, loads, seed)
    if len(willing) > 1 and willing.count(max(willing)) == 1:
        assert chosen is not endpoints[loads.index(max(willing))]


def test_among_many_everyone_gets_its_turn() -> None:
    dice = random.Random(7)
    balancer, endpoints = Balancer(), weighing(*[1] * 20)
    seen = Counter(balancer.pick(Balance.LEAST_CONN, endpoints, idle, dice) for _ in range(4000))
    assert len(seen) == 20
    assert min(seen.values()) > 120


def test_among_many_who_must_not_be_tried_leaves_its_share_to_all_the_others_alike() -> None:
    dice = random.Random(7)
    endpoints, loads = weighing(*[1] * 20), Loads([0, None] * 10)
    seen = Counter(Balancer().pick(Balance.LEAST_CONN, endpoints, loads, dice) for _ in range(4000))
    assert len(seen) == 10
    assert min(seen.values()) > 300


def test_round_robin_is_smooth() -> None:
    assert rounds(Balancer(), weighing(5, 1, 1), 14) == "abaacaa" * 2


def test_round_robin_without_weights_goes_round() -> None:
    assert rounds(Balancer(), weighing(1, 1, 1), 7) == "abcabca"


@given(st.lists(WEIGHTS, min_size=1, max_size=6), st.integers(1, 3))
def test_round_robin_keeps_to_the_weights_exactly_in_every_round(weights: list[int], times: int) -> None:
    balancer, endpoints = Balancer(), weighing(*weights)
    for _ in range(times):
        seen = Counter(rounds(balancer, endpoints, sum(weights)))
        assert [seen[chr(ord("a") + name)] for name in range(len(weights))] == weights


@given(st.lists(WEIGHTS, min_size=2, max_size=12))
def test_round_robin_is_never_a_whole_turn_ahead_of_a_weight_or_behind_it(weights: list[int]) -> None:
    seen, total = Counter[str](), sum(weights)
    for count, one in enumerate(rounds(Balancer(), weighing(*weights), 2 * total), start=1):
        seen[one] += 1
        for name, weight in enumerate(weights):
            assert abs(seen[chr(ord("a") + name)] - Fraction(count * weight, total)) < 1


@given(st.lists(WEIGHTS, min_size=2, max_size=12))
def test_round_robin_is_the_plain_definition(weights: list[int]) -> None:
    """Of those who are not ahead of their share the one who would be first to fall a turn behind."""
    total, turns = sum(weights), [0] * len(weights)
    plain = ""
    for clock in range(2 * total):
        begun = [name for name, weight in enumerate(weights) if turns[name] * total <= clock * weight]
        first = min(begun, key=lambda name: (Fraction(turns[name] + 1, weights[name]), -weights[name], name))
        turns[first] += 1
        plain += chr(ord("a") + first)
    counts = [Counter(plain[:end]) for end in range(len(plain))]
    fast = rounds(Balancer(), weighing(*weights), 2 * total)
    # Rounding may turn two round whose periods end at once.
    assert all((Counter(fast[:end]) - counts[end]).total() <= len(weights) // 2 for end in range(len(plain)))


def test_round_robin_among_thousands_goes_round_across_a_change_of_all_of_them() -> None:
    balancer, dice = Balancer(), random.Random(0)
    first = [balancer.pick(Balance.ROUND_ROBIN, THOUSANDS, idle, dice) for _ in range(1000)]
    again = weighing(*[1] * len(THOUSANDS))
    assert again is not THOUSANDS
    rest = [balancer.pick(Balance.ROUND_ROBIN, again, idle, dice) for _ in range(2000)]
    assert set(first) | set(rest) == set(THOUSANDS)


@given(st.lists(WEIGHTS, min_size=2, max_size=6), SEEDS)
def test_while_some_are_out_the_others_share_by_their_weights(weights: list[int], seed: int) -> None:
    names = [chr(ord("a") + name) for name in range(len(weights))]
    left = random.Random(seed).sample(names, max(1, len(names) // 2))
    among_them = sum(weights[names.index(name)] for name in left)
    balancer, endpoints = Balancer(), weighing(*weights)
    seen = Counter(rounds(balancer, endpoints, 20 * among_them, *left))
    for name in left:
        assert abs(seen[name] - 20 * weights[names.index(name)]) <= among_them


def test_an_endpoint_that_was_away_is_not_made_up_to() -> None:
    balancer, endpoints = Balancer(), weighing(1, 1, 1)
    rounds(balancer, endpoints, 1)
    rounds(balancer, endpoints, 100, "a", "b")
    assert rounds(balancer, endpoints, 6).count("c") <= 3


def test_endpoints_that_were_alone_for_long_have_not_lost_their_turn_when_a_heavy_one_is_back() -> None:
    balancer, endpoints = Balancer(), weighing(1000, 1, 1)
    rounds(balancer, endpoints, 500, "b", "c")
    assert set(rounds(balancer, endpoints, 1100)) == {"a", "b", "c"}
    assert Counter(rounds(balancer, endpoints, 10020))["a"] >= 9990


HISTORY = st.lists(
    st.lists(st.tuples(st.integers(0, 5), WEIGHTS), min_size=2, max_size=5, unique_by=lambda one: one[0]), max_size=30
)


@given(HISTORY, st.lists(WEIGHTS, min_size=2, max_size=5))
def test_whatever_came_and_went_before_the_weights_hold_soon_again(
    history: list[list[tuple[int, int]]], weights: list[int]
) -> None:
    balancer = Balancer()
    for moment in history:
        endpoints = tuple(endpoint(name, weight) for name, weight in moment)
        assert balancer.pick(Balance.ROUND_ROBIN, endpoints, idle, random.Random(0)) in endpoints
    endpoints, total = weighing(*weights), sum(weights)
    rounds(balancer, endpoints, len(weights) * total)
    seen = Counter(rounds(balancer, endpoints, total))
    for name, weight in enumerate(weights):
        assert abs(seen[chr(ord("a") + name)] - weight) <= 1


def test_a_heavy_endpoint_made_light_is_not_left_out_for_what_it_had_before() -> None:
    balancer = Balancer()
    rounds(balancer, weighing(1000, 1), 400)
    assert set(rounds(balancer, weighing(1, 1), 6)) == {"a", "b"}
