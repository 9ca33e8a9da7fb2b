"""Connections for the relay tests: real sockets on the loopback, real TLS, the relay under test in between."""

import contextlib
import ctypes
import datetime
import os
import socket
import ssl
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from meshnet.codec.frames import Data, Frame, Open, Opened
from meshnet.errors import EndedBy
from meshnet.relay import Link, Outcome, PlainLeg, Relay, Tally, TunnelLeg
from meshnet.tunnel.protocol import Role, Tunnel

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h; Python does not name it
OPEN = Open(host="127.0.0.1", port=80)


@dataclass
class Run:
    """One `relay.run`: what went in and how it ended."""

    link: Link
    tally: Tally = field(default_factory=Tally)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    outcome: Outcome | None = None  # None while it runs, and for ever when cancelled

    async def result(self) -> Outcome:
        await self.ended.wait()
        assert self.outcome is not None
        return self.outcome

    async def go(self, relay: Relay) -> None:
        try:
            with self.scope:
                self.outcome = await relay.run(self.link, self.tally)
        finally:
            for leg in (self.link.client, self.link.endpoint):
                reusable = self.link.outcome is not None and self.link.outcome.reusable
                if isinstance(leg, TunnelLeg) and not reusable:
                    leg.sock.close()
            self.ended.set()


@dataclass
class Rig:
    """`client` and `server` are the applications; `runs` lie between them, the client's first."""

    client: trio.SocketStream
    server: trio.SocketStream
    runs: list[Run]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def last(self) -> Run:
        return self.runs[-1]

    async def ended(self) -> None:
        for run in self.runs:
            await run.ended.wait()


@dataclass
class TunnelPair:
    """Both ends of one tunnel."""

    client: TunnelLeg
    server: TunnelLeg

    async def open_lease(self) -> None:
        """Relays get leases that are up."""
        client, server = Peer(self.client), Peer(self.server)
        await client.send(client.wire.open(OPEN))
        assert await server.frame() == OPEN
        await server.send(server.wire.opened())
        assert await client.frame() == Opened()

    def close(self) -> None:
        self.client.sock.close()
        self.server.sock.close()


class Peer:
    """A peer sidecar in the test's own hand: its end of a tunnel, frame by frame."""

    def __init__(self, leg: TunnelLeg) -> None:
        self.sock = leg.sock
        assert isinstance(leg.wire, Tunnel)
        self.wire = leg.wire
        self._frames: list[Frame] = []

    async def send(self, data: bytes) -> None:
        while True:
            try:
                self.sock.send(data)
                return
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self.sock)

    async def send_data(self, data: bytes) -> None:
        await self.send(self.wire.data(len(data)) + data)

    async def record(self) -> bytes:
        """What one TLS record carried. Raises OSError for an RST, which Python's ssl takes for an end of file."""
        while True:
            if error := self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, os.strerror(error))
            try:
                data = self.sock.recv(32768)
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self.sock)
                continue
            assert data, "the tunnel was closed"
            return data

    async def frame(self) -> Frame:
        while not self._frames:
            self._frames += self.wire.receive(await self.record())
        return self._frames.pop(0)

    async def read(self) -> Frame | bytes:
        """The next frame; of DATA the payload."""
        frame = await self.frame()
        return bytes(frame.payload) if isinstance(frame, Data) else frame


def tcp_pair(buffer: int = 0) -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection, non-blocking; `buffer`: bytes for each socket's buffers, if not the kernel's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.socket()
        for sock in (listener, near):
            if buffer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        near.connect(listener.getsockname())
        far, _ = listener.accept()
    for sock in (near, far):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


