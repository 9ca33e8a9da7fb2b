"""Truthful connect: an application's connect() waits for the endpoint, and fails as the endpoint does."""

import errno
import select
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pytest
from msgspec.structs import replace

from meshnet.model.admin import TruthfulStatus
from meshnet.model.connection import Connection, Security
from meshnet.model.resource import (
    API_VERSION,
    AccessPolicy,
    AccessPolicySpec,
    AnyResource,
    BreakerSpec,
    ConnectSpec,
    LimitsSpec,
    Metadata,
    TrafficPolicy,
    TrafficPolicySpec,
)
from meshnet.model.service import Action, Rule, Target
from meshnet.model.settings import Settings
from meshnet_init.apply import apply
from tests.proxy.metrics import value
from tests.proxy.programs import Records, accept, ask, converse, echo, ended_by_rst, listen, read, reason, stopped
from tests.world import Host, Mesh, Sidecar, World, into_the_mesh, still_alive, wait_for

pytestmark = pytest.mark.netns

API, API6 = "10.96.0.10", "fd96::10"
PLAIN, DENIED, LIMITED, SILENT = "10.96.0.40", "10.96.0.50", "10.96.0.60", "10.96.0.70"
NO_WAY = {"ipv4": "198.51.100.9", "ipv6": "2001:db8:1::9"}  # a router says so
PATIENT = "20s"
ORDERED = "meshnet_ordered_connections_total"
NEVER = BreakerSpec(failures=1_000_000)


@dataclass
class Held:
    """`web` has a sidecar with truthful connect, `api` one without, `outside` none."""

    world: World
    mesh: Mesh
    web: Host
    api: Host
    outside: Host

    @property
    def sidecar(self) -> Sidecar:
        return self.mesh.sidecars["web"]

    def truth(self) -> TruthfulStatus:
        truthful = self.sidecar.status().truthful
        assert truthful is not None
        return truthful

    def rules(self) -> str:
        return "".join(self.web.run(f"{it}-save").stdout for it in ("iptables", "ip6tables", "iptables-legacy"))


def traffic(name: str, **spec: ConnectSpec | LimitsSpec | BreakerSpec) -> TrafficPolicy:
    made = TrafficPolicySpec(services=(name,), **spec)  # type: ignore[arg-type]  # by name
    return TrafficPolicy(api_version=API_VERSION, metadata=Metadata(name=name), spec=made)


def resources(mesh: Mesh, api: Host, outside: Host) -> list[AnyResource]:
    def plain(name: str, port: int, address: str) -> AnyResource:
        return mesh.service(name, [port], [outside], addresses=[address], meshed=False)

    nobody = AccessPolicySpec(action=Action.DENY, services=("denied",), rules=(Rule(target=Target(ports=(9999,))),))
    return [
        mesh.service("api", [8080], [api], addresses=[API, API6]),
        mesh.service("denied", [9999], [api], addresses=[DENIED]),
        AccessPolicy(api_version=API_VERSION, metadata=Metadata(name="nobody"), spec=nobody),
        plain("plain", 6000, PLAIN),
        plain("limited", 6100, LIMITED),
        plain("silent", 6200, SILENT),
        # What one test does to an endpoint shall not open its breaker for the next.
        traffic("api", connect=ConnectSpec(attempt_timeout=PATIENT, total_timeout=PATIENT), breaker=NEVER),
        traffic("plain", breaker=NEVER),
        traffic("limited", limits=LimitsSpec(max_connections=1, max_pending=0)),
        traffic("silent", connect=ConnectSpec(attempt_timeout="1s", total_timeout="1s", attempts=1)),
    ]


@pytest.fixture(scope="module", params=[("auto", "auto", False), ("legacy", "python", True)], ids=["auto", "legacy"])
def _held(request: pytest.FixtureRequest) -> Iterator[Held]:
    with World() as world:
        mesh = Mesh(world)
        web, api, outside = (world.host(name) for name in ("web", "api", "outside"))
        mesh.write(*resources(mesh, api, outside))
        backend, relay, strict = request.param
        capture = {"truthful_connect": True, "backend": backend, "strict": strict}
        into_the_mesh(mesh, [web], capture=capture, proxy={"relay": relay})
        into_the_mesh(mesh, [api])
        made = Held(world, mesh, web, api, outside)
        yield made
        made.sidecar.release("0s")
        assert "MESHNET" not in made.rules()


