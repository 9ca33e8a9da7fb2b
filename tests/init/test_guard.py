"""The strict guard and UDP: what should have been redirected and was not is refused, and what passes is told."""

import socket
from contextlib import ExitStack, closing

import pytest

from meshnet.model.address import Address
from meshnet.net.sockets import peer_address
from meshnet_init.backends import Counted
from meshnet_init.remove import remove
from tests.init.datagrams import is_answered, is_refused, serving, udp_socket
from tests.init.kernel import APP_PORT, COMMANDS, Lab, address_of, connect, listening
from tests.init.sides import SO_MARK, Sides, marked, route_through, transparent

pytestmark = pytest.mark.netns


def lose_the_redirects(lab: Lab) -> None:
    """As other software does that takes the whole table for its own (istio#61182)."""
    command = COMMANDS[lab.backend.name]
    if command == "nft":
        for chain in ("MESHNET_IN", "MESHNET_OUT", "MESHNET_MARK_IN"):
            lab.app.run("nft", "flush", "chain", "inet", "meshnet", chain, check=False)
        return
    for each in (command, command.replace("iptables", "ip6tables")):
        lab.app.run(each, "-t", "nat", "-F")
        lab.app.run(each, "-t", "mangle", "-F")


def test_with_all_rules_in_place_it_is_in_nobodys_way(lab: Lab, sides: Sides) -> None:
    lab.install(strict=True, exclude_inbound_ports=["9000"], exclude_outbound_ports=["9000"], loopback_ports=["7000"])

    sides.call_in(sides.inbound)
    sides.call_out(sides.outbound)
    with ExitStack() as stack:
        for host, call in ((lab.app, sides.call_in), (lab.peer, sides.call_out)):
            call(stack.enter_context(listening(host, sides.family, 9000)), 9000)
    connect(lab.app, sides.app, APP_PORT, sides.application, sides.inbound).close()
    connect(lab.app, "127.0.0.1" if sides.family == "ipv4" else "::1", 7000, sides.outbound).close()


@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
def test_when_the_redirects_are_lost_connections_are_refused_and_not_passed_in_plain_istio61182(
    lab: Lab, sides: Sides, mode: str
) -> None:
    lab.install(strict=True, inbound_mode=mode, exclude_inbound_ports=["9000"])
    opened = [sides.call_out(sides.outbound)]
    lose_the_redirects(lab)

    with pytest.raises(ConnectionRefusedError):
        lab.peer.connect(sides.app, APP_PORT)
    with pytest.raises(ConnectionRefusedError):
        lab.app.connect(sides.peer, APP_PORT)
    with listening(lab.app, sides.family, 9000) as excluded:
        sides.call_in(excluded, 9000)
    sides.call_out(sides.server, client=marked(lab.app, sides.family, 0x1000))
    if lab.backend.name == "nft":  # iptables has lost the last nat rule of the host, and with it all translation
        assert all(open_.works() for open_ in opened)


def test_without_it_they_would_have_passed(lab: Lab, sides: Sides) -> None:
    lab.install()
    lose_the_redirects(lab)

    sides.call_in(sides.application)
    sides.call_out(sides.server)


def test_what_comes_from_behind_a_bridge_is_refused_too(lab: Lab, family: str) -> None:
    far, behind = route_through(lab, family)
    lab.install(strict=True, reroute_interfaces=["eth0"])
    lose_the_redirects(lab)

    with listening(far, family, APP_PORT), pytest.raises(ConnectionRefusedError):
        lab.peer.connect(behind, APP_PORT)


def test_open_connections_live_through_its_coming_and_going(lab: Lab, sides: Sides) -> None:
    opened = [connect(lab.peer, sides.app, APP_PORT, sides.application)]
    opened.append(connect(lab.app, sides.peer, APP_PORT, sides.server))
    lab.install(strict=True, quic="reject", udp="reject")
    opened += [sides.call_in(sides.inbound), sides.call_out(sides.outbound)]
    lab.install()
    lab.install(strict=True)
    assert all(it.works() for it in opened)
    for it in opened[:2]:
        it.close()


def test_ipv6_can_be_refused_so_that_nothing_leaks(lab: Lab, sides: Sides) -> None:
    lab.install(ipv6="reject", exclude_inbound_ports=["9000"])

    if sides.family == "ipv4":
        sides.call_in(sides.inbound)
        sides.call_out(sides.outbound)
        return
    for source, target in ((lab.peer, sides.app), (lab.app, sides.peer)):
        with pytest.raises(ConnectionRefusedError):
            source.connect(target, APP_PORT)
    with listening(lab.app, "ipv6", 9000) as excluded:
        sides.call_in(excluded, 9000)
    connect(lab.app, "::1", APP_PORT, sides.application).close()


