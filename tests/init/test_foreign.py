"""Other programs' rules: what a text rules out, and in which order the kernel asks."""

import json
from pathlib import Path

import pytest

from meshnet_init.foreign import Foreign, foreign_rules, may_match, standing_ahead
from meshnet_init.rule import CHAIN_IN, CHAIN_OUT, CHAINS, Chain
from tests.init.kernel import Lab, backend_named
from tests.world import World


@pytest.mark.parametrize(
    ("text", "may"),
    [
        ("tcp dport 8080 redirect to :9", True),
        ("tcp dport 8081 redirect to :9", False),
        ("tcp dport { 80, 8000-8100 } redirect to :9", True),
        ("tcp dport { 80, 443 } redirect to :9", False),
        ("tcp dport @ports redirect to :9", True),
        ("ip daddr 10.0.0.0/8 dnat to 1.2.3.4", True),
        ("ip daddr 11.0.0.0/8 dnat to 1.2.3.4", False),
        ("ip daddr { 11.0.0.1, 10.1.2.3 } dnat to 1.2.3.4", True),
        ("ip daddr @services dnat to 1.2.3.4", True),
        ("ip6 daddr fd00::1 dnat to [fd00::2]", False),
        ("udp dport 8080 redirect to :9", False),
        ("-p tcp -m tcp --dport 8080 -j REDIRECT --to-ports 9", True),
        ("-p tcp -m multiport --dports 80,443 -j REDIRECT --to-ports 9", False),
        ("-p tcp -m tcp --dport 8000:8100 -j DNAT --to-destination 1.2.3.4", True),
        ("-d 10.1.2.3/32 -p tcp -j DNAT --to-destination 1.2.3.4", True),
        ("-d 10.1.2.4/32 -p tcp -j DNAT --to-destination 1.2.3.4", False),
        ("! -d 10.0.0.0/8 -p tcp -j DNAT --to-destination 1.2.3.4", True),  # in doubt it may
        ("-p udp -m udp --dport 8080 -j DNAT --to-destination 1.2.3.4", False),
    ],
)
def test_in_doubt_a_rule_may_match(text: str, may: bool) -> None:
    assert may_match(text, "10.1.2.3", 8080) == may


@pytest.mark.parametrize(
    ("rule", "may"),
    [
        ("-p tcp -j DNAT --to-destination 1.2.3.4", True),
        ("-p udp -j DNAT --to-destination 1.2.3.4", False),
        ("-d 10.1.2.3/32 -j ACCEPT", True),
        ("-d 10.1.2.3/32 -j RETURN", True),
        ("-g THEIRS", True),
        ("-j THEIRS", False),
        ("-j EMPTY-DROP", False),
        ("-j DEEP", True),
        ("-p udp -j DEEP", False),
        ("-j LOG --log-prefix ACCEPT", False),
        ("-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", False),
        ("-m conntrack --ctstate NEW,RELATED -j ACCEPT", True),
        ("-m conntrack ! --ctstate RELATED -j ACCEPT", True),
    ],
)
def test_what_may_end_a_new_connections_way_ahead_of_ours(rule: str, may: bool) -> None:
    chains = {
        "THEIRS": ["-j MARK --set-xmark 0x1/0x1", "-j RETURN"],
        "DEEP": ["-j DEEPER", "-p udp -j REDIRECT --to-ports 9"],
        "DEEPER": ["-p tcp -j REDIRECT --to-ports 9"],
    }
    found = standing_ahead({"OUTPUT": [rule, "-p tcp -j MESHNET_OUT"], **chains}, CHAIN_OUT)
    inside = " (-p tcp -j REDIRECT --to-ports 9)" if "DEEP" in rule else ""
    assert found == ((rule + inside,) if may else ())
    assert standing_ahead({"OUTPUT": ["-p tcp -j MESHNET_OUT", rule], **chains}, CHAIN_OUT) == ()
    assert standing_ahead({"PREROUTING": [rule, "-p tcp -j MESHNET_IN"], "OUTPUT": [], **chains}, CHAIN_OUT) == ()


