"""What is captured and what is left alone: real connections through real rules, on each backend, in both families."""

import socket

import pytest

from meshnet.model.address import Address
from tests.init.kernel import (
    APP_PORT,
    OTHER_PORT,
    Lab,
    address_of,
    connect,
    listening,
)
from tests.init.sides import Sides, made_by, marked, prefix, route_through
from tests.world import Host

pytestmark = pytest.mark.netns


def test_both_directions_come_to_the_proxy_which_learns_where_they_were_going(lab: Lab, sides: Sides) -> None:
    lab.install()

    assert sides.call_in(sides.inbound).captured_from() == Address(sides.app, APP_PORT)
    assert sides.call_out(sides.outbound).captured_from() == Address(sides.peer, APP_PORT)


def test_one_port_of_a_client_for_two_captured_ports_is_two_connections_istio38982(lab: Lab, sides: Sides) -> None:
    """Both come to one port of the proxy: only a second translation, of the kernel's own, tells them apart there."""
    lab.install()

    for host, target, captured in ((lab.peer, sides.app, sides.inbound), (lab.app, sides.peer, sides.outbound)):
        clients = [from_port(host, sides.family, 40001) for _ in range(2)]
        ports = (APP_PORT, OTHER_PORT)
        both = [
            connect(host, target, port, captured, client=client) for port, client in zip(ports, clients, strict=True)
        ]
        assert [each.client.getsockname()[1] for each in both] == [40001, 40001]
        assert [each.captured_from() for each in both] == [Address(target, APP_PORT), Address(target, OTHER_PORT)]
        for each in both:
            assert each.works()
        both[0].client.sendall(b"first")
        both[1].client.sendall(b"other")
        assert [each.server.recv(5) for each in both] == [b"first", b"other"]
        for each in both:
            each.close()


def from_port(host: Host, family: str, port: int) -> socket.socket:
    """Several may be bound to it, for each goes to another address."""
    client = host.open_socket(socket.AF_INET6 if family == "ipv6" else socket.AF_INET)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.bind(("", port))
    return client


def test_a_port_nobody_listens_on_is_captured_all_the_same(lab: Lab, sides: Sides) -> None:
    lab.install()

    assert sides.call_in(sides.inbound, 9999).captured_from() == Address(sides.app, 9999)


def test_without_a_proxy_connections_are_refused_and_never_go_on_in_plain(lab: Lab, family: str) -> None:
    lab.install()

    with listening(lab.app, family, APP_PORT), listening(lab.peer, family, APP_PORT):
        for source, target in ((lab.peer, lab.app), (lab.app, lab.peer)):
            with pytest.raises(ConnectionRefusedError):
                source.connect(address_of(target, family), APP_PORT)


@pytest.mark.parametrize("excluded", [["8080"], ["8000-8100"], ["1-8080", "9000"]])
def test_excluded_ports_are_left_alone(lab: Lab, sides: Sides, excluded: list[str]) -> None:
    lab.install(exclude_inbound_ports=excluded, exclude_outbound_ports=excluded)

    sides.call_in(sides.application)
    sides.call_out(sides.server)
    sides.call_in(sides.inbound, 8101)
    sides.call_out(sides.outbound, 8101)


def test_only_included_ports_are_captured(lab: Lab, sides: Sides) -> None:
    lab.install(inbound_ports=["8081", "9000-9100"], outbound_ports=["8081", "9000-9100"])

    sides.call_in(sides.application)
    sides.call_out(sides.server)
    for port in (OTHER_PORT, 9000, 9050, 9100):
        sides.call_in(sides.inbound, port)
        sides.call_out(sides.outbound, port)


def test_two_hundred_single_ports_are_no_trouble(lab: Lab, sides: Sides) -> None:
    lab.install(exclude_inbound_ports=[str(port) for port in range(8080, 8480, 2)])

    sides.call_in(sides.application)
    sides.call_in(sides.inbound, OTHER_PORT)


def test_excluded_clients_reach_the_application_themselves(lab: Lab, sides: Sides) -> None:
    other = lab.world.host("other")
    lab.install(exclude_inbound_cidrs=[f"{lab.peer.address}/32", f"{lab.peer.address6}/128"])

    sides.call_in(sides.application)
    sides.call_in(sides.inbound, source=other)


@pytest.mark.parametrize("bits", [(32, 128), (31, 127), (24, 64), (11, 13)])
def test_excluded_destinations_are_reached_directly(lab: Lab, sides: Sides, bits: tuple[int, int]) -> None:
    lab.install(exclude_outbound_cidrs=[prefix(lab.peer, "ipv4", bits[0]), prefix(lab.peer, "ipv6", bits[1])])

    sides.call_out(sides.server)
    sides.call_in(sides.inbound)


def test_only_included_destinations_are_captured(lab: Lab, sides: Sides) -> None:
    lab.install(outbound_cidrs=["192.168.0.0/16", "2001:db8::/32"])
    sides.call_out(sides.server)

    lab.install(outbound_cidrs=[prefix(lab.peer, "ipv4", 24), prefix(lab.peer, "ipv6", 64)])
    sides.call_out(sides.outbound)


