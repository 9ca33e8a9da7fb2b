"""Garbage on every port. MESHNET_GARBAGE says how many pieces of each kind (200); a seed makes them all."""

import errno
import os
import random
import socket
import ssl

import pytest

from meshnet.codec import frames
from meshnet.codec.frames import Open
from tests.faults.conftest import once
from tests.proxy.metrics import HEALTH_PORT
from tests.proxy.peer import TUNNEL_PORT, Peer, credentials, issue
from tests.proxy.programs import Records, accept, converse, listen
from tests.traffic.conftest import Hosts, Name
from tests.world import Host, wait_for

pytestmark = pytest.mark.netns

MANY = int(os.environ.get("MESHNET_GARBAGE", "200"))
SEED = 20261129
_RESET = (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN)


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


def throw(host: Host, address: str, port: int, data: bytes) -> None:
    """All of it, and an end; until the sidecar has had enough, too."""
    try:
        with host.connect(address, port) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass
    except OSError as error:
        if error.errno not in _RESET:
            raise  # it holds on to us


def opened(hosts: Hosts, host: Host) -> int:
    return hosts.sidecar(host).status().opened_total


@pytest.mark.parametrize("kind", GOOD)
def test_at_the_ports_of_connections_each_piece_is_one_failed_one(hosts: Hosts, name: Name, kind: str) -> None:
    dice, api = random.Random(f"{SEED} {kind}"), hosts.apis[0]
    targets = [
        (hosts.outside, api.address, TUNNEL_PORT, api),
        (hosts.outside, api.address, hosts.sidecar(api).settings.proxy.inbound_port, api),
        (hosts.web, "127.0.0.1", hosts.sidecar(hosts.web).settings.proxy.outbound_port, hosts.web),
    ]
    for source, address, port, host in targets:
        before, failed = opened(hosts, host), hosts.sidecar(host).status().failed_total
        for _ in range(MANY // len(targets)):
            throw(source, address, port, spoilt(GOOD[kind], dice))
        wait_for(lambda: hosts.sidecar(host).status().open_connections == 0)  # noqa: B023 - asked before the next turn
        assert opened(hosts, host) - before == MANY // len(targets)
        assert hosts.sidecar(host).status().failed_total - failed == MANY // len(targets)
    still_serves(hosts, name)


@once
@pytest.mark.parametrize("kind", GOOD)
def test_at_the_health_port(hosts: Hosts, name: Name, kind: str) -> None:
    dice, api = random.Random(f"{SEED} {kind}"), hosts.apis[0]
    for _ in range(MANY):
        throw(hosts.outside, api.address, HEALTH_PORT, spoilt(GOOD[kind], dice))
    still_serves(hosts, name)


@once
def test_at_the_admin_socket(hosts: Hosts, name: Name) -> None:
    dice = random.Random(SEED)
    good = (b'{"type":"explain","id":"3k2j5h1a"}\n', b'{"type":"conns","recent":60.0,"all":true}\n', b"")
    for number in range(MANY):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5.0)
            client.connect(hosts.sidecar(hosts.apis[0]).settings.admin.socket)
            try:
                client.sendall(spoilt(good[number % len(good)], dice))
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):
                    pass
            except (ConnectionResetError, BrokenPipeError):
                pass
    still_serves(hosts, name)


def test_broken_frames_in_a_tunnel_of_somebody_who_may_have_one(hosts: Hosts, name: Name) -> None:
    dice, api = random.Random(SEED), hosts.apis[0]
    context = credentials(issue(hosts.mesh, "web")).client
    asked = frames.encode(Open(host=api.address, port=name.port, source="10.77.0.2:1234", id="3k2j5h1a"))
    good = asked + b"\x00" * 3
    with listen(api, name.port) as server:
        server.settimeout(0)
        for number in range(MANY // 4):
            with Peer(hosts.web, api, context) as peer:
                said = b"".join(spoilt(good if number % 2 else b"", dice) for _ in range(dice.randrange(1, 4)))
                try:
                    peer.sock.sendall(said)
                    peer.sock.settimeout(0.05)
                    peer.sock.recv(4096)
                except OSError:
                    pass
    still_serves(hosts, name)


def still_serves(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]))
    out = Records(hosts.sidecar(hosts.web))
    with listen(api, name.port) as server:
        converse(hosts.web.connect(name.address, name.port), accept(server))
    assert out.one().tls.mode == "mtls"
