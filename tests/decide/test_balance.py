import functools
import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from meshnet.decide.balance import Balancer
from meshnet.model.address import Address
from meshnet.model.service import Balance, Endpoint, Locality, LocalitySettings, Traffic

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

    def __init__(
        self,
        loads: list[int | None],
        *,
        warmths: list[float] | None = None,
        times: Sequence[float | None] | None = None,
    ) -> None:
        self.loads = loads
        self.warming = warmths is not None
        self.asked = 0
        self._warmths, self._times = warmths, times

    def __call__(self, one: Endpoint) -> int | None:
        self.asked += 1
        return self.loads[number(one)]

    def warmth(self, one: Endpoint) -> float:
        return self._warmths[number(one)] if self._warmths else 1.0

    def connect_time(self, one: Endpoint) -> float | None:
        return self._times[number(one)] if self._times else None


class Idle(Loads):
    def __call__(self, _: Endpoint) -> int | None:
        return 0


idle = Idle([])


def pick(
    balancer: Balancer, kind: Balance, endpoints: Endpoints, load: Loads, dice: random.Random, source: str | None = None
) -> Endpoint | None:
    return balancer.pick(
        Traffic(balance=kind), endpoints, load, dice, source=lambda: str(dice.random()) if source is None else source
    )


def among(endpoints: Endpoints, *names: str) -> Loads:
    """Only the named may be tried."""
    return Loads([0 if chr(ord("a") + number(one)) in names else None for one in endpoints])


def least(endpoints: Endpoints, loads: list[int | None], seed: int = 0) -> Endpoint | None:
    return pick(Balancer(), Balance.LEAST_CONN, endpoints, Loads(loads), random.Random(seed))


def rounds(balancer: Balancer, endpoints: Endpoints, picks: int, *names: str) -> str:
    """The picks as letters: a for the first endpoint, b for the second. If there are `names`, of those only."""
    load = among(endpoints, *names) if names else idle
    chosen = [pick(balancer, Balance.ROUND_ROBIN, endpoints, load, random.Random(0)) for _ in range(picks)]
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
        chosen = pick(balancer, kind, endpoints, Loads(loads), dice)
        assert chosen in willing if willing else chosen is None


@given(KINDS, st.integers(0, 2999), SEEDS)
def test_the_only_one_of_thousands_is_found_and_at_once_when_it_changes(kind: Balance, name: int, seed: int) -> None:
    endpoints, loads = THOUSANDS, Loads([None] * len(THOUSANDS))
    balancer, dice = of_thousands(kind), random.Random(seed)
    assert pick(balancer, kind, endpoints, loads, dice) is None
    loads.loads[name] = 3
    assert pick(balancer, kind, endpoints, loads, dice) is endpoints[name]
    loads.loads[name] = None
    assert pick(balancer, kind, endpoints, loads, dice) is None


THOUSANDS = weighing(*[1] * 3000)


@functools.cache
def of_thousands(_: Balance) -> Balancer:
    """One for all examples: for Maglev it has a large table to make."""
    return Balancer()


@given(KINDS, SEEDS)
def test_as_long_as_most_will_do_few_are_asked_however_many_there_are(kind: Balance, seed: int) -> None:
    dice = random.Random(seed)
    loads = Loads([None if dice.random() < 0.3 else 1 for _ in THOUSANDS])
    balancer = of_thousands(kind)
    for _ in range(50):
        loads.asked = 0
        assert pick(balancer, kind, THOUSANDS, loads, dice) is not None
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
    seen = Counter(pick(balancer, Balance.LEAST_CONN, endpoints, idle, dice) for _ in range(3000))
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
    seen = Counter(pick(balancer, Balance.LEAST_CONN, endpoints, idle, dice) for _ in range(4000))
    assert len(seen) == 20
    assert min(seen.values()) > 120


def test_among_many_who_must_not_be_tried_leaves_its_share_to_all_the_others_alike() -> None:
    dice = random.Random(7)
    endpoints, loads = weighing(*[1] * 20), Loads([0, None] * 10)
    seen = Counter(pick(Balancer(), Balance.LEAST_CONN, endpoints, loads, dice) for _ in range(4000))
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
    first = [pick(balancer, Balance.ROUND_ROBIN, THOUSANDS, idle, dice) for _ in range(1000)]
    again = weighing(*[1] * len(THOUSANDS))
    assert again is not THOUSANDS
    rest = [pick(balancer, Balance.ROUND_ROBIN, again, idle, dice) for _ in range(2000)]
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
        assert pick(balancer, Balance.ROUND_ROBIN, endpoints, idle, random.Random(0)) in endpoints
    endpoints, total = weighing(*weights), sum(weights)
    rounds(balancer, endpoints, len(weights) * total)
    seen = Counter(rounds(balancer, endpoints, total))
    for name, weight in enumerate(weights):
        assert abs(seen[chr(ord("a") + name)] - weight) <= 1


