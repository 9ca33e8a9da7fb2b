import ipaddress
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.decide.access import DEFAULT_ALLOW, DEFAULT_DENY, NO_ALLOW_MATCHED, AccessRules, Allow, Call, Deny
from meshnet.model.service import AccessPolicy, Action, Rule, Source, Target

WEB = "spiffe://mesh/ns/prod/sa/web"
JOB = "spiffe://mesh/ns/prod/sa/job"


def call(identity: str = WEB, *, address: str = "10.0.0.7", port: int = 80, service: str = "shop") -> Call:
    return Call(identity=identity, address=address, port=port, service=service, namespace="prod" if service else "")


def allow(name: str, *rules: Rule, services: tuple[str, ...] = ()) -> AccessPolicy:
    return AccessPolicy(name=name, action=Action.ALLOW, services=services, rules=rules)


def deny(name: str, *rules: Rule, services: tuple[str, ...] = ()) -> AccessPolicy:
    return AccessPolicy(name=name, action=Action.DENY, services=services, rules=rules)


def principals(*patterns: str) -> Rule:
    return Rule(source=Source(principals=patterns))


def decide(call: Call, *policies: AccessPolicy, default: Action = Action.ALLOW) -> Allow | Deny:
    return AccessRules(policies, default).decide(call)


def test_without_policies_the_default_of_the_mesh_decides() -> None:
    assert decide(call()) == Allow(DEFAULT_ALLOW)
    assert decide(call(), default=Action.DENY) == Deny(DEFAULT_DENY)


def test_an_allow_policy_lets_in_whom_it_names_and_nobody_else() -> None:
    policy = allow("web-only", principals(WEB))
    assert decide(call(WEB), policy) == Allow("web-only")
    assert decide(call(JOB), policy) == Deny(NO_ALLOW_MATCHED)


def test_an_allow_policy_overrides_a_default_of_deny() -> None:
    assert decide(call(WEB), allow("web-only", principals(WEB)), default=Action.DENY) == Allow("web-only")


def test_deny_wins_over_allow_wherever_it_stands() -> None:
    policies = allow("all", principals("*")), deny("no-jobs", principals(JOB))
    assert decide(call(JOB), *policies) == Deny("no-jobs")
    assert decide(call(WEB), *policies) == Allow("all")


def test_a_deny_that_does_not_match_leaves_it_to_the_default() -> None:
    assert decide(call(WEB), deny("no-jobs", principals(JOB))) == Allow(DEFAULT_ALLOW)
    assert decide(call(WEB), deny("no-jobs", principals(JOB)), default=Action.DENY) == Deny(DEFAULT_DENY)


def test_an_allow_policy_without_rules_lets_nobody_in() -> None:
    assert decide(call(), allow("lockdown")) == Deny(NO_ALLOW_MATCHED)


@pytest.mark.parametrize(
    "rule", [Rule(), Rule(source=Source()), Rule(target=Target()), Rule(source=Source(), target=Target())]
)
def test_an_empty_rule_matches_nobody(rule: Rule) -> None:
    assert decide(call(), allow("slip", rule)) == Deny(NO_ALLOW_MATCHED)
    assert decide(call(), deny("slip", rule)) == Allow(DEFAULT_ALLOW)


def test_a_rule_with_an_empty_from_matches_nobody_whatever_its_ports() -> None:
    assert decide(call(port=80), allow("slip", Rule(source=Source(), target=Target(ports=(80,))))) == Deny(
        NO_ALLOW_MATCHED
    )


def test_an_allow_for_other_ports_still_closes_this_one() -> None:
    policy = allow("http", Rule(target=Target(ports=(80,))))
    assert decide(call(port=80), policy) == Allow("http")
    assert decide(call(port=22), policy) == Deny(NO_ALLOW_MATCHED)


