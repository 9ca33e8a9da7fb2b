"""Which rule decides about a connection, and for whom others do."""

import msgspec
import pytest

from meshnet.model.settings import CaptureSection, Settings
from meshnet_init.backends import Counted
from meshnet_init.plan import Host, make_plan
from meshnet_init.rule import CHAIN_IN, CHAIN_OUT, drain_set
from meshnet_init.walk import Call, Way, walk


def way(call: Call, **capture: object) -> Way:
    settings = Settings(capture=msgspec.convert(capture, CaptureSection))
    return walk([Counted(rule) for rule in make_plan(settings, Host()).rules], call)


def told(found: Way) -> tuple[str, list[str]]:
    assert found.decides is not None
    return found.decides.counted.rule.why, [f"{step.whom}: {step.counted.rule.why}" for step in found.unless]


def out(target: str = "10.0.0.1", port: int = 80, **facts: object) -> Call:
    return msgspec.convert({"chain": CHAIN_OUT, "target": target, "port": port, "interface": "eth0", **facts}, Call)


def into(port: int = 80, **facts: object) -> Call:
    return msgspec.convert({"chain": CHAIN_IN, "target": "10.0.0.1", "port": port, "local": True, **facts}, Call)


PROXYS = ["packets with the mark 0x1000: made by the proxy", "processes of gid 15137: made by the proxy's group"]


@pytest.mark.parametrize(
    ("call", "capture", "why", "unless"),
    [
        (out(), {}, "to the outbound proxy", PROXYS),
        (out("fd00::1"), {}, "to the outbound proxy", PROXYS),
        (out("fd00::1"), {"ipv6": "off"}, "IPv6 is not captured here", []),
        (out(port=25), {"exclude_outbound_ports": ["25"]}, "capture.exclude_outbound_ports", PROXYS),
        (out(), {"exclude_outbound_cidrs": ["10.0.0.0/8"]}, "capture.exclude_outbound_cidrs", PROXYS),
        (
            out(),
            {"exclude_uids": ["5"]},
            "to the outbound proxy",
            [*PROXYS, "processes of uid 5: capture.exclude_uids"],
        ),
        (out(interface="docker0"), {"exclude_interfaces": ["docker*"]}, "capture.exclude_interfaces", PROXYS),
        (out(local=True, loopback=True), {}, "stays on this host", PROXYS),
        (out(local=True, loopback=True), {"loopback_ports": ["80"]}, "capture.loopback_ports", PROXYS),
        (into(), {}, "to the inbound proxy", PROXYS[:1]),
        (into(), {"inbound_mode": "tproxy", "strict": True}, "to the inbound proxy", PROXYS[:1]),
        (into(), {"drop_invalid": True, "quic": "reject"}, "to the inbound proxy", PROXYS[:1]),
        (
            out(),
            {"exclude_cgroups": ["a.slice"]},
            "to the outbound proxy",
            [*PROXYS, "processes of cgroup a.slice: capture.exclude_cgroups"],
        ),
        (
            into(local=False, interface="br-1"),
            {"inbound_mode": "tproxy", "reroute_interfaces": ["br-*"]},
            "capture.reroute_interfaces: to the outbound proxy",
            PROXYS[:1],
        ),
        (into(22), {}, "capture.exclude_inbound_ports", PROXYS[:1]),
        (into(15108), {}, "the sidecar's own port", PROXYS[:1]),
        (into(local=False), {}, "only passes through this host", PROXYS[:1]),
        (into(source="10.9.0.1"), {"exclude_inbound_cidrs": ["10.9.0.0/16"]}, "capture.exclude_inbound_cidrs", None),
        (
            into(),
            {"exclude_inbound_cidrs": ["10.9.0.0/16"], "exclude_interfaces": ["wg0"]},
            "to the inbound proxy",
            [
                PROXYS[0],
                "what comes in by wg0: capture.exclude_interfaces",
                "clients in 10.9.0.0/16: capture.exclude_inbound_cidrs",
            ],
        ),
    ],
)
def test_the_first_rule_for_all_decides_and_those_for_some_are_told(
    call: Call, capture: dict[str, object], why: str, unless: list[str] | None
) -> None:
    found = told(way(call, **capture))
    assert found == (why, found[1] if unless is None else unless)


def test_where_no_rule_is_about_it_none_decides() -> None:
    assert way(out(), outbound_ports=["443"]).decides is None
    assert walk([Counted(rule) for rule in drain_set([15101]).rules], out()).decides is None


def test_rules_are_numbered_as_they_stand_in_their_chain() -> None:
    found = way(into(22)).decides
    assert found is not None
    assert found.number == 7


@pytest.mark.parametrize(("target", "number"), [("10.0.0.1", 7), ("fd00::1", 7)])
def test_where_each_family_has_its_chain_they_are_numbered_in_that(target: str, number: int) -> None:
    plan = make_plan(Settings(), Host())
    apart = [Counted(rule) for family in ("ipv4", "ipv6") for rule in plan.of_family(family)]
    found = walk(apart, into(22, target=target), families_apart=True).decides
    assert found is not None
    assert found.number == number
