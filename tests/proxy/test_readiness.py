"""Readiness through the rules: who gets an answer has proved that what comes in is captured."""

import http.client
import json
import os
import socket
from contextlib import ExitStack, closing, suppress
from typing import Any, cast

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from meshnet.codec.frames import Refused
from meshnet.model.address import Address
from meshnet.model.canary import READINESS_PORT
from meshnet.model.capture import CaptureStatus
from meshnet.model.settings import CaptureSection, Settings
from meshnet.net.addresses import LocalAddresses
from meshnet.proxy.admin import Answers
from meshnet.proxy.bypass import Bypass
from meshnet.proxy.readiness import CapturedReadiness
from tests.init.kernel import FAMILIES, address_of, listening
from tests.proxy.metrics import value
from tests.proxy.peer import Peer, credentials, issue
from tests.world import Host, Mesh, Sidecar, World, wait_for

pytestmark = pytest.mark.netns

ON: dict[str, Any] = {"readiness_port": READINESS_PORT, "proof_interval": "100ms"}


@pytest.fixture
def web(world: World) -> Host:
    return world.host("web")


@pytest.fixture
def peer(world: World) -> Host:
    return world.host("peer")


def ask(peer: Host, web: Host, family: str = "ipv4", path: str = "/readyz", method: str = "GET") -> tuple[int, str]:
    """Status and body, as a kubelet asks. Raises OSError where nobody answers."""
    host = address_of(web, family)
    connection = http.client.HTTPConnection(host, READINESS_PORT)
    with closing(connection):
        connection.sock = peer.connect(host, READINESS_PORT)
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()


def is_refused(peer: Host, web: Host, family: str = "ipv4") -> bool:
    try:
        ask(peer, web, family)
    except ConnectionRefusedError:
        return True
    return False


def capture_of(sidecar: Sidecar) -> CaptureStatus:
    found = sidecar.status().capture
    assert found is not None
    return found


@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
@pytest.mark.parametrize("backend", ["nft", "iptables"])
def test_it_is_answered_while_the_rules_capture_and_refused_while_they_do_not(
    mesh: Mesh, web: Host, peer: Host, mode: str, backend: str
) -> None:
    mesh.write()
    sidecar = mesh.sidecar(web, capture=ON | {"inbound_mode": mode, "backend": backend})
    assert is_refused(peer, web)
    sidecar.capture()
    for family in FAMILIES:
        assert ask(peer, web, family) == (200, "ok\n")
        assert ask(peer, web, family, method="HEAD") == (200, "")
    told = {proof.family: proof.result for proof in capture_of(sidecar).proofs if proof.direction == "inbound"}
    assert told == {"ipv4": "captured", "ipv6": "captured"}
    assert "inbound ipv6: readiness was last asked for through the rules at 2" in sidecar.meshnet("status")

    sidecar.meshnet("init", "remove", "--drain", "0s")
    for family in FAMILIES:
        assert is_refused(peer, web, family)
    sidecar.capture()
    for family in FAMILIES:
        wait_for(lambda family=family: ask(peer, web, family)[0] == 200)  # type: ignore[misc]  # bound at once
    assert sidecar.connections() == ()
    assert sidecar.process is not None
    assert '"kind":"' not in sidecar.process.output  # no line of the access log


@pytest.mark.parametrize(
    "left_alone",
    [
        {"exclude_inbound_ports": [str(READINESS_PORT)]},
        {"exclude_inbound_cidrs": ["0.0.0.0/0", "::/0"]},
        {"exclude_interfaces": ["eth0"]},
        {"inbound_ports": ["8080"]},
        {"inbound_ports": []},
        {"inbound_interfaces": ["eth7"]},
    ],
    ids=lambda values: next(iter(values)),
)
@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
def test_it_is_captured_whatever_else_is_left_alone(
    mesh: Mesh, web: Host, peer: Host, mode: str, left_alone: dict[str, list[str]]
) -> None:
    mesh.write()
    sidecar = mesh.sidecar(web, capture=ON | left_alone | {"inbound_mode": mode, "strict": True})
    sidecar.capture()
    assert [ask(peer, web, family) for family in FAMILIES] == [(200, "ok\n")] * 2
    with listening(web, "ipv4", 22), peer.connect(web.address, 22):
        pass  # as the settings say


