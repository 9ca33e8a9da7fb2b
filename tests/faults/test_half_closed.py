"""One end has said its last word, and the other takes longer than conntrack remembers (istio#43297)."""

import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

from meshnet.net.sockets import peer_address, reset
from meshnet_cli.demo.wire import Capture
from tests.faults.causes import impatient_with
from tests.proxy.programs import Records, accept, listen, read_all, reason
from tests.traffic.conftest import Hosts, Name
from tests.world import Host, wait_for

pytestmark = pytest.mark.netns

FORGOTTEN = 4  # seconds; `impatient_with` has its probes sent each second
CLOSED = bytes([7])  # tcp_states.h, as TCP_INFO begins


@contextmanager
def forgetful(host: Host) -> Iterator[None]:
    """Half-closed connections are forgotten after some seconds; 60 is what Linux has."""
    file = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait")
    with host.entered():
        before = file.read_text()
        file.write_text(str(FORGOTTEN))
    try:
        yield
    finally:
        with host.entered():
            file.write_text(before)


def is_tracked(host: Host, client: socket.socket) -> bool:
    ports = [peer_address(end).port for end in (client.getsockname(), client.getpeername())]
    paths = [("CTA_TUPLE_ORIG", "CTA_TUPLE_PROTO", f"CTA_PROTO_{end}_PORT") for end in ("SRC", "DST")]
    with host.entered(), NFCTSocket(nfgen_family=client.family) as conntrack:
        return any([entry.get(path) for path in paths] == ports for entry in conntrack.dump())


def untranslated(client: socket.socket) -> bytes:
    """How the addresses and ports stand in a packet of the client's that nobody has redirected."""
    source, target = peer_address(client.getsockname()), peer_address(client.getpeername())
    hosts = (socket.inet_pton(client.family, it.host) for it in (source, target))
    return b"".join(hosts) + struct.pack("!HH", source.port, target.port)


@pytest.mark.parametrize(("family", "ends_first"), [("ipv4", "server"), ("ipv6", "server"), ("ipv4", "client")])
def test_an_end_that_comes_late_is_heard_at_the_other_side_of_the_proxy_istio43297(
    hosts: Hosts, name: Name, family: str, ends_first: str
) -> None:
    """Probes of the leg that was accepted refresh its entry; the other connection, probed later, loses its own."""
    api, sidecar = hosts.apis[0], hosts.sidecar(hosts.web)
    hosts.write(hosts.service(name, [api]))
    address = name.address if family == "ipv4" else name.address6
    out = Records(sidecar)
    with (
        forgetful(hosts.web),
        listen(api, name.port) as server,
        hosts.web.connect(address, name.port) as client,
        accept(server) as app,
        hosts.web.connect(address, name.port) as forgotten,
        accept(server) as its_app,
        Capture(hosts.world.switch, untranslated(client)) as wire,
        Capture(hosts.world.switch, untranslated(forgotten)) as leak,
    ):
        impatient_with(sidecar, client)
        first, last = (app, client) if ends_first == "server" else (client, app)
        for ends, hears in ((first, last), (its_app, forgotten) if ends_first == "server" else (forgotten, its_app)):
            ends.shutdown(socket.SHUT_WR)
            assert read_all(hears) == b""
        wait_for(lambda: not is_tracked(hosts.web, forgotten), what="it is forgotten")
        assert is_tracked(hosts.web, client)

        last.shutdown(socket.SHUT_WR)
        assert read_all(first) == b""
        if ends_first == "server":  # as it would be otherwise
            forgotten.shutdown(socket.SHUT_WR)
            wait_for(lambda: leak.with_marker, what="an end that nobody has redirected")
            assert not select.select([its_app], [], [], 0)[0]
        reset(its_app)
        assert sorted(reason(record) for record in out.ended(2)) == [
            f"ok by {ends_first} in data",
            "peer.rst by server in half-closed",
        ]
    assert wire.with_marker == 0


def test_an_end_that_comes_late_from_outside_is_heard_by_the_application_istio43297(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]))
    with (
        forgetful(api),
        listen(api, name.port) as server,
        hosts.outside.connect(api.address, name.port) as client,
        accept(server) as app,
        hosts.outside.connect(api.address, name.port) as forgotten,
        accept(server) as its_app,
    ):
        impatient_with(hosts.sidecar(api), client)
        for ends, hears in ((app, client), (its_app, forgotten)):
            ends.shutdown(socket.SHUT_WR)
            assert read_all(hears) == b""
        wait_for(lambda: not is_tracked(api, forgotten), what="it is forgotten")
        assert is_tracked(api, client)

        client.shutdown(socket.SHUT_WR)
        assert read_all(app) == b""
        forgotten.shutdown(socket.SHUT_WR)  # as it would be otherwise: it comes to the application itself
        wait_for(lambda: forgotten.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == CLOSED, what="its RST")
        assert not select.select([its_app], [], [], 0)[0]
        reset(its_app)
