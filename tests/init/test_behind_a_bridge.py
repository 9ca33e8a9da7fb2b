"""UDP and IPv6 from containers that are captured: let pass, counted and refused as the host's own are."""

from contextlib import ExitStack, closing

import pytest

from meshnet.model.address import Address
from meshnet_init.rule import Rule
from tests.init.datagrams import answers, datagram, is_answered, is_refused, serving
from tests.init.kernel import APP_PORT, COMMANDS, FAMILIES, OTHER_PORT, OUTBOUND, Lab, address_of, connect, listening
from tests.init.sides import behind_a_bridge
from tests.world import Host

pytestmark = pytest.mark.netns

REROUTED = {"reroute_interfaces": ["docker0"]}
REFUSING = {**REROUTED, "quic": "reject", "udp": "reject"}


@pytest.fixture
def container(lab: Lab) -> Host:
    return behind_a_bridge(lab, "docker0", 17)


@pytest.fixture
def routed(lab: Lab) -> Host:
    """Behind a bridge that no setting names: `app` is its router, and no more."""
    return behind_a_bridge(lab, "br0", 18)


def reached(source: Host, target: Host, family: str, port: int = APP_PORT) -> bool:
    """By TCP, and past the proxy."""
    with (
        listening(target, family, port) as server,
        closing(connect(source, address_of(target, family), port, server)) as opened,
    ):
        return opened.works()


def hits(lab: Lab, rule: Rule) -> int:
    """In both families together."""
    with lab.app.entered():
        installed = lab.backend.installed()
    assert installed is not None
    found = [it for it in installed.rules if it.rule.chain == rule.chain and it.rule.interface == rule.interface]
    return sum(it.packets for it in found if it.rule.udp == rule.udp and it.rule.ports == rule.ports)


def test_udp_is_refused_but_for_what_the_host_may_send_too(lab: Lab, family: str, container: Host) -> None:
    other = lab.world.host("other")
    lab.install(**REFUSING, exclude_outbound_cidrs=[other.address, other.address6])

    for source in (container, lab.app):
        assert is_refused(source, lab.peer, family, 443)
        assert is_refused(source, lab.peer, family, 4433)
        assert is_answered(source, lab.peer, family, 53), "DNS"
        assert is_answered(source, other, family, 443), "capture.exclude_outbound_cidrs"
    assert is_answered(container, lab.app, family, 4433), "to this host itself it comes in like anything else"


def test_quic_alone_is_refused_and_whoever_sends_it(lab: Lab, family: str, container: Host) -> None:
    lab.install(**REROUTED, quic="reject", outbound_gids=["4711"])  # a container's packets are nobody's of this host

    assert is_refused(container, lab.peer, family, 443)
    assert is_answered(container, lab.peer, family, 4433)


def test_udp_is_counted(lab: Lab, family: str, container: Host, routed: Host) -> None:
    lab.install(**REROUTED, udp="count")

    assert is_answered(container, lab.peer, family, 4433)
    assert is_answered(routed, lab.peer, family, 4433)
    assert hits(lab, Rule(chain="MESHNET_GUARD_FWD", interface="docker0", udp=True)) == 1
    assert hits(lab, Rule(chain="MESHNET_GUARD_OUT", udp=True)) == 0


def test_what_else_is_routed_and_what_is_sent_to_a_container_is_left_alone(
    lab: Lab, family: str, container: Host, routed: Host
) -> None:
    lab.install(**REFUSING, ipv6="reject", strict=True)

    for source, target in ((routed, lab.peer), (lab.peer, routed), (lab.peer, container), (routed, container)):
        assert is_answered(source, target, family, 443)
        assert is_answered(source, target, family, 4433)
        assert reached(source, target, family)


def test_what_is_open_already_goes_on(lab: Lab, family: str, container: Host) -> None:
    lab.install()  # conntrack knows datagrams only from then on
    with ExitStack() as stack:
        server = stack.enter_context(serving(lab.peer, family, 443))
        client = stack.enter_context(datagram(container, lab.peer, family, 443))
        listener = stack.enter_context(listening(lab.peer, family, APP_PORT))
        opened = stack.enter_context(closing(connect(container, address_of(lab.peer, family), APP_PORT, listener)))
        assert answers(server, client)
        lab.install(**REFUSING, ipv6="reject", strict=True)
        client.send(b"and now?")
        assert answers(server, client)
        assert opened.works()
        lab.install()
        assert opened.works()
        assert is_answered(container, lab.peer, family, 4433)


@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
@pytest.mark.parametrize("strict", [False, True])
def test_refused_ipv6_does_not_pass_in_plain_text(lab: Lab, container: Host, mode: str, strict: bool) -> None:
    other = lab.world.host("other")
    lab.install(
        **REROUTED,
        ipv6="reject",
        inbound_mode=mode,
        strict=strict,
        exclude_outbound_ports=[str(OTHER_PORT)],
        exclude_outbound_cidrs=[other.address6],
    )

    for source in (container, lab.app):
        with pytest.raises(ConnectionRefusedError):
            assert not reached(source, lab.peer, "ipv6")
        assert reached(source, lab.peer, "ipv6", OTHER_PORT), "capture.exclude_outbound_ports"
        assert reached(source, other, "ipv6"), "capture.exclude_outbound_cidrs"
        assert is_answered(source, lab.peer, "ipv6", 443), "UDP is let pass"
    with listening(lab.app, "ipv4", OUTBOUND) as outbound, listening(lab.peer, "ipv4", APP_PORT) as server:
        captured = connect(container, lab.peer.address, APP_PORT, outbound, server)
        assert captured.captured_from() == Address(lab.peer.address, APP_PORT)
        captured.close()


def test_a_jump_for_tcp_alone_as_older_versions_made_it_is_replaced(lab: Lab, container: Host) -> None:
    if lab.backend.name == "nft":  # which has no jumps
        return
    lab.install(**REFUSING)
    command = COMMANDS[lab.backend.name]
    for name in (command, command.replace("iptables", "ip6tables")):
        lab.app.run(name, "-D", "FORWARD", "-j", "MESHNET_GUARD_FWD")
        lab.app.run(name, "-I", "FORWARD", "-p", "tcp", "-j", "MESHNET_GUARD_FWD")
    lab.install(**REFUSING)
    assert "-p tcp -j MESHNET_GUARD_FWD" not in lab.rules_text()
    for family in FAMILIES:
        assert is_refused(container, lab.peer, family, 443)
