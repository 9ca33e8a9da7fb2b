"""Tunnels in the state a test begins with."""

from meshnet.codec.frames import Data, Frame, Open, Opened, Refused, Reset
from meshnet.tunnel.protocol import Role, Tunnel

ASKED = Open(host="10.0.0.1", port=5432, id="c-1")
REFUSED = Refused(reason="authz.denied", policy="lockdown")
GONE = Reset(reason="peer.rst")


def tunnels() -> tuple[Tunnel, Tunnel]:
    return Tunnel(Role.CLIENT), Tunnel(Role.SERVER)


def asked() -> tuple[Tunnel, Tunnel]:
    client, server = tunnels()
    assert server.receive(client.open(ASKED)) == [ASKED]
    return client, server


def opened() -> tuple[Tunnel, Tunnel]:
    client, server = asked()
    assert client.receive(server.opened()) == [Opened()]
    return client, server


def say(tunnel: Tunnel, payload: bytes) -> bytes:
    return tunnel.data(len(payload)) + payload


def heard(frames_read: list[Frame]) -> bytes:
    return b"".join(bytes(frame.payload) for frame in frames_read if isinstance(frame, Data))


def assert_free(client: Tunnel, server: Tunnel) -> None:
    """A lease with data both ways works, and ends."""
    assert client.idle
    assert server.idle
    assert server.receive(client.open(ASKED)) == [ASKED]
    assert client.receive(server.opened()) == [Opened()]
    assert heard(server.receive(say(client, b"again") + client.fin())) == b"again"
    assert heard(client.receive(say(server, b"and again") + server.fin())) == b"and again"
    assert client.lease_over
    assert server.lease_over
