"""Garbage on every port, from a seed; and much of it, MESHNET_GARBAGE pieces, when asked for (scripts/test --deep)."""

import os
import random
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest

from tests.faults.conftest import RELAYS, once
from tests.faults.flood import Flood, parse_frames, parse_requests
from tests.faults.garbage import (
    GOOD,
    REQUESTS,
    Frames,
    ports_again_at_once,
    spoilt,
    throw,
    throw_frames,
    throw_many,
)
from tests.faults.strange import another_host, strange
from tests.proxy.metrics import HEALTH_PORT
from tests.proxy.peer import TUNNEL_PORT, credentials, issue
from tests.proxy.programs import Records, accept, converse, echo, listen
from tests.traffic.conftest import Hosts, Name
from tests.world import Host, wait_for

pytestmark = pytest.mark.netns

MANY, TUNNELS = 200, 300
PIECES = int(os.environ.get("MESHNET_GARBAGE", "200000"))
SEED = int(os.environ.get("MESHNET_GARBAGE_SEED", "20261129"))
_SAY_EVERY = 5.0  # seconds


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
    dice, api = random.Random(SEED), hosts.apis[0]
    requests = [spoilt(REQUESTS[number % len(REQUESTS)], dice) for number in range(MANY)]
    throw_many(api, socket.AF_UNIX, hosts.sidecar(api).settings.admin.socket, requests)
    still_serves(hosts, name)


def test_broken_frames_in_a_tunnel_of_somebody_who_may_have_one(hosts: Hosts, name: Name) -> None:
    dice, api = random.Random(SEED), hosts.apis[0]
    context, frames = credentials(issue(hosts.mesh, "web")).client, Frames(api.address, name.port)
    with echo(api, name.port):
        for _ in range(TUNNELS):
            throw_frames(hosts.outside, api, context, frames.some(dice))
    still_serves(hosts, name)


def test_a_flood_of_everything_is_told_one_by_one_and_leaves_nothing_behind(hosts: Hosts, name: Name) -> None:
    with flood(hosts, name) as garbage:
        for _ in garbage.go_on(1):
            pass
    assert garbage.recorded > garbage.thrown.total() / 2


@pytest.mark.deep
@pytest.mark.timeout(0)
def test_a_great_flood_of_everything_over_sockets(
    hosts: Hosts, name: Name, relay: str, capfd: pytest.CaptureFixture[str], record_property: Callable[[str, str], None]
) -> None:
    pieces = PIECES // len(RELAYS)
    with capfd.disabled(), flood(hosts, name) as garbage:
        took = watch(f"relay {relay}, over sockets", pieces, garbage.go_on(pieces))
    record_property(
        "measured",
        f"seed {SEED}: {took}, {garbage.recorded:,} connections with one record each, {garbage.grown} KiB more, "
        f"descriptors and threads as before; {dict(garbage.thrown)}",
    )


@pytest.mark.deep
@pytest.mark.timeout(0)
@pytest.mark.parametrize("parse", [parse_frames, parse_requests])
def test_a_great_flood_in_process(
    parse: Callable[[int, random.Random], Iterator[int]],
    capfd: pytest.CaptureFixture[str],
    record_property: Callable[[str, str], None],
) -> None:
    with capfd.disabled():
        took = watch(parse.__name__, PIECES, parse(PIECES, random.Random(SEED)))
    record_property("measured", f"seed {SEED}: {took}")


@contextmanager
def flood(hosts: Hosts, name: Name) -> Iterator[Flood]:
    context = credentials(issue(hosts.mesh, "web")).client
    with (
        strange(hosts, another_host(hosts), admin={"memory_mib": 1}) as sidecar,
        echo(sidecar.host, name.port),
        ports_again_at_once(hosts.outside),
        ports_again_at_once(sidecar.host),
    ):
        yield Flood(sidecar, hosts.outside, context, name.port, random.Random(SEED))


def watch(what: str, pieces: int, counts: Iterable[int]) -> str:
    """Says now and then how far it is, and at the end how long it took."""
    began = said = time.monotonic()
    count = 0
    print(f"\n{what}: seed {SEED}, {pieces:,} pieces", flush=True)
    for count in counts:
        if (now := time.monotonic()) - said > _SAY_EVERY:
            said = now
            print(f"{now - began:8.1f} s  {count:,}, {count / (now - began):,.0f} a second", flush=True)
    seconds = time.monotonic() - began
    return f"{count:,} pieces in {seconds:.0f} s, {count / seconds:,.0f} a second"


def still_serves(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]))
    out = Records(hosts.sidecar(hosts.web))
    with listen(api, name.port) as server:
        converse(hosts.web.connect(name.address, name.port), accept(server))
    assert out.one().tls.mode == "mtls"