def test_the_proxys_mark_lets_its_connections_pass(lab: Lab, sides: Sides) -> None:
    lab.install()

    sides.call_out(sides.server, client=marked(lab.app, sides.family, 0x1000))
    sides.call_out(sides.outbound, client=marked(lab.app, sides.family, 0x4D02))


def test_the_proxys_group_lets_its_connections_pass(lab: Lab, sides: Sides, real_root: bool) -> None:
    # Without root there is no group but 0, which is everybody's here: then nobody is captured.
    group, others = (15137, True) if real_root else (0, False)
    lab.install(gid=group)

    sides.call_out(sides.server, client=made_by(lab.app, sides.family, "gid", group))
    sides.call_out(sides.outbound if others else sides.server)


@pytest.mark.parametrize("uid", [15137, 0])
def test_an_application_with_the_proxy_s_own_uid_is_captured_istio4286(
    lab: Lab, sides: Sides, real_root: bool, uid: int
) -> None:
    """Trap 8: its primary group alone lets the proxy pass, neither its user nor that group beside another one."""
    if not real_root:  # then there is no other user here
        return
    lab.install(gid=15137, strict=True)

    captured = sides.call_out(sides.outbound, client=made_by(lab.app, sides.family, "ids", (uid, 15138)))
    assert captured.captured_from() == Address(sides.peer, APP_PORT)
    sides.call_out(sides.server, client=made_by(lab.app, sides.family, "ids", (uid, 15137)))


def test_a_group_that_does_not_exist_here_captures_everybody_else(lab: Lab, sides: Sides, real_root: bool) -> None:
    lab.install(gid=15138)

    with lab.app.entered():
        installed = lab.backend.installed()
    assert installed is not None
    assert any(counted.rule.gid == 15138 for counted in installed.rules) == real_root
    sides.call_out(sides.outbound)


@pytest.mark.parametrize("kind", ["uid", "gid"])
def test_excluded_users_and_groups_are_left_alone(lab: Lab, sides: Sides, real_root: bool, kind: str) -> None:
    # Without root there is no id but 0, which is everybody's here.
    number, others = (4711, sides.outbound) if real_root else (0, sides.server)
    lab.install(gid=15138, **{f"exclude_{kind}s": [str(number), "4712"]})

    sides.call_out(sides.server, client=made_by(lab.app, sides.family, kind, number))
    sides.call_out(others)
    sides.call_in(sides.inbound)


@pytest.mark.parametrize("interface", ["eth0", "eth*"])
def test_excluded_interfaces_are_left_alone_both_ways(lab: Lab, sides: Sides, interface: str) -> None:
    lab.install(exclude_interfaces=["docker0", interface])

    sides.call_in(sides.application)
    sides.call_out(sides.server)


def test_other_interfaces_are_captured(lab: Lab, sides: Sides) -> None:
    lab.install(exclude_interfaces=["eth", "eth00", "eth0.7", "veth*"])

    sides.call_in(sides.inbound)
    sides.call_out(sides.outbound)


def test_the_sidecars_own_ports_are_reached_directly(lab: Lab, sides: Sides) -> None:
    lab.install()

    for port in (15108, 15120):
        with listening(lab.app, sides.family, port) as listener:
            sides.call_in(listener, port)


def test_loopback_and_own_address_stay_on_the_host_istio23369(lab: Lab, sides: Sides) -> None:
    lab.install()

    for target in ("127.0.0.1" if sides.family == "ipv4" else "::1", sides.app):
        kept = connect(lab.app, target, APP_PORT, sides.application, sides.inbound, sides.outbound)
        assert kept.works()
        kept.close()


def test_chosen_ports_are_captured_also_on_loopback(lab: Lab, sides: Sides) -> None:
    lab.install(loopback_ports=["8080"])

    loopback = "127.0.0.1" if sides.family == "ipv4" else "::1"
    for target in (loopback, sides.app):
        captured = connect(lab.app, target, APP_PORT, sides.outbound, sides.inbound, sides.application)
        assert captured.captured_from() == Address(target, APP_PORT)
        captured.close()
    with listening(lab.app, sides.family, OTHER_PORT) as other:
        connect(lab.app, loopback, OTHER_PORT, other, sides.outbound).close()
    client = marked(lab.app, sides.family, 0x1000)
    connect(lab.app, loopback, APP_PORT, sides.application, sides.outbound, client=client).close()
    sides.call_out(sides.outbound)


def test_forwarded_traffic_passes(lab: Lab, sides: Sides) -> None:
    far, behind = route_through(lab, sides.family)
    lab.install()

    with listening(far, sides.family, APP_PORT) as listener:
        passing = connect(lab.peer, behind, APP_PORT, listener, sides.inbound, sides.outbound)
        assert passing.works()
        passing.close()


def test_ipv6_can_be_left_alone(lab: Lab, sides: Sides) -> None:
    lab.install(ipv6="off")

    sides.call_in(sides.inbound if sides.family == "ipv4" else sides.application)
    sides.call_out(sides.outbound if sides.family == "ipv4" else sides.server)