@pytest.mark.parametrize("ipv6", ["off", "reject"])
@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
def test_a_family_that_is_not_captured_is_answered_and_proves_nothing(
    mesh: Mesh, web: Host, peer: Host, ipv6: str, mode: str
) -> None:
    mesh.write()
    sidecar = mesh.sidecar(web, capture=ON | {"ipv6": ipv6, "inbound_mode": mode, "strict": True})
    sidecar.capture()
    assert [ask(peer, web, family) for family in FAMILIES] == [(200, "ok\n")] * 2
    assert [visits.family for visits in capture_of(sidecar).visits] == ["ipv4"]
    web.run("nft", "flush", "ruleset")
    assert is_refused(peer, web)
    assert ask(peer, web, "ipv6")[0] in (200, 503)


def test_it_says_that_it_is_not_ready_but_not_why_and_answers_nothing_else(mesh: Mesh, web: Host, peer: Host) -> None:
    mesh.write()
    sidecar = mesh.sidecar(web, capture=ON | {"outbound_ports": ["8080"]})
    sidecar.capture()
    wait_for(lambda: capture_of(sidecar).in_place)
    for path in ("/metrics", "/healthz", "/", "http://127.0.0.1:15120/metrics"):
        assert ask(peer, web, path=path) == (404, "try /readyz\n")
    assert ask(peer, web, method="POST")[0] == 405
    web.run("nft", "flush", "chain", "inet", "meshnet", "MESHNET_OUT")
    wait_for(lambda: ask(peer, web) == (503, "not ready\n"))
    assert "outbound IPv4 is not captured" in sidecar.status().not_ready_because[0]


def test_it_answers_one_question_of_bounded_size(mesh: Mesh, web: Host, peer: Host) -> None:
    mesh.write()
    sidecar = mesh.sidecar(web, capture=ON)
    sidecar.capture()
    with peer.connect(web.address, READINESS_PORT) as loud:
        with suppress(ConnectionError):  # it may be hung up on already
            loud.sendall(b"GET /readyz HTTP/1.1\r\nx: " + b"a" * 100_000)
        assert b"200" not in until_its_end(loud)
    with peer.connect(web.address, READINESS_PORT) as eager:
        eager.sendall(b"GET /readyz HTTP/1.1\r\nHost: web\r\n\r\n" * 3)
        assert until_its_end(eager).count(b"HTTP/1.1 200") == 1
    assert ask(peer, web) == (200, "ok\n")
    assert sidecar.status().open_connections == 0


def until_its_end(sock: socket.socket) -> bytes:
    said = b""
    try:
        while data := sock.recv(4096):
            said += data
    except ConnectionResetError:
        pass
    return said


class Nobody:
    """Of a sidecar that is ready; nothing else is asked."""

    async def not_ready_because(self) -> tuple[str, ...]:
        return ()


async def test_who_says_nothing_or_says_it_slowly_is_let_go(autojump_clock: MockClock) -> None:
    readiness = CapturedReadiness(cast("Answers", Nobody()), lambda family: None)
    ours, theirs = trio.socket.socketpair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(readiness.handle, trio.SocketStream(theirs))
        with ours:
            await ours.send(b"GET /readyz HTTP/1.1\r\nx: ")
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                for _ in range(10):
                    await trio.sleep(1)
                    await ours.send(b"a")


class Slow(Nobody):
    """Takes its time to say so."""

    async def not_ready_because(self) -> tuple[str, ...]:
        await trio.sleep_forever()
        raise AssertionError


