"""The renderings: golden files for the eye, and reading back what was written."""

import ipaddress
import typing
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.model.address import CGROUPS, INTERFACES
from meshnet.model.settings import CaptureSection, Settings
from meshnet_init.plan import Host, make_plan
from meshnet_init.render import iptables_text, iptables_words, nft_text, read_iptables_rule
from meshnet_init.rule import CHAIN_IN, CHAINS, Plan, Rule, Verdict, drain_set
from meshnet_init.values import Ports

GOLDEN = Path(__file__).parent / "golden"

PLANS = {
    "default": make_plan(Settings(), Host()),
    "everything": make_plan(
        Settings(
            capture=CaptureSection(
                inbound_ports=("80", "443", "8000-8100"),
                exclude_inbound_ports=("22", "9100"),
                exclude_inbound_cidrs=("10.1.0.0/16", "fd00:1::/32"),
                outbound_ports=("1-1023", "5432"),
                exclude_outbound_ports=("25",),
                outbound_cidrs=("10.0.0.0/8", "172.16.0.0/12", "fd00::/8"),
                exclude_outbound_cidrs=("10.9.9.9", "fd00::9"),
                exclude_uids=("1000",),
                exclude_gids=("1001", "27"),
                exclude_interfaces=("docker0", "veth*"),
            )
        ),
        Host(),
    ),
    "guarded": make_plan(
        Settings(
            capture=CaptureSection(
                inbound_mode="tproxy",
                original_source=True,
                inbound_cidrs=("10.0.0.0/8",),
                inbound_interfaces=("eth0", "ens*"),
                reroute_interfaces=("docker0", "br-*"),
                outbound_gids=("1000", "1001"),
                exclude_outbound_cidrs=("10.9.9.9", "fd00::9"),
                strict=True,
                quic="reject",
                udp="count",
            )
        ),
        Host(accepts_marks=False),
    ),
    "valid": make_plan(Settings(capture=CaptureSection(drop_invalid=True, inbound_ports=("80", "443"))), Host()),
    "truthful": make_plan(
        Settings(
            capture=CaptureSection(
                truthful_connect=True,
                strict=True,
                reroute_interfaces=("docker0",),
                exclude_outbound_cidrs=("10.9.9.9",),
                outbound_ports=("80", "5432"),
                loopback_ports=("8080",),
            )
        ),
        Host(),
    ),
    "ipv6-rejected": make_plan(
        Settings(capture=CaptureSection(ipv6="reject", udp="reject", reroute_interfaces=("docker0",))), Host()
    ),
    "without-ipv6": make_plan(Settings(capture=CaptureSection(ipv6="off")), Host()),
    "drain": drain_set([15101, 15106]),
}


TAKES = ("REDIRECT", "TPROXY", "QUEUE", "DROP", "RESET", "HOST-UNREACHABLE", "ADDR-UNREACHABLE")
GOLDENS = [
    f"{name}.{kind}"
    for name, plan in PLANS.items()
    for kind in ("nft", "iptables", *(("ip6tables",) if plan.ipv6 else ()))
]


@pytest.mark.parametrize("file", GOLDENS)
def test_a_plan_renders_as_its_golden_file(file: str) -> None:
    assert rendered(file) == (GOLDEN / file).read_text()


def test_there_are_no_other_golden_files() -> None:
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted(GOLDENS)


def rendered(file: str) -> str:
    name, kind = file.split(".")
    if kind == "nft":
        return nft_text(PLANS[name])
    return iptables_text(PLANS[name], "ipv4" if kind == "iptables" else "ipv6")


def networks(version: int) -> st.SearchStrategy[str]:
    return st.builds(
        lambda address, bits: str(ipaddress.ip_network((address, bits), strict=False)),
        st.ip_addresses(v=4 if version == 4 else 6),
        st.integers(1, 32 if version == 4 else 128),
    )


