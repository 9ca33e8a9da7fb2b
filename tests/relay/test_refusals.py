"""A peer that does not take our certificate says so when our handshake is over, and hangs up: that has to be heard."""

import socket
import ssl

import pytest
import trio

from meshnet.errors import ConnectionFailed, Reason
from meshnet.net.python_tls import PythonTls
from meshnet.net.tls import ALPN, Tls
from meshnet.relay.native import NativeRelay
from tests.relay.rig import _files, context, tcp_pair

MANY = 50
_LINGER_RESET = b"\1\0\0\0\0\0\0\0"


def refuse(sock: socket.socket) -> None:
    """It believes no authority; its alert is sent, and an RST behind it, before anything else has come."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*_files()[:2])
    server.verify_mode = ssl.CERT_REQUIRED
    server.set_alpn_protocols([ALPN])
    sock.setblocking(True)
    with server.wrap_socket(sock, server_side=True, do_handshake_on_connect=False) as peer:
        with pytest.raises(ssl.SSLCertVerificationError):
            peer.do_handshake()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)


async def call(tls: Tls, sock: socket.socket, gone: trio.Event, reasons: list[Reason]) -> None:
    """What a sidecar does with a new tunnel."""
    channel = await tls.connect(sock, context(tls, is_server=False), None, 10.0)
    if not gone.is_set():  # or it would be another turn, in which the core hears by itself
        await gone.wait()
    try:
        await channel.send_all(b"may I?")
        await channel.receive()
    except ConnectionFailed as failure:
        reasons.append(failure.reason)
    finally:
        channel.close()


async def test_by_the_core() -> None:
    """Many at once: then some are taken over and spoken to in one round of the thread that relays."""
    async with NativeRelay() as relay:
        gone, reasons = trio.Event(), list[Reason]()
        async with trio.open_nursery() as nursery:
            peers = []
            for _ in range(MANY):
                near, far = tcp_pair()
                peers.append(far)
                nursery.start_soon(call, relay.tls, near, gone, reasons)
            for far in peers:
                await trio.lowlevel.wait_readable(far)
            for far in peers:  # while this thread does nothing else: when it goes on, all of it has happened
                refuse(far)
            gone.set()
        assert reasons == [Reason.TLS_NO_IDENTITY] * MANY


async def test_by_python() -> None:
    near, far = tcp_pair()
    gone, reasons = trio.Event(), list[Reason]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call, PythonTls(), near, gone, reasons)
        await trio.to_thread.run_sync(refuse, far)
        gone.set()
    assert reasons == [Reason.TLS_NO_IDENTITY]
