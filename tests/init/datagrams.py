"""UDP from one host to another."""

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from tests.init.kernel import TIMEOUT, address_of
from tests.init.sides import SO_MARK
from tests.world import Host


@contextmanager
def datagram(source: Host, target: Host, family: str, port: int, mark: int = 0) -> Iterator[socket.socket]:
    """One that was sent. Raises what the kernel says of it."""
    with closing(udp_socket(source, family)) as client:
        if mark:
            client.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        client.connect((address_of(target, family), port))
        client.send(b"are you there?")
        yield client


@contextmanager
def serving(host: Host, family: str, port: int) -> Iterator[socket.socket]:
    with closing(udp_socket(host, family)) as server:
        server.bind((address_of(host, family), port))
        yield server


def is_answered(source: Host, target: Host, family: str, port: int, mark: int = 0) -> bool:
    with serving(target, family, port) as server, datagram(source, target, family, port, mark) as client:
        return answers(server, client)


def answers(server: socket.socket, client: socket.socket) -> bool:
    """What came to `server` is answered, and the answer comes to `client`."""
    _, source = server.recvfrom(64)
    server.sendto(b"yes", source)
    return client.recv(64) == b"yes"


def is_refused(source: Host, target: Host, family: str, port: int) -> bool:
    """The sender is told at once, and nothing arrives."""
    with serving(target, family, port) as server:
        # A host's own program hears EPERM at once.
        refused = pytest.raises((ConnectionRefusedError, PermissionError))
        with refused, datagram(source, target, family, port) as client:
            client.recv(1)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recv(64)
    return True


def udp_socket(host: Host, family: str) -> socket.socket:
    made = host.open_socket(socket.AF_INET6 if family == "ipv6" else socket.AF_INET, socket.SOCK_DGRAM)
    made.settimeout(TIMEOUT)
    return made