@pytest.fixture
def held(_held: Held, request: pytest.FixtureRequest) -> Iterator[Held]:
    wait_for(lambda: _held.truth().in_force)
    yield _held
    still_alive(_held.mesh, request)


def failure(host: Host, address: str, port: int) -> str:
    """The name of the errno that connect() itself fails with; empty if it does not."""
    try:
        host.connect(address, port, timeout=30.0).close()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return ""


def begin(host: Host, address: str, port: int) -> socket.socket:
    """One that has begun to connect, and has not ended doing so."""
    client = host.open_socket()
    client.setblocking(False)
    assert client.connect_ex((address, port)) == errno.EINPROGRESS
    return client


def is_decided(client: socket.socket) -> bool:
    return bool(select.select([], [client], [], 0)[1])


def sent_again(client: socket.socket) -> int:
    """How often the kernel has wanted to send its SYN again (tcpi_retransmits)."""
    return client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[2]


def waits(held: Held) -> list[Connection]:
    return [each for each in held.sidecar.connections(ended=False) if each.reason is None and each.connect_ms is None]


def test_connect_succeeds_when_the_endpoint_is_reached_through_a_tunnel_and_all_is_as_ever(held: Held) -> None:
    out, before = Records(held.sidecar), held.truth()
    with listen(held.api, 8080) as server:
        for _ in range(5):
            converse(held.web.connect(API, 8080), accept(server), b"q" * 100_000, b"a" * 300_000)
    records = out.ended(5)
    assert {reason(each) for each in records} == {"ok by client in data"}
    assert {each.tls.mode for each in records} == {Security.MTLS}
    assert {(each.bytes_sent, each.bytes_received) for each in records} == {(100_000, 300_000)}
    assert (held.truth().held - before.held, held.truth().unheld - before.unheld) == (5, 0)


def test_the_same_in_ipv6_and_past_the_mesh(held: Held) -> None:
    targets = [(API6, 8080, held.api), (PLAIN, 6000, held.outside), (held.outside.address, 6001, held.outside)]
    targets.append((held.outside.address6, 6001, held.outside))
    out = Records(held.sidecar)
    for address, port, host in targets:
        with listen(host, port) as server:
            client = held.web.connect(address, port)
            assert client.getpeername()[0] == address
            converse(client, accept(server))
    records = out.ended(len(targets))
    assert {reason(each) for each in records} == {"ok by client in data"}
    assert "held until then" in held.sidecar.meshnet("explain", records[0].id)
    assert value(held.web, "meshnet_held_connections_total") == held.truth().held


def test_a_server_that_speaks_first_is_heard(held: Held) -> None:
    with listen(held.api, 8080) as server, held.web.connect(API, 8080) as client, accept(server) as app:
        app.sendall(b"220 ready\r\n")
        assert read(client, 11) == b"220 ready\r\n"


@pytest.mark.parametrize(
    ("address", "port"), [(API, 8080), (API6, 8080), (PLAIN, 6000), ("outside", 6001), ("outside6", 6001)]
)
def test_an_endpoint_that_refuses_refuses_connect(held: Held, address: str, port: int) -> None:
    address = {"outside": held.outside.address, "outside6": held.outside.address6}.get(address, address)
    out = Records(held.sidecar)
    assert failure(held.web, address, port) == "ECONNREFUSED"
    assert out.one().reason is not None
    assert reason(out.one()).startswith("connect.refused by")


def test_one_after_many_that_were_accepted_is_refused_all_the_same(held: Held) -> None:
    """Nothing that was learned of those lets the next one be accepted ahead of its endpoint."""
    for address, port, host in ((API, 8080, held.api), (PLAIN, 6000, held.outside)):
        with echo(host, port):
            for _ in range(10):
                assert ask(held.web, address, port) == b"question"
        assert failure(held.web, address, port) == "ECONNREFUSED"
    assert value(held.web, ORDERED) == 0


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
@pytest.mark.produces("connect.unreachable")
def test_where_no_way_leads_connect_says_so(held: Held, family: Literal["ipv4", "ipv6"]) -> None:
    out = Records(held.sidecar)
    assert failure(held.web, NO_WAY[family], 80) == "EHOSTUNREACH"
    assert reason(out.one()) == "connect.unreachable by proxy in connect"