def test_a_heavy_endpoint_made_light_is_not_left_out_for_what_it_had_before() -> None:
    balancer = Balancer()
    rounds(balancer, weighing(1000, 1), 400)
    assert set(rounds(balancer, weighing(1, 1), 6)) == {"a", "b"}


def test_among_equals_the_nearer_is_the_likelier_and_nobody_is_left_out() -> None:
    endpoints, dice = weighing(1, 1, 1, 1), random.Random(7)
    near = Loads([0, 0, 0, 0], times=[0.04, 0.01, 0.0001, 0.0])  # what is below a millisecond is alike
    seen = Counter(pick(Balancer(), Balance.LEAST_CONN, endpoints, near, dice) for _ in range(8500))
    assert [round(seen[one] / 4000, 1) for one in endpoints] == [0, 0.1, 1, 1]
    assert seen[endpoints[0]] > 60
    # Fewer connections come first all the same.
    assert (
        pick(Balancer(), Balance.LEAST_CONN, endpoints, Loads([1, 1, 1, 0], times=[0, 0, 0, 9]), dice) is endpoints[3]
    )


@given(st.lists(st.floats(0.0001, 2), max_size=7), st.integers(0, 7), SEEDS)
def test_among_equals_one_that_never_came_up_gets_an_even_share_however_near_the_others(
    times: list[float], place: int, seed: int
) -> None:
    others: list[float | None] = [*times]
    others.insert(place, None)
    endpoints, load, dice = weighing(*[1] * len(others)), Loads([0] * len(others), times=others), random.Random(seed)
    refuser = endpoints[others.index(None)]
    won = sum(pick(Balancer(), Balance.LEAST_CONN, endpoints, load, dice) is refuser for _ in range(1000))
    assert abs(won - 1000 / len(others)) < 80  # five deviations


def test_among_many_equals_one_that_never_came_up_gets_an_even_share() -> None:
    endpoints, dice = weighing(*[1] * 20), random.Random(7)
    load = Loads([0] * 20, times=[None, *[0.05] * 19])
    won = sum(pick(Balancer(), Balance.LEAST_CONN, endpoints, load, dice) is endpoints[0] for _ in range(4000))
    assert 150 < won < 250


def test_among_many_equals_the_nearer_of_two_is_the_likelier() -> None:
    endpoints, dice = weighing(*[1] * 20), random.Random(7)
    near = Loads([0] * 20, times=[0.001] * 10 + [0.1] * 10)
    seen = Counter(pick(Balancer(), Balance.LEAST_CONN, endpoints, near, dice) for _ in range(4000))
    assert sum(seen[one] for one in endpoints[:10]) > 2700  # all but pairs of two far ones
    assert min(seen.values()) > 50


@given(st.sampled_from([Balance.LEAST_CONN, Balance.ROUND_ROBIN, Balance.RANDOM]), st.sampled_from([0.1, 0.3, 0.6]))
def test_who_is_warming_gets_a_part_of_its_share(kind: Balance, warmth: float) -> None:
    balancer, endpoints, dice = Balancer(), weighing(*[1] * 4), random.Random(7)
    counts: list[int | None] = [0, 0, 0, 0]
    load = Loads(counts, warmths=[warmth, 1.0, 1.0, 1.0])
    for _ in range(4000):
        chosen = pick(balancer, kind, endpoints, load, dice)
        assert chosen is not None
        counts[number(chosen)] = (counts[number(chosen)] or 0) + 1
    cold, *others = (count or 0 for count in counts)
    assert abs(cold / (sum(others) / 3) - warmth) < 0.12


def test_random_keeps_to_the_weights() -> None:
    balancer, endpoints, dice = Balancer(), weighing(1, 0, 3, 6), random.Random(7)
    seen = Counter(pick(balancer, Balance.RANDOM, endpoints, idle, dice) for _ in range(10000))
    assert [round(seen[one] / 1000) for one in endpoints] == [1, 0, 3, 6]


def test_first_fills_one_after_the_other_and_comes_back_to_what_has_room_again() -> None:
    balancer, endpoints, dice = Balancer(), weighing(*[1] * 5), random.Random(7)
    loads = Loads([0, 0, 0, 0, 0])
    assert [number(pick(balancer, Balance.FIRST, endpoints, loads, dice) or endpoints[4]) for _ in range(3)] == [
        0,
        0,
        0,
    ]
    loads.loads[:2] = [None, None]
    assert pick(balancer, Balance.FIRST, endpoints, loads, dice) is endpoints[2]
    loads.loads[0] = 7
    assert pick(balancer, Balance.FIRST, endpoints, loads, dice) is endpoints[0]


