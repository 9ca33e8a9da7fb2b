"""Connections that do not come through the sidecar are told with why, and those that do are not among them."""

import json
import os
import socket
from collections.abc import Iterator

import pytest

from meshnet.model.admin import ListUncaptured
from meshnet.model.uncaptured import UncapturedConnection, UncapturedList
from meshnet_cli.client import ask
from meshnet_init.apply import apply
from tests.proxy.conftest import API, Hosts
from tests.proxy.programs import accept, listen
from tests.world import Host, Mesh, World, still_alive, wait_for

pytestmark = pytest.mark.netns

EXCLUDED = 9100
PROOF = "200ms"


@pytest.fixture(scope="module")
def _hosts() -> Iterator[Hosts]:
    """`web` has a sidecar, and no rules yet."""
    with World() as world:
        web, api, twin, outside = (world.host(name) for name in ("web", "api", "twin", "outside"))
        hosts = Hosts(world, Mesh(world), web, api, twin, outside)
        hosts.mesh.write(hosts.mesh.service("api", [8080], [api], addresses=[API], meshed=False))
        hosts.mesh.sidecar(web, capture={"exclude_outbound_ports": [str(EXCLUDED)], "proof_interval": PROOF})
        yield hosts


@pytest.fixture
def hosts(_hosts: Hosts, request: pytest.FixtureRequest) -> Iterator[Hosts]:
    yield _hosts
    still_alive(_hosts.mesh, request)


def uncaptured(hosts: Hosts) -> dict[tuple[str, str], UncapturedConnection]:
    """By client and server."""
    path = hosts.sidecar(hosts.web).settings.admin.socket
    return {(it.client, it.server): it for it in ask(path, ListUncaptured(), UncapturedList).items}


def test_each_has_its_reason_and_what_the_kernel_knows_of_it(hosts: Hosts) -> None:
    web, sidecar = hosts.web, hosts.sidecar(hosts.web)
    with (
        listen(hosts.api, 8080) as server,
        listen(hosts.outside, EXCLUDED) as other,
        listen(web, 22) as ssh,
        listen(web, 9200) as own,
        web.connect(hosts.api.address, 8080) as before,
        accept(server),
    ):
        before.sendall(b"hello")
        with web.entered():
            apply(sidecar.settings)
        wait_for(lambda: (capture := sidecar.status().capture) and capture.in_place, what="capture in place")
        with (
            web.connect(API, 8080) as captured,
            accept(server),
            web.connect(hosts.outside.address6, EXCLUDED) as excluded,
            accept(other),
            hosts.outside.connect(web.address, 22) as login,
            accept(ssh),
            hosts.outside.connect(web.address, 9200) as served,
            accept(own),
        ):
            found = uncaptured(hosts)
            (older,) = (it for it in found.values() if it.server == f"{hosts.api.address}:8080")
            assert (older.why, older.direction, older.client) == ("opened-before", "outbound", name(before))
            assert (older.bytes_sent, older.bytes_received, older.uid) in ((5, 0, os.getuid()), (6, 0, os.getuid()))
            assert older.rtt_us
            assert older.retransmits == 0
            (out,) = (it for it in found.values() if it.server == f"[{hosts.outside.address6}]:{EXCLUDED}")
            assert (out.why, out.setting, out.client) == ("excluded", "capture.exclude_outbound_ports", name(excluded))
            (into,) = (it for it in found.values() if it.server == f"{web.address}:22")
            assert (into.direction, into.client) == ("inbound", name(login))
            assert (into.why, into.setting) == ("excluded", "capture.exclude_inbound_ports")
            assert len(found) == 3  # neither those that are captured nor the sidecar's own
            assert {name(captured), name(served)}.isdisjoint({client for client, _ in found})
            told = json.loads(sidecar.meshnet("conns", "--uncaptured", "-o", "json", "--port", str(EXCLUDED)))
            (item,) = told["items"]
            assert item["process"]["pid"] == os.getpid()
            assert "opened-before" in sidecar.meshnet("conns", "--uncaptured", "--dir", "out", "-o", "wide")
        assert past_the_rules(hosts, web, server) == "bypassed"


def past_the_rules(hosts: Hosts, web: Host, server: socket.socket) -> str:
    """Why, of a connection that was opened while somebody had taken the rules out."""
    web.run("nft", "flush", "ruleset")
    with web.connect(hosts.api.address, 8080) as past, accept(server):
        with web.entered():
            apply(hosts.sidecar(web).settings)
        found = uncaptured(hosts)
        footer = "\n1 open got past the sidecar: meshnet conns --uncaptured lists it.\n"
        wait_for(lambda: footer in hosts.sidecar(web).meshnet("conns"), what="the other list names it")
        return found[name(past), f"{hosts.api.address}:8080"].why


def name(sock: socket.socket) -> str:
    host, port, *_ = sock.getsockname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
