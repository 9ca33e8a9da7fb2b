"""A connection's endpoint leg among the sockets of this host, and what the kernel says of it."""

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import pytest

from meshnet.model.address import Address
from meshnet.model.connection import Connection, Direction, Security, TlsView
from meshnet.net.sock_diag import ESTABLISHED, LISTEN, TcpInfo, TcpSocket
from meshnet_cli.legs import endpoint_legs, found_among
from meshnet_cli.output import milliseconds
from tests.cli.conftest import Meshnet
from tests.cli.sidecar import INBOUND, OPEN, PLAIN, REFUSED, Sidecar, listing


def sockets(*found: tuple[str, int, str, int, TcpInfo | None]) -> list[tuple[TcpSocket, TcpInfo | None]]:
    pack = socket.inet_aton
    return [
        (TcpSocket(ESTABLISHED if info else LISTEN, pack(here), port, pack(there), to, 0, 1), info)
        for here, port, there, to, info in found
    ]


def info(rtt_us: int) -> TcpInfo:
    return TcpInfo(rtt_us, 1, 0, 0, 0)


def from_port(connection: Connection, port: int | None = 40_000) -> Connection:
    return msgspec.structs.replace(connection, leg_port=port)


def test_a_plain_leg_is_known_by_its_port_and_both_of_the_endpoint() -> None:
    there = sockets(
        ("10.9.0.2", 40_000, "10.9.0.4", 5433, info(1)),
        ("10.9.0.2", 40_000, "10.9.0.5", 5432, info(2)),
        ("10.9.0.2", 40_001, "10.9.0.4", 5432, info(3)),
        ("10.9.0.2", 40_000, "10.9.0.4", 5432, info(4)),
        ("0.0.0.0", 40_000, "0.0.0.0", 0, None),
    )
    assert found_among(there, [from_port(PLAIN), from_port(OPEN)]) == [info(4), None]
    assert found_among(there[:-2], [from_port(PLAIN)]) == [None]


def test_a_tunnel_goes_to_another_port_of_the_endpoint_s_host() -> None:
    there = sockets(("10.9.0.2", 40_000, "10.9.0.3", 15108, info(1)), ("10.9.0.2", 40_001, "10.9.0.3", 15108, info(2)))
    assert found_among(there, [from_port(OPEN, 40_001), from_port(OPEN), PLAIN]) == [info(2), info(1), None]


def test_what_came_through_a_tunnel_has_a_plain_leg_to_its_application() -> None:
    assert INBOUND.tls.mode is Security.MTLS
    there = sockets(("127.0.0.1", 40_000, "127.0.0.1", 9091, info(1)))
    assert found_among(there, [from_port(INBOUND)]) == [None]
    there += sockets(("127.0.0.1", 40_000, "127.0.0.1", 9090, info(2)))
    assert found_among(there, [from_port(INBOUND)]) == [info(2)]


def test_what_could_be_either_of_two_is_neither() -> None:
    """A port may serve two connections to one host, if they go to different ports there."""
    there = sockets(("10.9.0.2", 40_000, "10.9.0.3", 15108, info(1)), ("10.9.0.2", 40_000, "10.9.0.3", 80, info(2)))
    assert found_among(there, [from_port(OPEN)]) == [None]


def test_what_has_ended_or_has_no_endpoint_has_no_leg() -> None:
    there = sockets(("10.9.0.2", 40_000, "10.9.0.5", 9000, info(1)))
    ended = msgspec.structs.replace(from_port(REFUSED), endpoint="10.9.0.5:9000")
    nowhere = msgspec.structs.replace(from_port(PLAIN), endpoint="")
    assert found_among(there, [ended, nowhere]) == [None, None]
    assert endpoint_legs([ended]) == [None]


@dataclass
class Leg:
    """A connection as a sidecar on this host would tell of it, over a real socket."""

    connection: Connection
    sock: socket.socket

    @property
    def rtt_us(self) -> int:
        return int.from_bytes(self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 72)[68:], "little")


@pytest.fixture(params=[("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def leg(request: pytest.FixtureRequest) -> Iterator[Leg]:
    host, family = request.param
    with socket.create_server((host, 0), family=family) as server:
        port = server.getsockname()[1]
        with socket.create_connection((host, port)) as client, server.accept()[0] as app:
            client.sendall(b"question")
            assert app.recv(64) == b"question"
            app.sendall(b"answer")
            assert client.recv(64) == b"answer"
            endpoint = str(Address(host, port))
            yield Leg(msgspec.structs.replace(PLAIN, endpoint=endpoint, leg_port=client.getsockname()[1]), client)


def test_wide_says_how_far_the_endpoint_is(meshnet: Meshnet, sidecar: Sidecar, leg: Leg) -> None:
    unknown = msgspec.structs.replace(leg.connection, leg_port=None)
    sidecar.will_answer(listing(leg.connection, unknown))
    ours, other = meshnet("conns", "--columns", "leg_port,rtt,retrans", "--no-header").output.splitlines()
    assert ours.split() == [str(leg.connection.leg_port), milliseconds(leg.rtt_us / 1000), "0"]
    assert other.split() == ["-", "-", "-"]


def test_explain_says_it_too(meshnet: Meshnet, sidecar: Sidecar, leg: Leg) -> None:
    sidecar.connections = listing(leg.connection)
    sidecar.will_answer(leg.connection)
    lines = meshnet("explain", "k801").output.splitlines()
    port, rtt = leg.connection.leg_port, milliseconds(leg.rtt_us / 1000)
    assert f"leg         from our port {port}  round trip {rtt}, 0 retransmits" in lines
    told = json.loads(meshnet("explain", "k801", "-o", "json").output)
    assert (told["legPort"], told["tcp"]["rttUs"], told["tcp"]["retransmits"]) == (port, leg.rtt_us, 0)


def test_explain_of_what_has_ended_says_its_port(meshnet: Meshnet, sidecar: Sidecar) -> None:
    ended = from_port(REFUSED)
    sidecar.connections = listing(ended)
    sidecar.will_answer(ended)
    assert "leg         from our port 40000" in meshnet("explain", "k802").output.splitlines()
    assert json.loads(meshnet("explain", "k802", "-o", "json").output)["tcp"] is None


def test_an_inbound_connection_of_this_host_is_not_taken_for_its_other_end(leg: Leg) -> None:
    """Both ends of a leg to an application are sockets of this host."""
    inbound = msgspec.structs.replace(leg.connection, direction=Direction.INBOUND, tls=TlsView(mode=Security.MTLS))
    (found,) = endpoint_legs([inbound])
    assert found is not None
    assert found.bytes_received == len(b"answer")