@pytest.mark.parametrize("asks", [False, True])
async def test_of_more_than_a_few_the_oldest_is_let_go_that_says_nothing(mock_clock: MockClock, asks: bool) -> None:
    """Time stands still, so none is let go for its silence. Where all have asked there is no place for one more."""
    came: list[str] = []
    readiness = CapturedReadiness(cast("Answers", Slow()), came.append)
    pairs = [trio.socket.socketpair() for _ in range(33)]
    async with trio.open_nursery() as nursery:
        for ours, theirs in pairs:
            nursery.start_soon(readiness.handle, trio.SocketStream(theirs))
            if asks:
                await ours.send(b"GET /readyz HTTP/1.1\r\nHost: web\r\n\r\n")
            await trio.testing.wait_all_tasks_blocked()
        gone = [at for at, (ours, _) in enumerate(pairs) if hung_up(ours)]
        assert (gone, len(came)) == (([32], 32) if asks else ([0], 0))
        nursery.cancel_scope.cancel()
    for ours, _ in pairs:
        ours.close()


async def test_who_has_asked_is_not_let_go_before_that_was_read(mock_clock: MockClock) -> None:
    readiness = CapturedReadiness(cast("Answers", Slow()), lambda family: None)
    pairs = [trio.socket.socketpair() for _ in range(33)]
    async with trio.open_nursery() as nursery:
        for _, theirs in pairs[:-1]:
            nursery.start_soon(readiness.handle, trio.SocketStream(theirs))
            await trio.testing.wait_all_tasks_blocked()
        gone: list[int] = []

        async def look() -> None:
            await trio.testing.wait_all_tasks_blocked()
            gone.extend(at for at, (ours, _) in enumerate(pairs) if hung_up(ours))
            nursery.cancel_scope.cancel()

        nursery.start_soon(look)
        os.write(pairs[0][0].fileno(), b"GET /readyz HTTP/1.1\r\nHost: web\r\n\r\n")
        await readiness.handle(trio.SocketStream(pairs[-1][1]))  # at once, before whoever would read that runs
    assert gone == [1]
    for ours, _ in pairs:
        ours.close()


def test_a_kubelet_has_its_answer_among_any_number_that_say_nothing(mesh: Mesh, web: Host, peer: Host) -> None:
    mesh.write()
    sidecar = mesh.sidecar(web, capture=ON)
    sidecar.capture()
    with ExitStack() as stack:
        silent = [stack.enter_context(peer.connect(web.address, READINESS_PORT)) for _ in range(40)]
        wait_for(lambda: sum(map(hung_up, silent)) >= 8)  # all have come
        assert ask(peer, web) == (200, "ok\n")


