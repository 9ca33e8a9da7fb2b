"""What should have come through the sidecar: the settings' own words, on what a socket tells."""

import socket

import msgspec
import pytest

from meshnet.decide.bypass import CaptureScope
from meshnet.model.connection import Direction
from meshnet.model.settings import CaptureSection, Settings


def scope(**capture: object) -> CaptureScope:
    return CaptureScope(Settings(capture=msgspec.convert(capture, CaptureSection)))


def packed(host: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)


@pytest.mark.parametrize("host", ["10.0.0.1", "fd00::1"])
def test_by_default_all_but_ssh_and_the_sidecars_own_ports(host: str) -> None:
    assert scope().inbound(8080, packed(host))
    assert scope().outbound(packed(host), 22, 0)
    assert not scope().inbound(22, packed(host))
    assert not scope().inbound(15108, packed(host))
    assert scope().not_judged == {}


@pytest.mark.parametrize(
    ("capture", "port", "host", "meant"),
    [
        ({"inbound_ports": ["80", "8000-8100"]}, 8100, "10.0.0.1", True),
        ({"inbound_ports": ["80", "8000-8100"]}, 8101, "10.0.0.1", False),
        ({"exclude_inbound_ports": ["8000-8100"]}, 8000, "10.0.0.1", False),
        ({"exclude_inbound_cidrs": ["10.0.0.0/8"]}, 80, "10.255.0.1", False),
        ({"exclude_inbound_cidrs": ["10.0.0.0/8"]}, 80, "11.0.0.1", True),
        ({"exclude_inbound_cidrs": ["10.0.0.0/8"]}, 80, "a00::1", True),  # begins with the same bits
        ({"inbound_cidrs": ["10.0.0.0/8"]}, 80, "10.1.0.1", True),
        ({"inbound_cidrs": ["10.0.0.0/8"]}, 80, "11.1.0.1", False),
        ({"ipv6": "off"}, 80, "fd00::1", False),
        ({"ipv6": "reject"}, 80, "fd00::1", True),
    ],
)
def test_inbound_goes_by_port_source_and_family(capture: dict[str, object], port: int, host: str, meant: bool) -> None:
    assert scope(**capture).inbound(port, packed(host)) == meant


@pytest.mark.parametrize(
    ("capture", "host", "port", "uid", "meant"),
    [
        ({"outbound_cidrs": ["10.0.0.0/8", "fd00::/8"]}, "fd12::1", 80, 0, True),
        ({"outbound_cidrs": ["10.0.0.0/8", "fd00::/8"]}, "12.0.0.1", 80, 0, False),
        ({"outbound_cidrs": []}, "10.0.0.1", 80, 0, False),
        ({"exclude_outbound_cidrs": ["10.1.2.3"]}, "10.1.2.3", 80, 0, False),
        ({"exclude_outbound_cidrs": ["10.1.2.3"]}, "10.1.2.4", 80, 0, True),
        ({"outbound_ports": ["80"]}, "10.0.0.1", 81, 0, False),
        ({"exclude_outbound_ports": ["25"]}, "10.0.0.1", 25, 0, False),
        ({"exclude_uids": ["1000"]}, "10.0.0.1", 80, 1000, False),
        ({"exclude_uids": ["1000"]}, "10.0.0.1", 80, 1001, True),
        ({"outbound_uids": ["1000"]}, "10.0.0.1", 80, 1000, True),
        ({"outbound_uids": ["1000"]}, "10.0.0.1", 80, 1001, False),
    ],
)
def test_outbound_goes_by_destination_port_and_user(
    capture: dict[str, object], host: str, port: int, uid: int, meant: bool
) -> None:
    assert scope(**capture).outbound(packed(host), port, uid) == meant


@pytest.mark.parametrize(
    ("capture", "directions"),
    [
        ({"exclude_gids": ["27"]}, {Direction.OUTBOUND}),
        ({"exclude_interfaces": ["docker0"]}, {Direction.OUTBOUND, Direction.INBOUND}),
    ],
)
def test_what_no_socket_tells_is_not_guessed(capture: dict[str, object], directions: set[Direction]) -> None:
    judged = scope(**capture).not_judged
    assert set(judged) == directions
    assert all(why.startswith(f"capture.{name} is set") for name in capture for why in judged.values())


@pytest.mark.parametrize(
    ("capture", "why"),
    [
        ({}, ""),
        ({"ipv6": "off"}, "capture.ipv6"),
        ({"outbound_uids": ["7"]}, "capture.outbound_uids"),
        ({"exclude_uids": ["1000"]}, "capture.exclude_uids"),
        ({"outbound_ports": ["80"]}, "capture.outbound_ports"),
        ({"exclude_outbound_ports": ["443"]}, "capture.exclude_outbound_ports"),
        ({"outbound_cidrs": ["10.0.0.0/8"]}, "capture.outbound_cidrs"),
        ({"exclude_outbound_cidrs": ["fd00::/8"]}, "capture.exclude_outbound_cidrs"),
    ],
)
def test_the_setting_that_leaves_it_alone_is_named(capture: dict[str, object], why: str) -> None:
    assert scope(**capture).leaves_outbound(packed("fd00::1"), 443, 1000) == why
    if "uids" not in why:
        assert scope(**capture).leaves_outbound(packed("fd00::1"), 443, None) == why


@pytest.mark.parametrize(
    ("capture", "why"),
    [
        ({}, ""),
        ({"ipv6": "off"}, "capture.ipv6"),
        ({"inbound_ports": ["80"]}, "capture.inbound_ports"),
        ({"exclude_inbound_ports": ["443"]}, "capture.exclude_inbound_ports"),
        ({"inbound_cidrs": ["10.0.0.0/8"]}, "capture.inbound_cidrs"),
        ({"exclude_inbound_cidrs": ["fd00::/8"]}, "capture.exclude_inbound_cidrs"),
    ],
)
def test_the_same_of_what_comes_in(capture: dict[str, object], why: str) -> None:
    assert scope(**capture).leaves_inbound(443, packed("fd00::1")) == why
    assert scope(**capture).leaves_inbound(15108, packed("fd00::1")) == "the sidecar's own port"


def test_what_a_host_sends_to_itself_is_captured_by_name_only() -> None:
    assert scope().leaves_local(80) == "capture.loopback_ports"
    assert scope(loopback_ports=["80-90"]).leaves_local(85) == ""