def test_an_endpoint_that_does_not_answer_is_unreachable_when_its_time_is_up(held: Held) -> None:
    held.outside.run(
        "nft",
        "-f",
        "-",
        stdin="table inet mute { chain in { type filter hook input priority 0;\ntcp dport 6200 drop\n}\n}",
    )
    out, began = Records(held.sidecar), time.monotonic()
    assert failure(held.web, SILENT, 6200) == "EHOSTUNREACH"
    assert time.monotonic() - began >= 1.0
    assert reason(out.one()) == "connect.timeout by proxy in connect"


def test_connect_takes_as_long_as_its_endpoint_does(held: Held) -> None:
    with listen(held.api, 8080) as server:
        converse(held.web.connect(API, 8080), accept(server))  # a tunnel stands
        with stopped(held.mesh.sidecars["api"]):
            client = begin(held.web, API, 8080)
            wait_for(lambda: waits(held))
            before = held.truth()
            wait_for(lambda: sent_again(client))
            assert not is_decided(client)
            assert held.truth() == before
            assert before.waiting == 1
        wait_for(partial(is_decided, client))
        client.settimeout(5.0)
        converse(client, accept(server))


def test_two_from_one_port_are_told_apart(held: Held) -> None:
    """Both are redirected to one address, so the kernel gives the second another port."""
    out, before = Records(held.sidecar), held.truth()
    with listen(held.api, 8080) as server, listen(held.outside, 6000) as other:
        first = from_port(held.web, 29_999, API, 8080)
        app = accept(server)
        second = from_port(held.web, 29_999, PLAIN, 6000)
        converse(second, accept(other))
        converse(first, app)
    assert {record.source.address for record in out.ended(2)} == {f"{held.web.address}:29999"}
    assert (held.truth().held - before.held, held.truth().unheld - before.unheld) == (2, 0)


def from_port(host: Host, port: int, address: str, to_port: int) -> socket.socket:
    client = host.open_socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.settimeout(5.0)
    client.bind((host.address, port))
    client.connect((address, to_port))
    return client


def test_what_policy_denies_is_refused_and_the_record_says_why(held: Held) -> None:
    out = Records(held.sidecar)
    with listen(held.api, 9999):
        assert failure(held.web, DENIED, 9999) == "ECONNREFUSED"
    record = out.one()
    assert reason(record).startswith("authz.denied by policy")
    assert "nobody" in record.policy
    told = held.sidecar.meshnet("explain", record.id)
    assert "authz.denied" in told
    assert "failed with ECONNREFUSED" in told


def test_beyond_its_limits_a_service_refuses(held: Held) -> None:
    out = Records(held.sidecar)
    with echo(held.outside, 6100), held.web.connect(LIMITED, 6100) as first:
        first.sendall(b"x")
        assert read(first, 1) == b"x"
        assert failure(held.web, LIMITED, 6100) == "ECONNREFUSED"
    limited, well = sorted(map(reason, out.ended(2)))
    assert limited.startswith("limit.")
    assert limited.endswith(" by limit in queue")
    assert well == "ok by client in data"


def test_a_drain_waits_for_who_waits(held: Held) -> None:
    process = held.sidecar.process
    assert process is not None
    with listen(held.api, 8080) as server:
        converse(held.web.connect(API, 8080), accept(server))  # a tunnel stands
        with stopped(held.mesh.sidecars["api"]):
            client = begin(held.web, API, 8080)
            wait_for(lambda: waits(held))
            process.popen.terminate()
            wait_for(lambda: held.sidecar.status().draining)
        wait_for(partial(is_decided, client))
        client.settimeout(5.0)
        converse(client, accept(server))
    assert process.popen.wait(40.0) == 0
    held.sidecar.start()


def test_hundreds_to_whom_no_way_leads_hear_it_and_have_one_record_each(held: Held) -> None:
    """The kernel sends ICMP errors at a limited rate; who hears none sends its SYN again, and is answered again."""
    # The proxy's own find no way; what the application sends does.
    held.web.configure("route add unreachable 203.0.113.0/24 table 99", "rule add fwmark 0x1000 lookup 99")
    out, before = Records(held.sidecar), held.truth()
    with ThreadPoolExecutor(200) as pool:
        names = list(pool.map(lambda _: failure(held.web, "203.0.113.9", 80), range(200)))
    # The queue fails open: whom the kernel lets pass where it cannot queue, on a busy machine, is reset, and counted.
    passed = held.truth().unheld - before.unheld
    assert (names.count("EHOSTUNREACH"), names.count("")) == (200 - passed, passed)
    assert passed < 20
    assert {reason(each) for each in out.ended(200)} == {"connect.unreachable by proxy in connect"}