@pytest.mark.netns
@pytest.mark.parametrize("backend", ["nft", "iptables"])
def test_rules_of_every_kind_of_tables_are_found_in_order(world: World, backend: str) -> None:
    """istio#56414: rules placed after others; istio#15519: rules written where nobody looks."""
    lab = Lab(world, backend_named(backend))
    host = lab.app
    first = "-A FIRST -p tcp -j REDIRECT --to-ports 3"
    host.run("iptables-restore", stdin=f"*nat\n:FIRST - [0:0]\n-A OUTPUT -j FIRST\n{first}\nCOMMIT\n")
    lab.install()
    append = ("-t", "nat", "-A", "OUTPUT", "-p", "tcp")
    host.run("iptables", *append, "--dport", "8080", "-j", "REDIRECT", "--to-ports", "4")
    host.run("iptables", *append, "--dport", "9", "-j", "REDIRECT", "--to-ports", "5")
    host.run("iptables-legacy", *append, "-j", "DNAT", "--to-destination", "10.77.0.9")
    tables = "table inet early { chain c { type nat hook output priority -150; tcp dport 8080 redirect to :6; }; }\n"
    tables += "table ip wall { chain c { type filter hook output priority -250; tcp dport 8080 drop; accept; }; }\n"
    tables += "table ip6 other { chain c { type nat hook output priority -150; meta l4proto tcp redirect to :7; }; }\n"
    host.run("nft", "-f", "-", stdin=tables)

    found = rules(lab, CHAIN_OUT)

    ahead = [(rule.table, rule.text) for rule in found if rule.ahead]
    assert ahead[:2] == [
        ("ip wall", "tcp dport 8080 drop"),
        ("inet early", "tcp dport 8080 redirect to :6"),
    ]
    behind = [(rule.table, rule.priority) for rule in found if not rule.ahead]
    assert ("ip nat", -100) in behind
    # At the same priority the table that was made last is asked first; nft's own is ahead of both.
    assert (("legacy ip nat", -100) in behind) == (backend == "nft")
    assert not any("redirect to :5" in rule.text or "redirect to :7" in rule.text for rule in found)
    assert rules(lab, CHAIN_IN) == ()


def rules(lab: Lab, chain: Chain, target: str = "10.1.2.3") -> tuple[Foreign, ...]:
    with lab.app.entered():
        found, unread = foreign_rules(lab.backend.name, chain, target, 8080)
    assert unread == ()
    return found


@pytest.mark.netns
@pytest.mark.parametrize("backend", ["nft", "iptables", "legacy"])
def test_our_own_are_nobody_else_s_whichever_backend_wrote_them(world: World, backend: str) -> None:
    """Their guard refuses what the redirects would have taken, and was told as somebody's firewall."""
    lab = Lab(world, backend_named(backend))
    lab.install(strict=True, drop_invalid=True, truthful_connect=backend != "nft")
    for target in ("10.1.2.3", "fd00::1"):
        assert [rule for chain in CHAINS for rule in rules(lab, chain, target)] == []
    wall = {"nft": "iptables", "iptables": "iptables", "legacy": "iptables-legacy"}[backend]
    lab.app.run(wall, "-A", "OUTPUT", "-p", "tcp", "-j", "DROP")
    (found,) = rules(lab, "MESHNET_GUARD_OUT")
    assert (found.chain, found.ahead) == ("OUTPUT", False)


@pytest.mark.netns
def test_those_of_one_family_are_not_hidden_by_those_of_the_other(world: World) -> None:
    """One nft that lists both prints of the second a target as nothing."""
    lab = Lab(world, backend_named("nft"))
    for program, to in (("iptables", "10.77.0.9:80"), ("ip6tables", "[fd77::9]:80")):
        lab.app.run(program, "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-j", "DNAT", "--to-destination", to)
    for target, to in (("10.1.2.3", "10.77.0.9:80"), ("fd00::1", "[fd77::9]:80")):
        assert [rule.text.rpartition(" ")[2] for rule in rules(lab, CHAIN_OUT, target)] == [to]


@pytest.mark.netns
def test_in_one_chain_those_before_the_jump_to_ours_are_asked_first(world: World) -> None:
    lab = Lab(world, backend_named("iptables"))
    lab.install()
    for verb in ("-I", "-A"):
        redirect = ("-p", "tcp", "-j", "REDIRECT", "--to-ports", "3" if verb == "-I" else "4")
        lab.app.run("iptables", "-t", "nat", verb, "OUTPUT", *redirect)
    assert [(rule.ahead, rule.text.split(":")[-1]) for rule in rules(lab, CHAIN_OUT)] == [(True, "3"), (False, "4")]


@pytest.mark.netns
def test_an_nft_that_crashes_on_what_a_newer_one_wrote_is_in_nobodys_way_istio58492(
    world: World, tmp_path: Path
) -> None:
    """istio#58492, k8s#136786. The backend needs no program; who only lists says that it could not."""
    host = world.host("app")
    for program in ("nft", "iptables", "iptables-save", "iptables-restore"):
        (tmp_path / program).write_text("#!/bin/sh\nkill -SEGV $$\n")
        (tmp_path / program).chmod(0o755)

    def said(*words: str) -> str:
        return host.run("sh", "-c", 'PATH="$0:$PATH" exec "$@"', tmp_path, "meshnet", *words).stdout

    assert "in force (nft)" in said("init", "--backend", "nft", "--verify")
    assert "rules (nft): as planned" in said("rules", "verify")
    told = json.loads(said("explain", "10.1.2.3:8080", "-o", "json"))
    assert (told["verdict"], told["unread"]) == ("captured", ["nftables: nft is not installed, or did not work"])
    assert "rules removed (nft)" in said("init", "remove")