names = st.from_regex(INTERFACES, fullmatch=True).filter(lambda name: name != "lo")


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    """Any rule the plan could make, and more."""
    family = draw(st.sampled_from(["ipv4", "ipv6"]))
    cidr = st.just("") | networks(4 if family == "ipv4" else 6)
    first, last = sorted(draw(st.tuples(st.integers(1, 65535), st.integers(1, 65535))))
    loopback = draw(st.booleans())
    uid = draw(st.none() | st.integers(0, 2**32 - 2))
    redirect, tproxy, queue = draw(
        st.sampled_from([(0, 0, 0), (1, 0, 0), (65535, 0, 0), (0, 15106, 0), (0, 1, 0), (0, 0, 1), (0, 0, 65535)])
    )
    verdict = draw(st.sampled_from(typing.get_args(Verdict))) if not redirect and not tproxy and not queue else "return"
    established = draw(st.booleans())
    needed = 1 if verdict in ("save", "restore") else 0  # a mark to carry over
    ports = draw(st.none() | st.just(Ports(first, last)) | st.just(Ports(first, first)))
    return Rule(
        chain=draw(st.sampled_from(CHAINS)),
        family=family,
        loopback=loopback,
        interface="" if loopback else draw(st.just("") | names),
        mark=draw(st.integers(needed, 2**32 - 1)),
        connmark=draw(st.integers(needed, 2**32 - 1)),
        uid=uid,
        gid=draw(st.none() | st.integers(0, 2**32 - 2)) if uid is None else None,  # the plan never asks for both
        cgroup=draw(st.just("") | st.from_regex(CGROUPS, fullmatch=True)),
        source=draw(cidr),
        destination=draw(cidr),
        local=draw(st.sampled_from([None, True, False])),
        ports=ports,
        established=established,
        invalid=not established and not redirect and not tproxy and not queue and draw(st.booleans()),
        udp=not redirect and not tproxy and not queue and verdict in ("return", "reject") and draw(st.booleans()),
        redirect=redirect,
        tproxy=tproxy,
        tproxy_mark=draw(st.integers(0, 2**32 - 1)) if tproxy else 0,
        queue=queue,
        verdict=verdict,
    )


@given(rules(), st.randoms())
def test_an_iptables_rule_reads_back_as_it_was_whatever_the_order_of_its_matches(rule: Rule, random: Random) -> None:
    words = iptables_words(rule)
    matches = " ".join(words).split(" -m ")
    last, _, target = matches[-1].partition(" -j ")
    head, *middle = [*matches[:-1], last]
    random.shuffle(middle)
    shuffled = " -m ".join([head, *middle]) + f" -j {target}" if target else " ".join(words)

    assert read_iptables_rule(rule.chain, rule.family, words) == rule
    assert read_iptables_rule(rule.chain, rule.family, shuffled.split()) == rule


@given(rules())
def test_every_redirect_matches_only_the_opening_syn(rule: Rule) -> None:
    plan = Plan(rules=(rule,))
    texts = [nft_text(plan), iptables_text(plan, rule.family)]

    for text in texts:
        for line in text.splitlines():
            takes = any(word in line.upper() for word in TAKES)
            if takes and not rule.invalid:
                assert "(fin | syn | rst | ack) == syn" in line or "--tcp-flags FIN,SYN,RST,ACK SYN" in line


@pytest.mark.parametrize(
    "words",
    [
        "-j ACCEPT",
        "-j RETURN -m comment --comment ours",
        "-p tcp -j REDIRECT --to-ports 15106",  # without the SYN match: would cut open connections
        "-p tcp -m tcp --tcp-flags SYN SYN -j REDIRECT --to-ports 15106",
        "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j RETURN",
        "! -i lo -j RETURN",
        "! -s 10.0.0.0/8 -j RETURN",
        "-p tcp -m tcp ! --dport 22 -j RETURN",
        "-i eth0+x -j RETURN",
        "-o lo -j RETURN",  # in the inbound chain
        "-m addrtype --dst-type BROADCAST -j RETURN",
        "-p tcp -j RETURN",
    ],
)
def test_a_rule_that_is_not_ours_is_told_apart(words: str) -> None:
    assert read_iptables_rule(CHAIN_IN, "ipv4", words.split()) is None