def stream(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def tunnel_pair(buffer: int = 0) -> TunnelPair:
    client_context, server_context = contexts()
    near, far = tcp_pair(buffer)
    client = client_context.wrap_socket(near, do_handshake_on_connect=False)
    server = server_context.wrap_socket(far, server_side=True, do_handshake_on_connect=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_handshake, client)
        nursery.start_soon(_handshake, server)
    return TunnelPair(TunnelLeg(client, Tunnel(Role.CLIENT)), TunnelLeg(server, Tunnel(Role.SERVER)))


async def _handshake(sock: ssl.SSLSocket) -> None:
    while True:
        try:
            sock.do_handshake()
            return
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(sock)


@contextlib.asynccontextmanager
async def running(relay: Relay, *runs: Run) -> AsyncIterator[None]:
    """Runs them side by side; what still runs at the end is cancelled."""
    async with trio.open_nursery() as nursery:
        for run in runs:
            nursery.start_soon(run.go, relay)
        try:
            with trio.fail_after(60):
                yield
        finally:
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def plain_rig(
    relay: Relay, *, buffer: int = 0, prepare: Callable[[Rig], None] = lambda it: None
) -> AsyncIterator[Rig]:
    """client - relay - server; `prepare` is called before the relay gets the link."""
    client, near = tcp_pair(buffer)
    server, far = tcp_pair(buffer)
    it = Rig(stream(client), stream(server), [Run(Link(PlainLeg(near), PlainLeg(far)))])
    prepare(it)
    async with it.client, it.server, running(relay, *it.runs):
        yield it


@contextlib.asynccontextmanager
async def mesh_rig(
    relay: Relay,
    *,
    buffer: int = 0,
    prepare: Callable[[Rig], None] = lambda it: None,
    tunnel: TunnelPair | None = None,
) -> AsyncIterator[Rig]:
    """client - relay = tunnel = relay - server"""
    client, near = tcp_pair(buffer)
    server, far = tcp_pair(buffer)
    both = tunnel or await tunnel_pair(buffer)
    await both.open_lease()
    runs = [Run(Link(PlainLeg(near), both.client)), Run(Link(both.server, PlainLeg(far)))]
    it = Rig(stream(client), stream(server), runs)
    prepare(it)
    try:
        async with it.client, it.server, running(relay, *it.runs):
            yield it
    finally:
        if tunnel is None:
            both.close()


@dataclass
class HalfRig:
    """One sidecar's relay between an application and a peer sidecar in the test's own hand."""

    app: trio.SocketStream
    peer: Peer
    own: TunnelLeg
    run: Run

    @property
    def own_wire(self) -> Tunnel:
        assert isinstance(self.own.wire, Tunnel)
        return self.own.wire

    @property
    def own_sock(self) -> ssl.SSLSocket:
        return self.own.sock

    @property
    def own_plain(self) -> socket.socket:
        """The relay's end of its connection with the application."""
        leg = self.run.link.client if self.is_outbound else self.run.link.endpoint
        assert isinstance(leg, PlainLeg)
        return leg.sock

    @property
    def is_outbound(self) -> bool:
        return self.own is self.run.link.endpoint

    @property
    def who(self) -> EndedBy:
        """Who the application is."""
        return EndedBy.CLIENT if self.is_outbound else EndedBy.SERVER

    @property
    def far(self) -> EndedBy:
        """Who is behind the peer sidecar."""
        return EndedBy.SERVER if self.is_outbound else EndedBy.CLIENT

    @property
    def counts(self) -> tuple[int, int]:
        """Bytes from the application into the tunnel, and the other way."""
        sent, received = self.run.tally.sent, self.run.tally.received
        return (sent, received) if self.is_outbound else (received, sent)


@contextlib.asynccontextmanager
async def outbound_rig(
    relay: Relay, *, buffer: int = 0, prepare: Callable[[HalfRig], None] = lambda it: None
) -> AsyncIterator[HalfRig]:
    """app - relay = peer"""
    app, near = tcp_pair(buffer)
    both = await tunnel_pair(buffer)
    await both.open_lease()
    it = HalfRig(stream(app), Peer(both.server), both.client, Run(Link(PlainLeg(near), both.client)))
    prepare(it)
    try:
        async with it.app, running(relay, it.run):
            yield it
            it.peer.sock.close()  # or a relay that is cancelled now would wait for it
    finally:
        both.close()


@contextlib.asynccontextmanager
async def inbound_rig(
    relay: Relay, *, buffer: int = 0, prepare: Callable[[HalfRig], None] = lambda it: None
) -> AsyncIterator[HalfRig]:
    """peer = relay - app"""
    app, far = tcp_pair(buffer)
    both = await tunnel_pair(buffer)
    await both.open_lease()
    it = HalfRig(stream(app), Peer(both.client), both.server, Run(Link(both.server, PlainLeg(far))))
    prepare(it)
    try:
        async with it.app, running(relay, it.run):
            yield it
            it.peer.sock.close()  # or a relay that is cancelled now would wait for it
    finally:
        both.close()


def reset(app: trio.SocketStream) -> None:
    """Closes with RST."""
    app.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    app.socket.close()


def fall_silent(sock: socket.socket | trio.socket.SocketType) -> None:
    """Makes the kernel drop all that comes for `sock`, unanswered: as if its host were gone."""
    nothing = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))  # BPF: return 0, bpf(4) of the BSDs
    program = struct.pack("HL", 1, ctypes.addressof(nothing))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


async def read_all(app: trio.SocketStream) -> bytes:
    """Up to the FIN."""
    return b"".join([piece async for piece in app])


async def read_exactly(app: trio.SocketStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = await app.receive_some(size - len(data))
        assert piece, f"FIN after {len(data)} of {size} bytes"
        data += piece
    return bytes(data)


async def cpu_share() -> float:
    """Of one processor, by this process, over a fifth of a second in which the test itself does nothing."""
    cpu, wall = time.process_time(), time.monotonic()
    await trio.sleep(0.2)
    return (time.process_time() - cpu) / (time.monotonic() - wall)


@contextlib.contextmanager
def no_descriptors_leaked() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() == before


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@cache
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Mutual TLS 1.3 under a CA made for this run: the client's context, the server's."""
    ca_key, leaf_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
    leaf_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test sidecar")])
    ca = _certificate(ca_name, ca_name, ca_key, ca_key.public_key(), is_ca=True)
    leaf = _certificate(leaf_name, ca_name, ca_key, leaf_key.public_key(), is_ca=False)
    pem = leaf_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    made = []
    for protocol in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER):
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=ca.public_bytes(serialization.Encoding.PEM).decode())
        with tempfile.NamedTemporaryFile() as file:
            file.write(leaf.public_bytes(serialization.Encoding.PEM) + pem)
            file.flush()
            context.load_cert_chain(file.name)
        made.append(context)
    return made[0], made[1]


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    public_key: ec.EllipticCurvePublicKey,
    *,
    is_ca: bool,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
