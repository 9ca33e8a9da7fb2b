"""Garbage: good bytes of every kind, spoilt by a seed, and who throws them."""

import errno
import random
import selectors
import socket
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest

from meshnet.codec import frames
from meshnet.codec.frames import Kind, Open
from tests.proxy.peer import Peer
from tests.world import Host

REQUESTS = (b'{"type":"explain","id":"3k2j5h1a"}\n', b'{"type":"conns","recent":60.0,"all":true}\n', b"")
"""To the admin socket."""
MOST_FRAMES = 16  # in one tunnel

_ENDS = (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN)
_AT_ONCE = {socket.AF_INET: 64, socket.AF_UNIX: 8}  # connections; the admin socket has not many places
_PATIENCE = 10.0  # seconds


def client_hello() -> bytes:
    """A good one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["meshnet/1"])
    out = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out).do_handshake()
    return out.read()


GOOD = {
    "bytes": b"",
    "hello": client_hello(),
    "http": b"GET /metrics HTTP/1.1\r\nHost: api\r\nContent-Length: 5\r\n\r\nhello",
    "proxy": b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x0a\x4d\x00\x02\x0a\x4d\x00\x03\x1f\x90\x00\x50",
}


def spoilt(good: bytes, dice: random.Random) -> bytes:
    """Some of its bytes changed, a piece gone, repeated, or more behind it; of nothing: anything."""
    data = bytearray(good or dice.randbytes(dice.randrange(1, 4000)))
    for _ in range(dice.randrange(1, 8)):
        data[dice.randrange(len(data))] = dice.randrange(256)
    start = dice.randrange(len(data))
    match dice.randrange(4):
        case 0:
            del data[max(1, start) :]
        case 1:
            data[start:start] = data[start : start + dice.randrange(64)]
        case 2:
            data += dice.randbytes(dice.randrange(600))
    return bytes(data)


class Frames:
    """Of somebody who may have a tunnel: good ones in any order, and one of four is spoilt."""

    def __init__(self, host: str, port: int) -> None:
        asked = frames.encode(Open(host=host, port=port, source="10.77.0.2:1234", id="3k2j5h1a"))
        empty = [bytes([kind, 0, 0, 0]) for kind in (Kind.OPENED, Kind.FIN, Kind.PING, Kind.PONG, Kind.GOAWAY)]
        self._good = [asked, asked, b"\x00\x00\x00\x05hello", *empty]

    def some(self, dice: random.Random) -> list[bytes]:
        chosen = dice.choices(self._good, k=dice.randrange(1, MOST_FRAMES + 1))
        return [good if dice.randrange(4) else spoilt(good, dice) for good in chosen]


def throw(host: Host, address: str, port: int, data: bytes) -> None:
    """All of it, and an end; until the sidecar has had enough, too."""
    throw_many(host, socket.AF_INET, (address, port), [data])


def throw_many(host: Host, family: socket.AddressFamily, where: tuple[str, int] | str, pieces: Iterable[bytes]) -> None:
    """Each by a connection of its own, many at once. Raises TimeoutError when the sidecar holds on to one."""
    waiting = iter(pieces)
    with host.entered(), selectors.DefaultSelector() as selector:

        def begin(count: int) -> None:
            for piece in islice(waiting, count):
                client = socket.socket(family)
                client.setblocking(False)
                if (error := client.connect_ex(where)) not in (0, errno.EINPROGRESS):
                    raise OSError(error, f"{where} is not to be reached")
                selector.register(client, selectors.EVENT_WRITE, memoryview(piece))

        begin(_AT_ONCE[family])
        while selector.get_map():
            if not (ready := selector.select(_PATIENCE)):
                raise TimeoutError(f"{where} holds on to {len(selector.get_map())}")
            for key, _ in ready:
                client = key.fileobj
                assert isinstance(client, socket.socket)
                if _is_over(client, key.data, selector):
                    selector.unregister(client)
                    client.close()
                    begin(1)


def _is_over(client: socket.socket, left: memoryview, selector: selectors.BaseSelector) -> bool:
    try:
        if not left:
            return not client.recv(65536)
        left = left[client.send(left) :]
        if not left:
            client.shutdown(socket.SHUT_WR)
        selector.modify(client, selectors.EVENT_WRITE if left else selectors.EVENT_READ, left)
        return False
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _ENDS:
            return True
        raise


def throw_frames(source: Host, target: Host, context: ssl.SSLContext, some: Iterable[bytes]) -> None:
    """Through a tunnel of their own, and an end; until the sidecar ends it too."""
    with Peer(source, target, context) as peer:
        peer.sock.settimeout(_PATIENCE)
        try:
            peer.sock.sendall(b"".join(some))
            peer.sock.shutdown(socket.SHUT_WR)
            while peer.sock.recv(65536):
                pass
        except OSError as error:
            if not isinstance(error, ssl.SSLError) and error.errno not in _ENDS:
                raise


@contextmanager
def ports_again_at_once(host: Host) -> Iterator[None]:
    """A port whose connection is over is free after a second, not after a minute."""
    with host.entered():
        file = Path("/proc/sys/net/ipv4/tcp_tw_reuse")
        before = file.read_text()
        file.write_text("1")
    try:
        yield
    finally:
        with host.entered():
            file.write_text(before)
