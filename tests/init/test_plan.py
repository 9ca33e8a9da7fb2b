"""The plan: which rules, in which order, for which settings."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from meshnet.errors import ConfigError
from meshnet.model.canary import OWN_CANARY, PROOF_PORT
from meshnet.model.settings import CaptureSection, ProxySection, Settings
from meshnet_init.plan import Host, make_plan
from meshnet_init.rule import CHAIN_IN, CHAIN_OUT, Rule, captures, drain_set, is_for_canary
from meshnet_init.sidecar import captured_inbound
from meshnet_init.values import ALL_PORTS, Ports

ODD_PORTS = tuple(str(port) for port in range(1, 4001, 2))


def plan_rules(chain: str, host: Host | None = None, **capture: object) -> list[Rule]:
    """Those that are there for traffic."""
    settings = Settings(capture=msgspec.convert(capture, CaptureSection))
    return [
        rule for rule in make_plan(settings, host or Host()).rules if rule.chain == chain and not is_for_canary(rule)
    ]


def ports_left_alone(rules: list[Rule]) -> list[str]:
    return [str(rule.ports) for rule in rules if rule.ports and not rule.redirect]


def test_by_default_everything_is_captured_but_the_sidecar_ssh_and_the_host_itself() -> None:
    inbound, outbound = plan_rules(CHAIN_IN), plan_rules(CHAIN_OUT)

    assert inbound[0].loopback
    assert inbound[1].mark == 0x1000
    assert ports_left_alone(inbound) == ["15101", "15106", "15108", "15120", "22"]
    assert inbound[-2].local is False
    assert inbound[-1] == Rule(chain=CHAIN_IN, redirect=15106, why="to the inbound proxy")
    assert [rule.mark or rule.gid or rule.loopback or rule.local for rule in outbound[:-1]] == [
        0x1000,
        15137,
        True,
        True,
    ]
    assert outbound[-1] == Rule(chain=CHAIN_OUT, redirect=15101, why="to the outbound proxy")


@pytest.mark.parametrize("ipv6", ["on", "off"])
def test_the_sidecars_own_canary_is_caught_ahead_of_what_lets_the_sidecar_pass(ipv6: str) -> None:
    settings = Settings(capture=CaptureSection(ipv6=ipv6, outbound_ports=(), exclude_outbound_cidrs=("192.0.2.0/24",)))  # type: ignore[arg-type]  # a parameter of the test
    rules = [rule for rule in make_plan(settings, Host()).rules if rule.chain == CHAIN_OUT]
    first = [rule for rule in rules if rule.why != "IPv6 is not captured here"]
    wanted = [("ipv4", "192.0.2.3/32"), ("ipv6", "2001:db8::3/128")][: 2 if ipv6 == "on" else 1]
    assert [(rule.family, rule.destination) for rule in first[: len(wanted)]] == wanted
    assert {(str(rule.ports), rule.redirect) for rule in first[: len(wanted)]} == {("15123", 15101)}
    assert captures(rules, OWN_CANARY["ipv4"], PROOF_PORT)
    assert captures(rules, OWN_CANARY["ipv6"], PROOF_PORT) == (ipv6 == "on")
    assert not captures(rules, OWN_CANARY["ipv4"], 80)


def test_what_is_redirected_is_held_first_and_nothing_else() -> None:
    values = {"exclude_outbound_ports": ["25"], "outbound_cidrs": ["10.0.0.0/8"], "loopback_ports": ["8080"]}
    assert plan_rules("MESHNET_HOLD", **values) == []
    held = plan_rules("MESHNET_HOLD", truthful_connect=True, **values)
    turned = plan_rules(CHAIN_OUT, truthful_connect=True, **values)
    assert [replace(rule, chain=CHAIN_OUT, queue=0, why="") for rule in held] == [
        replace(rule, redirect=0, why="") for rule in turned
    ]
    assert [rule.queue for rule in held] == [rule.redirect for rule in turned]
    assert not any(rule.destination.startswith(OWN_CANARY["ipv4"]) for rule in held)


@pytest.mark.parametrize("ipv6", ["off", "reject"])
def test_what_is_not_redirected_in_ipv6_is_not_held_either(ipv6: str) -> None:
    first = plan_rules("MESHNET_HOLD", truthful_connect=True, ipv6=ipv6)[0]
    assert (first.family, first.queue, first.verdict) == ("ipv6", 0, "return")


@given(st.integers(1, 2**32 - 1), st.integers(1, 2**32 - 1))
def test_what_refuses_a_held_connection_never_matches_the_proxys_own(mark: int, local_mark: int) -> None:
    settings = Settings(
        proxy=ProxySection(mark=mark, local_mark=local_mark), capture=CaptureSection(truthful_connect=True)
    )
    if (mark | local_mark).bit_count() > 30:
        with pytest.raises(ConfigError, match="two bits"):
            make_plan(settings, Host())
        return
    rules = make_plan(settings, Host()).rules
    refusing = {rule.verdict: rule.mark for rule in rules if rule.mark and rule.verdict in ("reset", "unreachable")}
    assert len(refusing) == 2
    for refused in refusing.values():
        assert refused & mark == mark  # so nothing redirects it
        assert (mark | local_mark) & refused != refused
    assert refusing["reset"] & refusing["unreachable"] not in refusing.values()


def test_every_rule_has_a_reason_that_no_syntax_can_take_apart() -> None:
    rules = plan_rules(CHAIN_IN, exclude_inbound_ports=["22"], exclude_inbound_cidrs=["10.0.0.0/8"])
    rules += plan_rules(CHAIN_OUT, ipv6="off", exclude_outbound_ports=["25"], exclude_outbound_cidrs=["10.0.0.0/8"])

    for rule in (*rules, *drain_set([15101]).rules):
        assert rule.why.isascii()
        assert rule.why.isprintable()
        assert 0 < len(rule.why) < 128
        assert '"' not in rule.why


def test_the_own_ports_are_left_alone_wherever_they_are_moved() -> None:
    settings = Settings(proxy=ProxySection(inbound_port=16106, outbound_port=16101, tunnel_port=16108))
    rules = [rule for rule in make_plan(settings, Host()).rules if rule.chain == CHAIN_IN]

    assert ports_left_alone(rules) == ["15120", "16101", "16106", "16108", "22"]
    assert rules[-1].redirect == 16106


@pytest.mark.parametrize("ipv6", ["auto", "off", "reject"])
def test_readiness_is_asked_for_through_the_rules_whatever_is_left_alone(ipv6: str) -> None:
    values = {"ipv6": ipv6, "exclude_inbound_cidrs": ["0.0.0.0/0", "::/0"], "inbound_ports": [], "strict": True}
    assert not any(rule.redirect for rule in plan_rules(CHAIN_IN, **values))
    rules = plan_rules(CHAIN_IN, readiness_port=15124, **values)
    (turning,) = (rule for rule in rules if rule.redirect)
    assert (turning.redirect, str(turning.ports), turning.local) == (15106, "15124", True)
    assert captured_inbound(rules, 15124, "192.0.2.1")
    assert captured_inbound(rules, 15124, "2001:db8::1") == (ipv6 == "auto")
    guard = plan_rules("MESHNET_GUARD_IN", readiness_port=15124, **values)
    for_all = [rule for rule in guard if not (rule.loopback or rule.mark or rule.established)]
    decides = [
        next(it.verdict for it in for_all if it.family in ("any", family) and (it.ports is None or 15124 in it.ports))
        for family in ("ipv4", "ipv6")
    ]
    assert decides == ["reset", "reset" if ipv6 == "auto" else "return"]


def test_beside_tproxy_nothing_that_comes_in_is_redirected_a_second_time() -> None:
    values = {"inbound_mode": "tproxy", "reroute_interfaces": ["br0"], "readiness_port": 15124}
    redirected = [rule for rule in plan_rules(CHAIN_IN, **values) if rule.redirect]
    assert [(rule.interface, rule.local, rule.redirect) for rule in redirected] == [("br0", False, 15101)]
    given = [rule for rule in plan_rules("MESHNET_MARK_IN", **values) if rule.tproxy]
    assert [str(rule.ports) for rule in given] == ["15124", "None"]


def test_readiness_cannot_be_asked_for_at_a_port_where_the_sidecar_listens() -> None:
    with pytest.raises(ConfigError, match=r"capture\.readiness_port: 15106 is the sidecar's own already"):
        plan_rules(CHAIN_IN, readiness_port=15106)


def test_excludes_stand_before_the_redirect_and_includes_are_the_redirect() -> None:
    rules = plan_rules(CHAIN_IN, inbound_ports=["80", "8000-8100"], exclude_inbound_ports=["8050"])

    assert ports_left_alone(rules)[-1] == "8050"
    assert [str(rule.ports) for rule in rules if rule.redirect] == ["80", "8000-8100"]
    assert all(rule.redirect for rule in rules[-2:])


def test_outbound_includes_are_every_cidr_with_every_port() -> None:
    rules = plan_rules(CHAIN_OUT, outbound_cidrs=["10.0.0.0/8", "fd00::/8"], outbound_ports=["80", "443"])

    assert [(rule.family, rule.destination, str(rule.ports)) for rule in rules if rule.redirect] == [
        ("ipv4", "10.0.0.0/8", "80"),
        ("ipv4", "10.0.0.0/8", "443"),
        ("ipv6", "fd00::/8", "80"),
        ("ipv6", "fd00::/8", "443"),
    ]


def test_one_family_everywhere_is_a_match_on_the_family() -> None:
    rules = plan_rules(CHAIN_OUT, outbound_cidrs=["0.0.0.0/0"])

    assert rules[-1] == Rule(chain=CHAIN_OUT, family="ipv4", redirect=15101, why="to the outbound proxy")


def test_nothing_included_captures_nothing() -> None:
    assert not any(rule.redirect for rule in plan_rules(CHAIN_IN, inbound_ports=[]))
    assert not any(rule.redirect for rule in plan_rules(CHAIN_OUT, outbound_cidrs=[]))


@pytest.mark.parametrize(
    ("setting", "host_has_it", "captured"),
    [("auto", True, True), ("auto", False, False), ("on", False, True), ("off", True, False)],
)
def test_ipv6_is_as_set_or_as_the_host_has_it(setting: str, host_has_it: bool, captured: bool) -> None:
    host = Host(ipv6=host_has_it)
    settings = Settings(
        capture=msgspec.convert({"ipv6": setting, "exclude_outbound_cidrs": ["fd00::/8"]}, CaptureSection)
    )
    plan = make_plan(settings, host)

    assert plan.ipv6 == captured
    if not captured:
        for chain in (CHAIN_IN, CHAIN_OUT):
            first = next(rule for rule in plan.rules if rule.chain == chain)
            assert (first.family, first.redirect) == ("ipv6", 0)
        assert [rule.family for rule in plan.rules].count("ipv6") == 2


def test_a_group_this_user_namespace_does_not_map_makes_no_rule() -> None:
    rules = plan_rules(CHAIN_OUT, host=Host(gids=(range(1),)))

    assert all(rule.gid is None for rule in rules)


def test_group_zero_can_be_the_proxys() -> None:
    assert any(rule.gid == 0 for rule in plan_rules(CHAIN_OUT, gid=0))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (Settings(proxy=ProxySection(mark=0)), "proxy.mark"),
        (Settings(proxy=ProxySection(mark=2**32)), "proxy.mark"),
        (Settings(proxy=ProxySection(inbound_port=0)), "proxy.inbound_port"),
        (Settings(proxy=ProxySection(outbound_port=65536)), "proxy.outbound_port"),
        (Settings(proxy=ProxySection(outbound_port=15106)), "both 15106"),
        (Settings(capture=CaptureSection(gid=-1)), "capture.gid"),
        (Settings(capture=CaptureSection(gid=2**32 - 1)), "capture.gid"),
        (Settings(capture=CaptureSection(exclude_outbound_ports=("x",))), "capture.exclude_outbound_ports"),
        (Settings(capture=CaptureSection(exclude_inbound_cidrs=("x",))), "capture.exclude_inbound_cidrs"),
        (
            Settings(capture=CaptureSection(outbound_ports=tuple(str(n) for n in range(1, 4001, 2)))),
            "rules are more than 1000",
        ),
    ],
)
def test_settings_that_make_no_plan_are_refused(settings: Settings, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(settings, Host())

    assert problem in caught.value.problem
    assert caught.value.suggestion


def test_a_drain_set_redirects_nothing_and_remembers_the_ports() -> None:
    plan = drain_set([15106, 15101, 15106])

    assert all(rule.established and not rule.redirect for rule in plan.rules)
    assert [str(rule.ports) for rule in plan.rules if rule.chain == CHAIN_IN] == ["15101", "15106"]
    assert {rule.ports for rule in drain_set([]).rules} == {ALL_PORTS}


@given(st.integers(1, 65535), st.ip_addresses())
def test_captures_says_what_the_includes_and_excludes_say(port: int, address: object) -> None:
    rules = plan_rules(
        CHAIN_OUT,
        outbound_ports=["1-1023"],
        exclude_outbound_ports=["22"],
        exclude_outbound_cidrs=["10.0.0.0/8", "fd00::/8"],
    )
    excluded = str(address).startswith("10.") or str(address).startswith("fd")

    assert captures(rules, str(address), port) == (port < 1024 and port != 22 and not excluded)


def test_ports_are_compared_by_their_ends() -> None:
    assert Ports(1, 2) < Ports(1, 3) < Ports(2, 2)


@pytest.mark.parametrize("ports", ["15101", "15000-16000", "15120"])
def test_the_sidecars_own_ports_cannot_be_captured_on_loopback(ports: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_rules(CHAIN_OUT, loopback_ports=[ports])
    assert caught.value.problem.startswith("capture.loopback_ports: ")


def test_ids_that_are_not_mapped_here_have_no_rule() -> None:
    host = Host(uids=(range(1),), gids=(range(1),))
    rules = plan_rules(CHAIN_OUT, host, exclude_uids=["0", "1000"], exclude_gids=["0", "1000"])

    assert [(rule.uid, rule.gid) for rule in rules if rule.uid is not None or rule.gid is not None] == [
        (0, None),
        (None, 0),
    ]


def test_what_is_left_alone_by_who_and_where_stands_before_what_is_redirected() -> None:
    capture = {
        "exclude_uids": ["7"],
        "exclude_gids": ["8"],
        "exclude_interfaces": ["docker0"],
        "loopback_ports": ["80"],
    }
    rules = plan_rules(CHAIN_OUT, **capture)

    whys = [rule.why.removeprefix("capture.") for rule in rules]
    assert [why for why in whys if why in capture] == [
        "exclude_uids",
        "exclude_gids",
        "loopback_ports",
        "exclude_interfaces",
    ]
    assert not captures(rules[:-1], "10.0.0.1", 80)


CHOICES = [
    {"strict": True},
    {"strict": True, "outbound_gids": ("1000", "1001"), "loopback_ports": ("7000",)},
    {"strict": True, "reroute_interfaces": ("docker0",), "exclude_outbound_cidrs": ("10.9.9.9",)},
    {"strict": True, "inbound_mode": "tproxy", "inbound_cidrs": ("10.0.0.0/8",)},
]


@pytest.mark.parametrize("choice", CHOICES)
def test_the_guard_refuses_whatever_should_have_been_redirected_and_nothing_else(choice: dict[str, Any]) -> None:
    plan = make_plan(Settings(capture=CaptureSection(**choice)), Host())

    def refused(*chains: str) -> set[Rule]:
        bare = (
            replace(rule, chain=CHAIN_IN, why="", verdict="return")
            for rule in plan.rules
            if rule.verdict == "reset" and rule.chain in chains
        )
        return set(bare)

    def turned(*chains: str) -> set[Rule]:
        bare = (
            replace(rule, chain=CHAIN_IN, why="", redirect=0, tproxy=0, tproxy_mark=0)
            for rule in plan.rules
            if rule.chain in chains and (rule.redirect or rule.tproxy)
        )
        return set(bare)

    assert refused("MESHNET_GUARD_OUT") == turned(CHAIN_OUT) != set()
    assert refused("MESHNET_GUARD_IN", "MESHNET_GUARD_FWD") == turned(CHAIN_IN, "MESHNET_MARK_IN") != set()


@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
@pytest.mark.parametrize("strict", [False, True])
def test_of_ipv6_that_is_rejected_what_would_be_redirected_is_refused_once_and_nothing_else(
    mode: str, strict: bool
) -> None:
    choice = {
        "inbound_mode": mode,
        "strict": strict,
        "reroute_interfaces": ["docker0", "br-*"],
        "exclude_outbound_cidrs": ["fd00::9", "10.9.9.9"],
        "exclude_inbound_cidrs": ["fd00::8"],
        "outbound_ports": ["80", "443"],
        "udp": "count",
    }

    def of_ipv6(chain: str, **more: object) -> list[Rule]:
        """With a refusal in the place of each redirect."""
        rules = [rule for rule in plan_rules(chain, **{**choice, **more}) if rule.family != "ipv4"]
        return [
            replace(
                rule,
                chain=CHAIN_IN,
                family="ipv6",
                why="",
                redirect=0,
                verdict="reset" if rule.redirect else rule.verdict,
            )
            for rule in rules
            if not rule.established and not rule.udp and rule.destination != f"{OWN_CANARY['ipv6']}/128"
        ]

    taken = of_ipv6(CHAIN_IN, ipv6="on", inbound_mode="redirect")
    passing = [rule for rule in taken if rule.interface]
    assert of_ipv6("MESHNET_GUARD_FWD", ipv6="reject") == passing != []
    assert of_ipv6("MESHNET_GUARD_IN", ipv6="reject") == [rule for rule in taken if rule not in passing]
    assert of_ipv6("MESHNET_GUARD_OUT", ipv6="reject") == of_ipv6(CHAIN_OUT, ipv6="on")


@pytest.mark.parametrize("quic", ["allow", "count", "reject"])
@pytest.mark.parametrize("udp", ["allow", "count", "reject"])
def test_udp_from_behind_a_bridge_has_the_rules_of_the_hosts_own(quic: str, udp: str) -> None:
    choice = {"quic": quic, "udp": udp, "outbound_uids": ["7"], "reroute_interfaces": ["docker0", "br-*"]}

    def of_udp(chain: str, interface: str = "") -> list[Rule]:
        rules = (rule for rule in plan_rules(chain, **choice) if rule.udp and rule.interface == interface)
        return [replace(rule, chain="MESHNET_GUARD_OUT", uid=None, interface="") for rule in rules]

    own = of_udp("MESHNET_GUARD_OUT")
    assert of_udp("MESHNET_GUARD_FWD", "docker0") == of_udp("MESHNET_GUARD_FWD", "br-*") == own
    assert bool(own) == ((quic, udp) != ("allow", "allow"))
    assert not of_udp("MESHNET_GUARD_FWD"), "of other interfaces"


def test_behind_each_rule_for_a_transparent_listener_is_one_that_stops_what_found_none() -> None:
    choice = CaptureSection(inbound_mode="tproxy", inbound_ports=("80", "443"), inbound_interfaces=("eth0", "eth1"))
    rules = [rule for rule in make_plan(Settings(capture=choice), Host()).rules if rule.chain == "MESHNET_MARK_IN"]
    given = [at for at, rule in enumerate(rules) if rule.tproxy]

    assert len(given) == 4
    for at in given:
        assert rules[at + 1] == replace(rules[at], tproxy=0, tproxy_mark=0, verdict="drop", why=rules[at + 1].why)
    assert not any(rule.redirect == 15106 for rule in rules)


def test_without_a_wish_there_are_only_the_two_chains() -> None:
    assert {rule.chain for rule in make_plan(Settings(), Host()).rules} == {CHAIN_IN, CHAIN_OUT}


def test_two_marks_that_share_a_bit_are_refused_where_both_are_used() -> None:
    proxy = ProxySection(mark=0x3000)
    make_plan(Settings(proxy=proxy), Host())
    with pytest.raises(ConfigError, match="share a bit"):
        make_plan(Settings(proxy=proxy, capture=CaptureSection(original_source=True)), Host())


def test_a_drain_set_keeps_what_carries_marks() -> None:
    plan = make_plan(Settings(capture=CaptureSection(original_source=True, strict=True)), Host(accepts_marks=False))
    kept = drain_set([15106], plan.rules)

    assert [rule.verdict for rule in kept.rules] == ["save", "restore", "return", "return"]
    assert all(rule.keeps() for rule in kept.rules)