def test_rules_are_or_and_the_parts_of_a_rule_are_and() -> None:
    policy = allow(
        "mixed", Rule(source=Source(principals=(WEB,)), target=Target(ports=(80,))), Rule(target=Target(ports=(443,)))
    )
    assert decide(call(WEB, port=80), policy) == Allow("mixed")
    assert decide(call(JOB, port=443), policy) == Allow("mixed")
    assert decide(call(JOB, port=80), policy) == Deny(NO_ALLOW_MATCHED)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (WEB, True),
        (WEB[:-1], False),
        ("spiffe://mesh/ns/prod/*", True),
        ("spiffe://mesh/ns/test/*", False),
        ("*/sa/web", True),
        ("*/sa/job", False),
        ("*", True),
    ],
)
def test_principals_match_exactly_by_start_by_end_or_by_presence(pattern: str, matches: bool) -> None:
    expected = Deny("it") if matches else Allow(DEFAULT_ALLOW)
    assert decide(call(WEB), deny("it", principals(pattern))) == expected


def test_a_plain_text_caller_is_no_principal_at_all() -> None:
    for pattern in (WEB, "spiffe*", "*web", "*"):
        assert decide(call(""), allow("known", principals(pattern))) == Deny(NO_ALLOW_MATCHED)


def test_not_principals_takes_in_plain_text_callers() -> None:
    policy = deny("identity-needed", Rule(source=Source(not_principals=("*",))))
    assert decide(call(""), policy) == Deny("identity-needed")
    assert decide(call(WEB), policy) == Allow(DEFAULT_ALLOW)


def test_ip_blocks_of_both_families_and_their_exceptions() -> None:
    policy = allow("inside", Rule(source=Source(ip_blocks=("10.0.0.0/8", "fd00::/8"), not_ip_blocks=("10.0.0.66",))))
    assert decide(call(address="10.0.0.7"), policy) == Allow("inside")
    assert decide(call(address="fd12::1"), policy) == Allow("inside")
    assert decide(call(address="10.0.0.66"), policy) == Deny(NO_ALLOW_MATCHED)
    assert decide(call(address="11.0.0.1"), policy) == Deny(NO_ALLOW_MATCHED)
    assert decide(call(address="fe80::1"), policy) == Deny(NO_ALLOW_MATCHED)


def test_the_block_of_all_ipv6_addresses_holds_no_ipv4_address_and_the_other_way_round() -> None:
    assert decide(call(address="10.0.0.7"), deny("six", Rule(source=Source(ip_blocks=("::/0",))))) == Allow(
        DEFAULT_ALLOW
    )
    assert decide(call(address="::a00:7"), deny("four", Rule(source=Source(ip_blocks=("0.0.0.0/0",))))) == Allow(
        DEFAULT_ALLOW
    )


def test_a_block_that_is_none_is_an_error_when_the_rules_are_built() -> None:
    with pytest.raises(ValueError, match="host bits"):
        AccessRules([deny("typo", Rule(source=Source(ip_blocks=("10.0.0.1/8",))))], Action.ALLOW)


def test_a_policy_narrowed_to_a_service_leaves_the_others_alone() -> None:
    for narrowed in ("shop", "prod/shop"):
        policy = allow("shop-only", principals(WEB), services=(narrowed,))
        assert decide(call(JOB, service="shop"), policy) == Deny(NO_ALLOW_MATCHED)
        assert decide(call(JOB, service="cart"), policy) == Allow(DEFAULT_ALLOW)
        assert decide(call(JOB, service=""), policy) == Allow(DEFAULT_ALLOW)


def test_a_namespace_in_a_services_name_has_to_match() -> None:
    assert decide(call(JOB), allow("other", services=("test/shop",))) == Allow(DEFAULT_ALLOW)


def test_policies_for_a_service_come_on_top_of_those_for_every_port() -> None:
    policies = (
        deny("no-jobs", principals(JOB)),
        allow("shop", principals("*"), services=("shop",)),
        allow("web", principals(WEB), services=("prod/shop",)),
    )
    assert decide(call(JOB), *policies) == Deny("no-jobs")
    assert decide(call(WEB), *policies) == Allow("shop")
    assert decide(call(WEB), *policies[2:]) == Allow("web")


# The same question, answered in the plainest way.


