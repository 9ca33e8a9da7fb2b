"""One rule for each kind, and what answers say of kinds: no kernel is asked."""

from hypothesis import given
from hypothesis import strategies as st

from meshnet_init.backends.nft_expressions import module_of
from meshnet_init.backends.nft_expressions import parts_of as parts_for_nft
from meshnet_init.kind import Answer, lacking, samples
from meshnet_init.render import parts_of
from meshnet_init.rule import CHAIN_OUT, Rule
from meshnet_init.values import Ports
from tests.init.test_render import PLANS


def test_a_thousand_rules_of_one_kind_are_asked_for_once() -> None:
    rules = [Rule(chain=CHAIN_OUT, ports=Ports(port, port), redirect=15101) for port in range(1, 1000)]
    assert samples(rules, parts_of) == (rules[0],)


def test_each_part_of_a_plan_is_in_a_sample_of_its_family_and_table() -> None:
    for plan in PLANS.values():
        for family in ("ipv4", "ipv6"):
            rules = plan.of_family(family)
            for parts in (parts_of, parts_for_nft):
                sampled = samples(rules, parts)
                told = {part for rule in sampled for part in parts(rule)}
                assert told == {part for rule in rules for part in parts(rule)} - {"meta skuid"}
                assert {rule.chain.rpartition("_")[0] for rule in sampled} == {
                    rule.chain.rpartition("_")[0] for rule in rules
                }


def test_whose_connections_they_are_about_is_not_asked_for() -> None:
    for rule in (Rule(chain=CHAIN_OUT, uid=7, why="x"), Rule(chain=CHAIN_OUT, gid=9), Rule(chain=CHAIN_OUT, gid=0)):
        assert samples([rule], parts_of) == (Rule(chain=CHAIN_OUT, gid=0),)


PARTS = st.sampled_from("abcdef")


@given(st.lists(st.frozensets(PARTS, min_size=1), max_size=8), st.frozensets(PARTS))
def test_what_a_kernel_lacks_is_always_named(asked: list[frozenset[str]], lacks: frozenset[str]) -> None:
    """All of what it lacks that was asked for; beside it only what nothing it took has."""
    found = lacking([Answer(parts, "no" if parts & lacks else "") for parts in asked])
    refused = [parts for parts in asked if parts & lacks]
    if not refused:
        assert found is None
        return
    assert found is not None
    assert found.said == "no"
    assert set(found.parts) >= frozenset[str]().union(*refused) & lacks
    assert not set(found.parts) & frozenset[str]().union(*(parts for parts in asked if not parts & lacks))


def test_a_combination_that_is_refused_is_named_whole() -> None:
    answers = [Answer({"a"}), Answer({"b"}), Answer({"a", "b"}, "not together")]
    assert lacking(answers) == Answer(["a", "b"], "not together")


def test_a_target_that_every_kernel_has_is_not_what_it_lacks() -> None:
    assert parts_of(Rule(chain=CHAIN_OUT, gid=0)) == {"-m owner"}
    assert parts_of(Rule(chain=CHAIN_OUT, gid=0, verdict="drop")) == {"-m owner", "-m tcp"}
    assert parts_of(Rule(chain=CHAIN_OUT)) == {"-j RETURN"}


def test_modules_have_the_names_that_the_kernel_gives_them() -> None:
    parts = {part for plan in PLANS.values() for rule in plan.rules for part in parts_for_nft(rule)}
    known = {"nf_tables", "nft_ct", "nft_fib_inet", "nft_queue", "nft_redir", "nft_reject_inet", "nft_socket"}
    assert {module_of(part) for part in parts} - {"nft_tproxy"} <= known
    assert module_of("chain nat") == "nft_chain_nat"
    assert module_of("table with an owner") == "nf_tables"
