"""What every relay keeps in handshakes: with peers that die, wait for ever or speak something else; under renewal."""

import contextlib
import os
import socket
import ssl
import subprocess

import pytest
import trio
import trio.testing

from meshnet.errors import ConnectionFailed, Reason
from meshnet.relay import Relay, TunnelLeg
from meshnet.tunnel.protocol import Role, Tunnel
from tests.relay.leaks import nothing_left
from tests.relay.rig import (
    TunnelPair,
    _files,
    context,
    mesh_rig,
    read_exactly,
    tcp_pair,
    tunnel_pair,
)

MEGABYTE = 1 << 20
HALF_A_HELLO = b"\x16\x03\x01\x02\x00\x01"


async def shake(relay: Relay, sock: socket.socket, is_server: bool) -> None:
    """For what it raises."""
    ours = context(relay.tls, is_server=is_server)
    if is_server:
        (await relay.tls.accept(sock, ours, 10.0)).close()
    else:
        (await relay.tls.connect(sock, ours, None, 10.0)).close()


async def fails(
    relay: Relay, sock: socket.socket, is_server: bool, reasons: list[Reason], details: list[str] | None = None
) -> None:
    try:
        await shake(relay, sock, is_server)
    except ConnectionFailed as failure:
        reasons.append(failure.reason)
        if details is not None:
            details.append(failure.detail)


def kill_holder(sock: socket.socket) -> None:
    """Closes `sock` as the kernel does it for a process that is killed."""
    with subprocess.Popen(["sleep", "60"], pass_fds=[sock.fileno()], env=os.environ | {"LD_PRELOAD": ""}) as holder:
        sock.close()
        holder.kill()


class HandshakeContract:
    """Subclass it beside a fixture `relay`."""

    @pytest.mark.parametrize("is_server", [False, True])
    @pytest.mark.parametrize("how", ["fin", "rst", "killed", "garbage"])
    async def test_a_peer_that_dies_in_the_handshake_fails_it(self, relay: Relay, is_server: bool, how: str) -> None:
        async with nothing_left():
            near, far = tcp_pair()
            reasons: list[Reason] = []
            details: list[str] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fails, relay, near, is_server, reasons, details)
                if not is_server:
                    await trio.lowlevel.wait_readable(far)
                if how == "rst":
                    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                elif how == "garbage":
                    far.send(b"GET / HTTP/1.1\r\n\r\n")
                elif how == "killed":
                    far.send(HALF_A_HELLO)
                    await trio.testing.wait_all_tasks_blocked()
                    kill_holder(far)
                far.close()
            assert reasons == [Reason.TLS_HANDSHAKE]
            if how in ("fin", "rst"):
                assert details == ["the peer hung up during the handshake"]

    @pytest.mark.parametrize("is_server", [False, True])
    async def test_a_handshake_that_never_ends_is_cancelled_and_leaves_nothing(
        self, relay: Relay, is_server: bool
    ) -> None:
        async with nothing_left():
            near, far = tcp_pair()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(shake, relay, near, is_server)
                if is_server:
                    far.send(HALF_A_HELLO)
                else:
                    await trio.lowlevel.wait_readable(far)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            with far, contextlib.suppress(ConnectionResetError):
                far.setblocking(True)
                while far.recv(1000):  # the ClientHello, and then its end
                    pass

    @pytest.mark.parametrize("is_server", [False, True])
    async def test_a_peer_that_asks_for_no_protocol_is_not_spoken_to(self, relay: Relay, is_server: bool) -> None:
        plain = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if is_server else ssl.PROTOCOL_TLS_SERVER)
        plain.check_hostname = False
        plain.verify_mode = ssl.CERT_REQUIRED
        plain.load_cert_chain(*_files()[:2])
        plain.load_verify_locations(_files()[2])
        near, far = tcp_pair()
        far.setblocking(True)

        def speak() -> None:
            with contextlib.suppress(OSError), plain.wrap_socket(far, server_side=not is_server) as peer:
                assert peer.recv(100) == b""

        reasons: list[Reason] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, speak)
            with trio.fail_after(5):
                await fails(relay, near, is_server, reasons)
        assert reasons == [Reason.TLS_HANDSHAKE]

    async def test_a_handshake_whose_flights_do_not_fit_the_socket_goes_on(self, relay: Relay) -> None:
        near, far = tcp_pair()
        for sock in (near, far):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's least
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shake, relay, far, True)
            await shake(relay, near, False)

    async def test_a_certificate_renewed_under_load_hurts_nobody(self, relay: Relay) -> None:
        data = os.urandom(16 * MEGABYTE)
        old = await tunnel_pair(relay.tls, relay.tls)
        async with mesh_rig(relay, tunnel=old) as it, trio.open_nursery() as nursery:
            nursery.start_soon(it.client.send_all, data)
            received = await read_exactly(it.server, MEGABYTE)
            for _ in range(5):
                client, server = (relay.tls.context(*_files(), is_server=is_server) for is_server in (False, True))
                new = await _tunnel(relay, client, server)
                del client, server  # as whoever renews forgets them
                async with mesh_rig(relay, tunnel=new) as other:
                    await other.client.send_all(b"new")
                    assert await read_exactly(other.server, 3) == b"new"
                new.close()
            assert received + await read_exactly(it.server, 15 * MEGABYTE) == data
        old.close()


async def _tunnel(relay: Relay, client: object, server: object) -> TunnelPair:
    near, far = tcp_pair()
    legs: list[TunnelLeg] = []

    async def accept() -> None:
        legs.append(TunnelLeg(await relay.tls.accept(far, server, 10.0), Tunnel(Role.SERVER)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        dialled = await relay.tls.connect(near, client, None, 10.0)
    return TunnelPair(TunnelLeg(dialled, Tunnel(Role.CLIENT)), legs[0])
