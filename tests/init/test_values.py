"""Ports and CIDRs: what is accepted comes out canonical, everything else is refused with a suggestion."""

import ipaddress
import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshnet.errors import ConfigError
from meshnet_init.values import (
    ALL_PORTS,
    Ports,
    parse_cgroups,
    parse_ids,
    parse_interfaces,
    parse_networks,
    parse_ports,
)

port_numbers = st.integers(1, 65535)
runs = st.tuples(port_numbers, port_numbers).map(lambda pair: (min(pair), max(pair)))
networks = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).flatmap(
    lambda address: st.integers(0, address.max_prefixlen).map(
        lambda bits: ipaddress.ip_network((address, bits), strict=False)
    )
)


@given(st.lists(runs))
def test_ports_keep_their_meaning_and_come_out_sorted_and_apart(pairs: list[tuple[int, int]]) -> None:
    parsed = parse_ports([f"{first}-{last}" for first, last in pairs], "ports")

    assert {p for run in parsed for p in range(run.first, run.last + 1)} == {
        p for first, last in pairs for p in range(first, last + 1)
    }
    assert all(left.last + 1 < right.first for left, right in itertools.pairwise(parsed))
    assert parse_ports(map(str, parsed), "ports") == parsed


def test_a_star_is_every_port() -> None:
    assert parse_ports(["80", "*"], "ports") == (ALL_PORTS,)


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("", "write 8080"),
        ("http", "write 8080"),
        ("80:90", "write 8080"),
        ("90-80", "write 80-90"),
        ("0", "1 to 65535"),
        ("65536", "1 to 65535"),
        ("70000-80000", "1 to 65535"),
        ("-1", "write 8080"),
        ("\uff18\uff10", "write 8080"),  # fullwidth digits, which int() would take
        ("80 -j ACCEPT", "write 8080"),
        ("80\n", "write 8080"),
    ],
)
def test_a_wrong_port_is_refused_with_what_to_write(text: str, suggestion: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_ports([text], "capture.inbound_ports")

    assert caught.value.problem.startswith("capture.inbound_ports: ")
    assert suggestion in caught.value.suggestion


@given(st.text())
@example("22\n-A MESHNET_IN -j ACCEPT")
@example('22 accept comment "')
def test_whatever_is_accepted_as_a_port_is_digits_and_a_dash(text: str) -> None:
    try:
        parsed = parse_ports([text], "ports")
    except ConfigError:
        return
    assert all(str(run).replace("-", "").isdecimal() and str(run).isascii() for run in parsed)
    assert all(1 <= run.first <= run.last <= 65535 for run in parsed)


@given(st.lists(networks))
def test_networks_keep_their_meaning_ipv4_first(given_networks: list[ipaddress.IPv4Network]) -> None:
    wanted = [n for n in given_networks if not (n.version == 6 and n.network_address.ipv4_mapped)]
    parsed = parse_networks(map(str, wanted), "cidrs")

    assert [network.version for network in parsed] == sorted(network.version for network in parsed)
    for network in wanted:
        assert any(network.version == kept.version and network.subnet_of(kept) for kept in parsed)
    for kept in parsed:
        same = [network for network in wanted if network.version == kept.version]
        assert sum(n.num_addresses for n in ipaddress.collapse_addresses(same) if n.subnet_of(kept)) == (
            kept.num_addresses
        )


@given(st.text())
@example("10.0.0.0/8 accept")
@example("10.0.0.0/8\n")
@example("fe80::1%eth0\nCOMMIT")
def test_whatever_is_accepted_as_a_network_is_a_canonical_cidr(text: str) -> None:
    try:
        parsed = parse_networks([text], "cidrs")
    except ConfigError:
        return
    for network in parsed:
        assert ipaddress.ip_network(str(network)) == network
        assert set(str(network)) <= set("0123456789abcdef.:/")


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("10.1.2.3/8", "write 10.0.0.0/8"),
        ("10.0.0.0/33", "write 10.0.0.0/8, fd00::/8"),
        ("example.com", "write 10.0.0.0/8, fd00::/8"),
        ("fe80::1%eth0", "write fe80::1"),
        ("::ffff:10.0.0.1", "write 10.0.0.1/32"),
        ("::ffff:10.0.0.0/104", "write 10.0.0.0/8"),
    ],
)
def test_a_wrong_network_is_refused_with_what_to_write(text: str, suggestion: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_networks([text], "capture.outbound_cidrs")

    assert suggestion in caught.value.suggestion


def test_a_star_is_both_families_everywhere() -> None:
    assert [str(network) for network in parse_networks(["*", "10.0.0.0/8"], "cidrs")] == ["0.0.0.0/0", "::/0"]


def test_a_run_of_one_prints_as_a_number() -> None:
    assert str(Ports(80, 80)) == "80"
    assert 85 in Ports(80, 90)


@pytest.mark.parametrize("text", ["", "root", "-1", "4294967295", "1 -j ACCEPT", "\uff18", "1\n"])
def test_what_is_no_id_is_refused_istio48416(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_ids([text], "capture.exclude_uids")
    assert caught.value.problem.startswith("capture.exclude_uids: ")


def test_ids_come_out_sorted_and_once() -> None:
    assert parse_ids(["27", "0", "027", "4294967294"], "ids") == (0, 27, 4294967294)


@given(st.text())
@example("eth0 -j ACCEPT")
@example('eth0" accept comment "')
@example("+")
@example("*")
@example("!eth0")
@example("-j")
def test_whatever_is_accepted_as_an_interface_can_be_no_other_word(text: str) -> None:
    """As istio#58781, where a parameter could be injected."""
    try:
        parse_interfaces([text], "interfaces")
    except ConfigError:
        return
    assert len(text) < 16
    assert text[0] not in "-!*+"
    assert not set(text) & set(" \t\n\"'\\;{}+/!$`")


def test_the_loopback_interface_is_not_there_to_be_left_out() -> None:
    with pytest.raises(ConfigError):
        parse_interfaces(["lo"], "capture.exclude_interfaces")


@given(st.text() | st.text("aZ0_.@:-/!* \n"))
@example("-j")
@example("--invert")
@example("-.slice/a.service")
@example("! a.slice")
@example('a.slice" accept comment "')
@example("a.slice\nCOMMIT")
@example("a.slice/../b.slice")
@example("/a.slice")
def test_whatever_is_accepted_as_a_cgroup_can_be_no_other_word(text: str) -> None:
    try:
        parse_cgroups([text], "cgroups")
    except ConfigError:
        return
    assert text[0] not in "-!"
    assert not set(text) & set(" \t\n\"'\\;{}+!*$`")
    assert not set(text.split("/")) & {"", ".", ".."}


@pytest.mark.parametrize("text", ["system.slice/cron.service", "user.slice", "a/-b", "system.slice/getty@tty1.service"])
def test_paths_of_cgroups_are_taken_as_they_are(text: str) -> None:
    assert parse_cgroups([text], "cgroups") == (text,)
