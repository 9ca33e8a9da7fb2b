"""Where a redirected connection was going, asked of a real kernel with real REDIRECT rules."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from meshnet.errors import ConnectionFailed, Reason
from meshnet.model.address import Address
from meshnet.net.original import original_destination
from tests.world import Host, World

pytestmark = pytest.mark.netns


def test_an_ipv4_connection_tells_where_it_was_going(world: World) -> None:
    web = redirecting(world)
    with accepted(web, "127.0.0.1", "10.96.0.10") as sock:
        assert original_destination(sock) == Address("10.96.0.10", 80)


def test_an_ipv6_connection_tells_where_it_was_going_in_the_one_spelling(world: World) -> None:
    web = redirecting(world)
    with accepted(web, "::1", "fd96:0:0:0:0:0:0:10") as sock:
        assert original_destination(sock) == Address("fd96::10", 80)


def test_an_ipv4_connection_at_a_dual_stack_socket_tells_its_ipv4_destination_mitmproxy2869(world: World) -> None:
    web = redirecting(world)
    with accepted(web, "::", "10.96.0.10") as sock:
        assert sock.family == socket.AF_INET6
        assert sock.getsockname()[0] == "::ffff:127.0.0.1"
        assert original_destination(sock) == Address("10.96.0.10", 80)


@pytest.mark.parametrize(("listening", "dialled"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1")])
def test_a_direct_connection_beside_redirects_yields_our_own_address(
    world: World, listening: str, dialled: str
) -> None:
    web = redirecting(world)
    with accepted(web, listening, dialled, port=81) as sock:
        assert original_destination(sock) == Address(dialled, 81)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_connection_where_nothing_is_redirected_has_no_original_destination(world: World, address: str) -> None:
    web = world.host("web")
    with accepted(web, address, address, port=81) as sock:
        with pytest.raises(ConnectionFailed) as failed:
            original_destination(sock)
        assert failed.value.reason is Reason.NOT_REDIRECTED


def redirecting(world: World) -> Host:
    """A host that turns its own connections to port 80 to its port 81."""
    web = world.host("web")
    chain = "type nat hook output priority -100; tcp dport 80 redirect to :81;"
    web.run("nft", "-f", "-", stdin=f"table inet t {{ chain c {{ {chain} }}; }}")
    return web


@contextmanager
def accepted(host: Host, listening: str, dialled: str, port: int = 80) -> Iterator[socket.socket]:
    """The accepted end of a connection to `dialled`, at a listener on port 81."""
    with host.open_socket(socket.AF_INET6 if ":" in listening else socket.AF_INET) as listener:
        listener.bind((listening, 81))
        listener.listen()
        with host.connect(dialled, port):
            sock, _ = listener.accept()
            with sock:
                yield sock