@given(st.lists(WEIGHTS, min_size=2, max_size=12), SEEDS)
def test_maglev_gives_a_source_its_own_endpoint_whatever_order_they_are_listed_in(
    weights: list[int], seed: int
) -> None:
    endpoints, dice = weighing(*weights), random.Random(seed)
    shuffled = tuple(random.Random(seed).sample(endpoints, len(endpoints)))
    one, other = Balancer(), Balancer()
    for name in range(20):
        chosen = pick(one, Balance.MAGLEV, endpoints, idle, dice, f"10.1.0.{name}")
        assert pick(other, Balance.MAGLEV, shuffled, idle, dice, f"10.1.0.{name}") is chosen


def test_maglev_keeps_to_the_weights_and_moves_few_sources_when_one_goes() -> None:
    endpoints, dice = weighing(1, 1, 2, 4), random.Random(7)
    whole, less = Balancer(), Balancer()
    before = [pick(whole, Balance.MAGLEV, endpoints, idle, dice, str(name)) for name in range(4000)]
    seen = Counter(before)
    assert [round(seen[one] / 500) for one in endpoints] == [1, 1, 2, 4]
    rest = endpoints[1:]
    after = [pick(less, Balance.MAGLEV, rest, idle, dice, str(name)) for name in range(4000)]
    moved = sum(was is not endpoints[0] and was is not now for was, now in zip(before, after, strict=True))
    assert moved < 4000 * 0.2
    out = Loads([None, 0, 0, 0])  # ejected, not gone: nobody else moves at all
    during = [pick(whole, Balance.MAGLEV, endpoints, out, dice, str(name)) for name in range(4000)]
    assert all(was is now for was, now in zip(before, during, strict=True) if was is not endpoints[0])
    assert len({now for was, now in zip(before, during, strict=True) if was is endpoints[0]}) == 3


HERE = Locality(zone="a", region="north")


def placed(*places: tuple[str, str]) -> Endpoints:
    return tuple(
        Endpoint(address=Address(f"10.0.0.{name}", 80), locality=Locality(zone=zone, region=region))
        for name, (zone, region) in enumerate(places)
    )


NEAR_AND_FAR = placed(*[("a", "north")] * 4, *[("b", "north")] * 4, *[("a", "south")] * 2, *[("", "")] * 2)


def near_shares(loads: list[int | None], *, strict: bool = False) -> tuple[float, float, float]:
    """The parts that zone, region and all others get, of who is in zone a of the north."""
    balancer, dice, load = Balancer(), random.Random(7), Loads(loads)
    traffic = Traffic(locality=LocalitySettings(strict=strict))
    seen = Counter(balancer.pick(traffic, NEAR_AND_FAR, load, dice, here=HERE, now=float(turn)) for turn in range(2000))
    parts = (NEAR_AND_FAR[:4], NEAR_AND_FAR[4:8], NEAR_AND_FAR[8:])
    zone, region, far = (round(sum(seen[one] for one in part) / 2000, 1) for part in parts)
    return zone, region, far


def test_the_own_zone_comes_first_as_long_as_it_can_bear_it() -> None:
    assert near_shares([0] * 12) == (1, 0, 0)
    assert near_shares([0, 0, 0, None] + [0] * 8) == (1, 0, 0)  # 0.75 * 1.4 is more than enough


def test_what_the_own_zone_cannot_bear_goes_to_the_region_and_then_on() -> None:
    assert near_shares([0, 0, None, None] + [0] * 8) == (0.7, 0.3, 0)
    assert near_shares([None] * 4 + [0] * 8) == (0, 1, 0)
    zone, region, far = near_shares([0, None, None, None, 0, None, None, None, 0, 0, 0, 0])
    assert 0.3 <= zone <= 0.4  # 0.35
    assert 0.3 <= region <= 0.4
    assert far == 0.3
    assert near_shares([None] * 8 + [0] * 4) == (0, 0, 1)


def test_strict_never_leaves_the_zone() -> None:
    assert near_shares([0, None, None, None] + [0] * 8, strict=True) == (1, 0, 0)
    assert near_shares([None] * 4 + [0] * 8, strict=True) == (0, 0, 0)


def test_where_nobody_says_where_it_is_all_are_one_tier() -> None:
    balancer, dice, endpoints = Balancer(), random.Random(7), weighing(1, 1)
    seen = {balancer.pick(Traffic(), endpoints, idle, dice, here=HERE) for _ in range(50)}
    assert seen == set(endpoints)
    seen = {balancer.pick(Traffic(), NEAR_AND_FAR, Loads([0] * 12), dice) for _ in range(500)}
    assert seen == set(NEAR_AND_FAR)
