"""Connections for the relay tests: real sockets on the loopback, real TLS, the relay under test in between."""

import atexit
import contextlib
import ctypes
import datetime
import gc
import os
import shutil
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
from meshnet.net.python_tls import PythonChannel, PythonTls
from meshnet.net.tls import Channel, Tls
from meshnet.relay import Link, Outcome, PlainLeg, Relay, Tally, TunnelLeg
from meshnet.tunnel.protocol import Role, Tunnel
from tests.world import SLOWNESS, wait_for

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h; Python does not name it
OPEN = Open(host="127.0.0.1", port=80)
IDENTITY = "spiffe://test/ns/relay/sa/sidecar"


@dataclass
class Run:
    """One `relay.run`: what went in and how it ended."""

    link: Link
    _tally: Tally = field(default_factory=Tally)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    outcome: Outcome | None = None  # None while it runs, and for ever when cancelled

    @property
    def tally(self) -> Tally:
        self._tally.refresh()
        return self._tally

    async def result(self) -> Outcome:
        await self.ended.wait()
        assert self.outcome is not None
        return self.outcome

    async def go(self, relay: Relay) -> None:
        try:
            with self.scope:
                self.outcome = await relay.run(self.link, self._tally)
        finally:
            for leg in (self.link.client, self.link.endpoint):
                reusable = self.link.outcome is not None and self.link.outcome.reusable
                if isinstance(leg, TunnelLeg) and not reusable:
                    leg.channel.close()
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
        client, server = self.client, self.server
        assert isinstance(client.wire, Tunnel)
        assert isinstance(server.wire, Tunnel)
        await client.channel.send_all(client.wire.open(OPEN))
        assert await _frame(server.channel, server.wire) == OPEN
        await server.channel.send_all(server.wire.opened())
        assert await _frame(client.channel, client.wire) == Opened()

    def close(self) -> None:
        self.client.channel.close()
        self.server.channel.close()


async def _frame(channel: Channel, wire: Tunnel) -> Frame:
    frames: list[Frame] = []
    while not frames:  # what the last lease left behind is passed over
        frames = wire.receive(await channel.receive())
    (frame,) = frames
    return frame


class Peer:
    """A peer sidecar in the test's own hand: its end of a tunnel, frame by frame."""

    def __init__(self, leg: TunnelLeg) -> None:
        assert isinstance(leg.channel, PythonChannel)
        self.sock = leg.channel.sock
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


async def tunnel_pair(client: Tls, server: Tls, buffer: int = 0) -> TunnelPair:
    near, far = tcp_pair(buffer)
    channels: list[Channel] = []
    ours, theirs = context(client, is_server=False), context(server, is_server=True)

    async def accept() -> None:
        channels.append(await server.accept(far, theirs, 10.0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        dialled = await client.connect(near, ours, None, 10.0)
    return TunnelPair(TunnelLeg(dialled, Tunnel(Role.CLIENT)), TunnelLeg(channels[0], Tunnel(Role.SERVER)))


@contextlib.asynccontextmanager
async def running(relay: Relay, *runs: Run) -> AsyncIterator[None]:
    """Runs them side by side; what still runs at the end is cancelled."""
    async with trio.open_nursery() as nursery:
        for run in runs:
            nursery.start_soon(run.go, relay)
        try:
            with trio.fail_after(60 * SLOWNESS):
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
    both = tunnel or await tunnel_pair(relay.tls, relay.tls, buffer)
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


class _Borrowed(socket.socket):
    """A socket object for a descriptor that somebody else will close."""

    def __init__(self, fd: int) -> None:
        super().__init__(fileno=fd)

    def __del__(self) -> None:
        self.detach()


@dataclass
class HalfRig:
    """One sidecar's relay between an application and a peer sidecar in the test's own hand."""

    app: trio.SocketStream
    peer: Peer
    own: TunnelLeg
    run: Run
    own_plain_fd: int

    @property
    def own_wire(self) -> Tunnel:
        assert isinstance(self.own.wire, Tunnel)
        return self.own.wire

    @property
    def own_sock(self) -> socket.socket:
        """The relay's end of the tunnel, for a look at it."""
        channel = self.own.channel
        return _Borrowed(channel.sock.fileno() if isinstance(channel, PythonChannel) else channel.tunnel.fileno())

    @property
    def own_plain(self) -> socket.socket:
        """The relay's end of its connection with the application, for a look at it."""
        return _Borrowed(self.own_plain_fd)

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
    both = await tunnel_pair(relay.tls, PythonTls(), buffer)
    await both.open_lease()
    it = HalfRig(stream(app), Peer(both.server), both.client, Run(Link(PlainLeg(near), both.client)), near.fileno())
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
    both = await tunnel_pair(PythonTls(), relay.tls, buffer)
    await both.open_lease()
    it = HalfRig(stream(app), Peer(both.client), both.server, Run(Link(both.server, PlainLeg(far))), far.fileno())
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
    """But for pipes, of which a relay keeps some."""
    gc.collect()  # or it closes what an earlier test has left to it
    before = descriptors()
    yield
    wait_for(lambda: descriptors() == before, what="every descriptor closed")  # a thread of the relay's may close them


def descriptors() -> int:
    """That this process has, but for pipes."""
    return len(_open_files()) - 2 * pipes()


def pipes() -> int:
    """That this process has, with both ends."""
    return sum(name.startswith("pipe:") for name in _open_files()) // 2


def _open_files() -> list[str]:
    names = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that by which they are listed, and what another thread closes
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    return names


@cache
def _files() -> tuple[str, str, str]:
    """A certificate, its key and the bundle, under a CA made for this run."""
    ca_key, leaf_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
    leaf_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test sidecar")])
    ca = _certificate(ca_name, ca_name, ca_key, ca_key.public_key(), is_ca=True)
    leaf = _certificate(leaf_name, ca_name, ca_key, leaf_key.public_key(), is_ca=False)
    pem = leaf_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    folder = tempfile.mkdtemp(prefix="meshnet-relay-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    files = []
    for name, content in (
        ("leaf.pem", leaf.public_bytes(serialization.Encoding.PEM)),
        ("key.pem", pem),
        ("ca.pem", ca.public_bytes(serialization.Encoding.PEM)),
    ):
        files.append(os.path.join(folder, name))
        with open(files[-1], "wb") as file:
            file.write(content)
    return files[0], files[1], files[2]


def context(tls: Tls, *, is_server: bool) -> object:
    """Made once for each implementation."""
    key = (type(tls), is_server)
    if key not in _contexts:
        _contexts[key] = new_context(tls, is_server=is_server)
    return _contexts[key]


def new_context(tls: Tls, *, is_server: bool) -> object:
    return tls.context(*_files(), is_server=is_server)


_contexts: dict[tuple[type[Tls], bool], object] = {}


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
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(IDENTITY)]), critical=False)
        .sign(key, hashes.SHA256())
    )
