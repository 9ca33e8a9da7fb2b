"""Inbound TPROXY: connections come to a transparent listener as they were sent, and past it they never go."""

import socket
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from meshnet.model.address import Address
from meshnet.net.sockets import peer_address
from meshnet_init.remove import remove
from tests.init.kernel import APP_PORT, OTHER_PORT, Lab, address_of, connect, listening
from tests.init.sides import transparent
from tests.world import wait_for

pytestmark = pytest.mark.netns


def test_it_is_as_it_was_sent_and_its_destination_its_own_address(lab: Lab, family: str) -> None:
    lab.install(inbound_mode="tproxy", exclude_inbound_ports=[str(OTHER_PORT)])

    with ExitStack() as stack:
        proxy = stack.enter_context(transparent(lab.app, family))
        application = stack.enter_context(listening(lab.app, family, APP_PORT))
        captured = connect(lab.peer, address_of(lab.app, family), APP_PORT, proxy, application)
        assert captured.works()
        assert captured.captured_from() == Address(address_of(lab.app, family), APP_PORT)
        assert peer_address(captured.server.getpeername()) == peer_address(captured.client.getsockname())
        captured.close()
        other = stack.enter_context(listening(lab.app, family, OTHER_PORT))
        connect(lab.peer, address_of(lab.app, family), OTHER_PORT, other, proxy).close()
        connect(lab.app, address_of(lab.app, family), APP_PORT, application, proxy).close()


def test_where_nobody_listens_it_does_not_go_on_to_the_application_in_plain(lab: Lab, family: str) -> None:
    """What nftables' tproxy does by itself: a packet that finds no listener goes on."""
    lab.install(inbound_mode="tproxy")

    def stopped() -> int:
        with lab.app.entered():
            installed = lab.backend.installed()
        assert installed is not None
        return sum(it.packets for it in installed.rules if it.rule.verdict == "drop" or it.rule.tproxy)

    with listening(lab.app, family, APP_PORT) as application, closing(lab.peer.open_socket(kind(family))) as client:
        client.setblocking(False)
        client.connect_ex((address_of(lab.app, family), APP_PORT))
        wait_for(stopped, what="the SYN is stopped")
        application.setblocking(False)
        with pytest.raises(BlockingIOError):
            application.accept()


@pytest.mark.parametrize("value", ["1", "2"])
def test_neither_rp_filter_nor_src_valid_mark_is_in_its_way_tailscale19796(lab: Lab, value: str) -> None:
    with lab.app.entered():
        for interface in ("all", "eth0", "lo"):
            for name in ("rp_filter", "src_valid_mark"):
                text = "1" if name == "src_valid_mark" else value
                Path(f"/proc/sys/net/ipv4/conf/{interface}/{name}").write_text(text)
    lab.install(inbound_mode="tproxy")

    with transparent(lab.app, "ipv4") as proxy:
        captured = connect(lab.peer, lab.app.address, APP_PORT, proxy)
        assert captured.works()
        captured.close()


@pytest.mark.parametrize("guarded", [False, True])
def test_open_connections_live_through_installation_and_removal_istio48876(
    lab: Lab, family: str, guarded: bool
) -> None:
    app = address_of(lab.app, family)
    with ExitStack() as stack:
        application = stack.enter_context(listening(lab.app, family, APP_PORT))
        direct = connect(lab.peer, app, APP_PORT, application)
        stack.callback(direct.close)
        lab.install(inbound_mode="tproxy", strict=guarded)
        assert direct.works()

        with transparent(lab.app, family) as proxy:
            captured = connect(lab.peer, app, APP_PORT, proxy, application)
        stack.callback(captured.close)
        lab.install()
        lab.install(inbound_mode="tproxy", strict=guarded)
        assert captured.works()
        with lab.app.entered():
            remove(0.0)
            assert lab.backend.installed() is None
        assert direct.works()
        assert captured.works()


def kind(family: str) -> socket.AddressFamily:
    return socket.AF_INET6 if family == "ipv6" else socket.AF_INET
