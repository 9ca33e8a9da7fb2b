"""Which addresses are local is the routing's word, whatever sockets may be bound to."""

import socket
from pathlib import Path

import pytest

from meshnet.net.addresses import LocalAddresses
from tests.world import World


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.10", "::1"])
def test_the_loopback_is_local(address: str) -> None:
    with LocalAddresses() as local:
        assert address in local


@pytest.mark.netns
@pytest.mark.parametrize("family", ["address", "address6"])
def test_an_interface_s_address_is_local_on_its_own_host_only(world: World, family: str) -> None:
    web, api = world.host("web"), world.host("api")
    with web.entered(), LocalAddresses() as local:
        assert getattr(web, family) in local
        assert getattr(api, family) not in local


@pytest.mark.netns
@pytest.mark.parametrize(("family", "setting"), [("address", "ipv4"), ("address6", "ipv6")])
def test_that_a_socket_may_be_bound_to_an_address_does_not_make_it_local(
    world: World, family: str, setting: str
) -> None:
    web, api = world.host("web"), world.host("api")
    with web.entered(), LocalAddresses() as local:
        Path(f"/proc/sys/net/{setting}/ip_nonlocal_bind").write_text("1")
        assert getattr(api, family) not in local
        assert "224.0.0.1" not in local


@pytest.mark.netns
def test_a_second_address_is_local_from_the_moment_it_is_there(world: World) -> None:
    web = world.host("web")
    with web.entered(), LocalAddresses() as local:
        assert "10.77.0.99" not in local
        web.configure("address add 10.77.0.99/24 dev eth0")
        assert "10.77.0.99" in local
        web.configure("address del 10.77.0.99/24 dev eth0")
        assert "10.77.0.99" not in local


@pytest.mark.netns
def test_what_the_kernel_was_asked_before_is_forgotten_when_a_link_or_a_route_goes(world: World) -> None:
    web = world.host("web")
    with web.entered(), LocalAddresses() as local:
        assert web.address in local
        web.configure("link del eth0")
        assert web.address not in local
        assert "10.99.0.1" not in local
        web.configure("route add local 10.99.0.0/24 dev lo")
        assert "10.99.0.1" in local
        web.configure("route del local 10.99.0.0/24 dev lo")
        assert "10.99.0.1" not in local


@pytest.mark.netns
def test_more_news_than_the_kernel_keeps_for_us_is_news_too(world: World) -> None:
    web = world.host("web")
    with web.entered(), LocalAddresses() as local:
        local._news.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        assert "10.77.0.99" not in local
        for _ in range(20):
            web.configure("route add local 10.99.0.0/24 dev lo")
            web.configure("route del local 10.99.0.0/24 dev lo")
        web.configure("address add 10.77.0.99/24 dev eth0")
        assert "10.77.0.99" in local