def test_hundreds_at_once(held: Held) -> None:
    out, before = Records(held.sidecar), held.truth()
    with echo(held.api, 8080), echo(held.outside, 6000), ThreadPoolExecutor(200) as pool:
        targets = [(API, 8080), (PLAIN, 6000), (held.outside.address, 6001)] * 67
        outcomes = list(pool.map(lambda target: outcome(held.web, *target), targets))
    assert outcomes == [b"question", b"question", b""] * 67
    reasons = sorted(reason(each).partition(" ")[0] for each in out.ended(len(targets)))
    assert reasons == ["connect.refused"] * 67 + ["ok"] * 134
    assert (held.truth().held - before.held, held.truth().unheld - before.unheld) == (len(targets), 0)
    assert held.truth().waiting == 0


def outcome(host: Host, address: str, port: int) -> bytes:
    try:
        with host.connect(address, port, timeout=30.0) as client:
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            return read(client, 8)
    except ConnectionRefusedError:
        return b""


def test_the_leg_of_a_client_that_gave_up_is_ended_and_its_one_record_says_so(held: Held) -> None:
    out = Records(held.sidecar)
    with listen(held.api, 8080) as server:
        with stopped(held.mesh.sidecars["api"]), begin(held.web, API, 8080):
            wait_for(lambda: waits(held))
        with accept(server) as app:
            app.settimeout(30.0)
            ended_by_rst(app)
    assert reason(out.one()) == "peer.rst by client in connect"
    assert held.truth().waiting == 0


def test_a_person_sees_whether_it_is_in_force(held: Held) -> None:
    text = held.sidecar.meshnet("status")
    assert "truthful: in force" in text
    assert "NFQUEUE" in held.rules()


def test_a_canary_is_not_held(held: Held) -> None:
    before = held.truth()
    assert "captured" in held.sidecar.meshnet("rules", "verify")
    assert held.truth() == before


def test_without_a_sidecar_nobody_waits(held: Held) -> None:
    """What is held is lost with it, and comes again within a second; what is new passes."""
    process = held.sidecar.process
    assert process is not None
    with listen(held.api, 8080) as server, stopped(held.mesh.sidecars["api"]):
        client = begin(held.web, API, 8080)
        wait_for(lambda: waits(held))
        process.kill()
        wait_for(partial(is_decided, client))
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
        client.close()
        assert failure(held.web, API, 8080) == "ECONNREFUSED"
        server.close()
    held.sidecar.start()
    wait_for(lambda: held.truth().in_force)
    with listen(held.api, 8080) as server:
        converse(held.web.connect(API, 8080), accept(server))


def test_a_sidecar_without_the_right_goes_on_as_without_the_setting(held: Held) -> None:
    process = held.sidecar.process
    assert process is not None
    process.kill()
    rights = "-net_admin"
    held.sidecar.spawn(by=("setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"))
    held.sidecar.wait_until_ready()
    try:
        wait_for(lambda: held.truth().problem)
        assert not held.truth().in_force
        assert "NET_ADMIN" in held.sidecar.meshnet("status")
        out = Records(held.sidecar)
        with held.web.connect(PLAIN, 6000, timeout=30.0) as client:
            assert ended_by_rst(client)
        assert reason(out.one()) == "connect.refused by proxy in connect"
        with echo(held.outside, 6000):
            for _ in range(3):
                assert ask(held.web, PLAIN, 6000) == b"question"
        is_native = held.sidecar.status().relay.in_use[0] == "native"
        assert value(held.web, ORDERED) == (2 if is_native else 0)
    finally:
        assert held.sidecar.process is not None
        held.sidecar.process.kill()
        held.sidecar.start()


def test_switched_off_no_rule_holds_anybody(held: Held) -> None:
    capture = held.sidecar.settings.capture
    without: Settings = replace(held.sidecar.settings, capture=replace(capture, truthful_connect=False))
    with held.web.entered():
        apply(without)
    try:
        assert "NFQUEUE" not in held.rules()
        assert "MESHNET_HOLD" not in held.rules()
        before = held.truth()
        with listen(held.api, 8080) as server:
            converse(held.web.connect(API, 8080), accept(server))
        assert (held.truth().held, held.truth().unheld) == (before.held, before.unheld + 1)
    finally:
        with held.web.entered():
            apply(held.sidecar.settings)