def oracle(call: Call, policies: Sequence[AccessPolicy], default: Action) -> Action:
    in_force = [
        policy
        for policy in policies
        if not policy.services
        or call.service in policy.services
        or f"{call.namespace}/{call.service}" in policy.services
    ]
    if any(oracle_policy(policy, call) for policy in in_force if policy.action is Action.DENY):
        return Action.DENY
    allowing = [policy for policy in in_force if policy.action is Action.ALLOW]
    if not allowing:
        return default
    return Action.ALLOW if any(oracle_policy(policy, call) for policy in allowing) else Action.DENY


def oracle_policy(policy: AccessPolicy, call: Call) -> bool:
    return any(oracle_rule(rule, call) for rule in policy.rules)


def oracle_rule(rule: Rule, call: Call) -> bool:
    asked = []
    if rule.source is not msgspec.UNSET:
        lists = (
            (rule.source.principals, lambda text: oracle_principal(text, call.identity)),
            (rule.source.ip_blocks, lambda text: ipaddress.ip_address(call.address) in ipaddress.ip_network(text)),
        )
        twins = (rule.source.not_principals, rule.source.not_ip_blocks)
        if not any(wanted for wanted, _ in lists) and not any(twins):
            return False
        for (wanted, test), unwanted in zip(lists, twins, strict=True):
            asked.append(not wanted or any(map(test, wanted)))
            asked.append(not any(map(test, unwanted)))
    if rule.target is not msgspec.UNSET:
        if not rule.target.ports and not rule.target.not_ports:
            return False
        asked.append(not rule.target.ports or call.port in rule.target.ports)
        asked.append(call.port not in rule.target.not_ports)
    return bool(asked) and all(asked)


def oracle_principal(pattern: str, identity: str) -> bool:
    if not identity:
        return False
    if pattern.endswith("*"):
        return identity.startswith(pattern[:-1])
    if pattern.startswith("*"):
        return identity.endswith(pattern[1:])
    return identity == pattern


def few(*values: str | int) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(st.sampled_from(values), max_size=2, unique=True).map(tuple)


PATTERNS = few(WEB, JOB, "spiffe://mesh/*", "*/sa/web", "*")
BLOCKS = few("10.0.0.0/8", "10.0.0.7", "0.0.0.0/0", "::/0", "fd00::/8", "fd00::1")
PORTS = few(80, 443)
SOURCES = st.builds(Source, principals=PATTERNS, not_principals=PATTERNS, ip_blocks=BLOCKS, not_ip_blocks=BLOCKS)
TARGETS = st.builds(Target, ports=PORTS, not_ports=PORTS)
RULES = st.builds(
    Rule, source=st.one_of(st.just(msgspec.UNSET), SOURCES), target=st.one_of(st.just(msgspec.UNSET), TARGETS)
)
POLICIES = st.builds(
    AccessPolicy,
    name=st.sampled_from("abc"),
    action=st.sampled_from(Action),
    services=few("shop", "prod/shop", "test/shop", "cart"),
    rules=st.lists(RULES, max_size=2).map(tuple),
)
CALLS = st.builds(
    Call,
    identity=st.sampled_from(["", WEB, JOB]),
    address=st.sampled_from(["10.0.0.7", "10.9.9.9", "192.0.2.1", "fd00::1", "fe80::1"]),
    port=st.sampled_from([80, 443, 22]),
    service=st.sampled_from(["", "shop", "cart"]),
    namespace=st.sampled_from(["", "prod", "test"]),
)


@given(st.lists(POLICIES, max_size=4), st.sampled_from(Action), CALLS)
def test_the_compiled_rules_agree_with_the_plainest_reading(
    policies: list[AccessPolicy], default: Action, call: Call
) -> None:
    verdict = AccessRules(policies, default).decide(call)
    assert isinstance(verdict, Allow) == (oracle(call, policies, default) is Action.ALLOW)
    in_name = [policy for policy in policies if policy.name == verdict.by]
    assert not in_name or any(oracle_policy(policy, call) for policy in in_name)