@pytest.mark.parametrize("values", [{"inbound_mode": "tproxy"}, {"drop_invalid": True}, {"strict": True}])
def test_ipv6_is_refused_however_connections_are_taken(lab: Lab, values: dict[str, object]) -> None:
    other = lab.world.host("other")
    lab.install(ipv6="reject", exclude_inbound_cidrs=[other.address6], **values)

    with transparent(lab.app, "ipv6") as proxy, listening(lab.app, "ipv6", APP_PORT) as application:
        with pytest.raises(ConnectionRefusedError):
            lab.peer.connect(lab.app.address6, APP_PORT)
        connect(other, lab.app.address6, APP_PORT, application, proxy).close()


def test_a_quic_client_learns_at_once_that_it_must_fall_back_istio1430(lab: Lab, sides: Sides) -> None:
    lab.install(quic="reject")

    with listening(lab.peer, sides.family, 443) as server:
        assert is_refused(lab.app, lab.peer, sides.family, 443)
        fallback = connect(lab.app, sides.peer, 443, sides.outbound, server)
        assert fallback.captured_from() == Address(sides.peer, 443)
        assert fallback.works()
        fallback.close()
    assert is_answered(lab.app, lab.peer, sides.family, 4433)
    assert is_answered(lab.app, lab.peer, sides.family, 443, mark=0x1000), "the proxy's own"


def test_other_udp_can_be_refused_but_for_what_the_host_cannot_do_without(lab: Lab, family: str) -> None:
    lab.install(udp="reject", quic="allow")

    assert is_refused(lab.app, lab.peer, family, 4433)
    assert is_answered(lab.app, lab.peer, family, 53)
    assert is_answered(lab.app, lab.peer, family, 443)


@pytest.mark.parametrize("settings", [{}, {"strict": True, "udp": "reject", "quic": "reject"}], ids=["plain", "strict"])
def test_who_asks_from_a_port_that_the_proxy_has_just_used_hears_its_own_resolver_istio33469(
    lab: Lab, family: str, settings: dict[str, object]
) -> None:
    """UDP is never translated, so that no entry of conntrack is there which could answer in somebody else's name."""
    other = lab.world.host("other")
    with ExitStack() as stack:
        resolvers = [stack.enter_context(serving(host, family, 53)) for host in (lab.peer, other)]
        with closing(udp_socket(lab.app, family)) as first:
            first.bind(("", 0))
            port = first.getsockname()[1]

        def ask(who: str, which: int) -> None:
            with closing(udp_socket(lab.app, family)) as client:
                client.setsockopt(socket.SOL_SOCKET, SO_MARK, 0x1000 if who == "proxy" else 0)
                client.bind(("", port))
                question, answer = f"{who} asks".encode(), f"resolver {which}".encode()
                where = (address_of((lab.peer, other)[which], family), 53)
                client.sendto(question, where)
                heard, source = resolvers[which].recvfrom(64)
                assert (heard, peer_address(source)) == (question, Address(address_of(lab.app, family), port))
                resolvers[which].sendto(answer, source)
                said, source = client.recvfrom(64)
                assert (said, peer_address(source)) == (answer, Address(*where))

        ask("application", 0)  # whose entry is older than the rules
        lab.install(**settings)
        for _ in range(2):
            for who, which in (("proxy", 1), ("application", 0), ("application", 1), ("proxy", 0)):
                ask(who, which)


def test_udp_that_passes_can_be_counted(lab: Lab, family: str) -> None:
    lab.install(quic="count", udp="count")

    assert is_answered(lab.app, lab.peer, family, 443)
    assert is_answered(lab.app, lab.peer, family, 4433)

    def hits(port: int | None) -> int:
        with lab.app.entered():
            installed = lab.backend.installed()
        assert installed is not None
        return sum(it.packets for it in installed.rules if counts(it, port))

    def counts(it: Counted, port: int | None) -> bool:
        return it.rule.udp and (it.rule.ports.first if it.rule.ports else None) == port

    assert (hits(443), hits(None)) == (1, 1)


def test_a_guard_that_is_taken_out_leaves_no_trace(lab: Lab) -> None:
    before = lab.rules_text()
    lab.install(strict=True, quic="reject", inbound_mode="tproxy")
    lab.install()
    assert "MESHNET_GUARD" not in lab.rules_text()
    assert "MESHNET_MARK" not in lab.rules_text()
    with lab.app.entered():
        remove(0.0)
    assert lab.rules_text() == before