def hung_up(sock: trio.socket.SocketType | socket.socket) -> bool:
    with socket.socket(fileno=os.dup(sock.fileno())) as other:
        try:
            return other.recv(1, socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:  # unread, what it had said
            return True


def test_who_asks_is_never_taken_for_one_that_got_past_the_sidecar(web: Host, peer: Host) -> None:
    """Where IPv6 is refused the sidecar listens itself; until it accepts, the connection is nobody's."""
    settings = Settings(capture=CaptureSection(readiness_port=READINESS_PORT, ipv6="reject"))
    with web.entered(), LocalAddresses() as addresses:
        bypass = Bypass(settings, addresses, lambda: ())
        with listening(web, "ipv6", READINESS_PORT), peer.connect(web.address6, READINESS_PORT):
            assert bypass.look() == frozenset()
        with listening(web, "ipv6", 8080), peer.connect(web.address6, 8080):
            assert len(bypass.look()) == 1


def test_what_proves_inbound_capture_on_demand_is_a_port_of_an_application(mesh: Mesh, web: Host) -> None:
    mesh.write()
    sidecar = mesh.sidecar(web, capture=ON | {"inbound_ports": ["8080"]})
    sidecar.capture()
    found = json.loads(sidecar.meshnet("rules", "verify", "-o", "json"))["inbound"]
    told = {it["destination"]: it["status"] for it in found}
    assert told == {"192.0.2.9:8080": "captured", "[2001:db8::9]:8080": "captured"}


def test_several_workers_answer_as_one(mesh: Mesh, web: Host, peer: Host) -> None:
    mesh.write()
    sidecar = mesh.sidecar(web, capture=ON, proxy={"workers": 2})
    sidecar.capture()
    wait_for(lambda: capture_of(sidecar).in_place)
    for _ in range(16):
        assert ask(peer, web) == (200, "ok\n")
    assert [visits.family for visits in capture_of(sidecar).visits] == ["ipv4"]
    assert value(web, "meshnet_rules_in_place", direction="inbound", family="ipv4") == 1
    assert value(web, "meshnet_inbound_proved_timestamp_seconds", family="ipv4") > 1e9
    web.run("nft", "flush", "chain", "inet", "meshnet", "MESHNET_OUT")
    wait_for(lambda: ask(peer, web) == (503, "not ready\n"))


def test_another_port_and_none(mesh: Mesh, web: Host, peer: Host) -> None:
    mesh.write()
    sidecar = mesh.sidecar(web)
    sidecar.capture()
    with pytest.raises((OSError, http.client.HTTPException)):
        ask(peer, web)
    (seen,) = sidecar.connections()
    assert seen.original_destination == str(Address(web.address, READINESS_PORT))


@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
def test_port_0_is_nobodys_question_where_it_is_off(mesh: Mesh, web: Host, peer: Host, mode: str) -> None:
    """0 says so in the settings, and a client may dial it."""
    mesh.write()
    sidecar = mesh.sidecar(web, capture={"inbound_mode": mode})
    sidecar.capture()
    said = b""
    with suppress(ConnectionError), peer.connect(web.address, 0) as client:
        client.sendall(b"GET /readyz HTTP/1.1\r\nHost: web\r\n\r\n")
        said = until_its_end(client)
    assert said == b""
    (seen,) = wait_for(sidecar.connections)
    assert seen.original_destination == str(Address(web.address, 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_not_ready_while_somebody_else_would_answer_there_without_rules(
    mesh: Mesh, web: Host, peer: Host, family: str
) -> None:
    mesh.write()
    sidecar = mesh.sidecar(web, capture=ON)
    sidecar.capture()
    wait_for(lambda: capture_of(sidecar).in_place)
    with listening(web, family, READINESS_PORT):
        wait_for(lambda: ask(peer, web, family) == (503, "not ready\n"))
        (why,) = sidecar.status().not_ready_because
        assert why.startswith("somebody else listens at port 15124, capture.readiness_port ")
    wait_for(lambda: ask(peer, web, family) == (200, "ok\n"))


@pytest.mark.parametrize(("ipv6", "workers"), [("off", 1), ("reject", 2)])
def test_nobody_else_is_who_listens_on_the_loopback_or_is_the_sidecar_itself(
    mesh: Mesh, web: Host, peer: Host, ipv6: str, workers: int
) -> None:
    mesh.write()
    sidecar = mesh.sidecar(web, capture=ON | {"ipv6": ipv6}, proxy={"workers": workers})
    sidecar.capture()
    with web.open_socket() as own:
        own.bind(("127.0.0.1", READINESS_PORT))
        own.listen()
        wait_for(lambda: capture_of(sidecar).in_place)
        proved_at = capture_of(sidecar).proved_at
        wait_for(lambda: capture_of(sidecar).proved_at > proved_at)  # a look followed the first proof
        assert ask(peer, web, "ipv6") == (200, "ok\n")
        assert capture_of(sidecar).problems == ()


def test_a_tunnel_does_not_lead_there(mesh: Mesh, web: Host, peer: Host) -> None:
    """Were it an application's port, a peer might call whoever listens there."""
    mesh.write()
    mesh.sidecar(web, capture=ON).capture()
    with listening(web, "ipv4", READINESS_PORT), Peer(peer, web, credentials(issue(mesh, "peer")).client) as tunnel:
        answer = tunnel.open(web.address, READINESS_PORT)
        assert isinstance(answer, Refused)
        assert answer.reason == "loop"


def test_without_proofs_it_is_answered_and_none_is_kept(mesh: Mesh, web: Host, peer: Host) -> None:
    mesh.write()
    sidecar = mesh.sidecar(web, capture={"readiness_port": READINESS_PORT, "proof_interval": "off"})
    sidecar.capture()
    assert ask(peer, web) == (200, "ok\n")
    assert sidecar.status().capture is None
    assert sidecar.process is not None
    assert "is captured" not in sidecar.process.output
