"""The sidecar proves capture by itself, without any right, and says so when it is lost."""

import socket

import pytest

from meshnet.errors import CommandError
from meshnet.model.admin import Status
from meshnet.model.capture import CaptureStatus
from tests.init.kernel import listening
from tests.proxy.metrics import get, value
from tests.world import Host, Mesh, Sidecar, World, wait_for

pytestmark = pytest.mark.netns

QUICK = {"proof_interval": "100ms"}
APP = 8080


@pytest.fixture
def web(world: World) -> Host:
    return world.host("web")


@pytest.fixture
def peer(world: World) -> Host:
    return world.host("peer")


@pytest.fixture
def sidecar(mesh: Mesh, web: Host) -> Sidecar:
    mesh.write()
    return mesh.sidecar(web, capture=QUICK)


def capture_of(sidecar: Sidecar) -> CaptureStatus:
    found = sidecar.status().capture
    assert found is not None
    return found


def in_place(sidecar: Sidecar) -> bool | None:
    return capture_of(sidecar).in_place


def results(sidecar: Sidecar) -> dict[str, str]:
    return {proof.family: proof.result for proof in capture_of(sidecar).proofs}


def not_ready(sidecar: Sidecar) -> Status | None:
    try:
        status = sidecar.status()
    except CommandError:  # it has not come up yet
        return None
    return None if status.ready else status


def flush(host: Host) -> None:
    """What a careless `nft flush ruleset` of another program leaves."""
    host.run("nft", "flush", "ruleset")


def test_rules_that_vanish_later_take_readiness_away_and_their_return_gives_it_back(
    sidecar: Sidecar, web: Host
) -> None:
    """istio#61182: gone after 29 days; istio#56729."""
    wait_for(lambda: set(results(sidecar).values()) == {"not captured"})
    assert sidecar.status().ready  # nobody has asked for capture
    assert value(web, "meshnet_rules_in_place", direction="outbound", family="ipv4") == 0

    sidecar.capture()
    wait_for(lambda: in_place(sidecar))
    assert results(sidecar) == {"ipv4": "captured", "ipv6": "captured"}
    assert value(web, "meshnet_rules_in_place", direction="outbound", family="ipv6") == 1

    flush(web)
    status = wait_for(lambda: not_ready(sidecar))
    wait_for(lambda: in_place(sidecar) is False)
    assert "is not captured" in status.not_ready_because[0]
    assert "sudo meshnet rules verify" in status.not_ready_because[0]
    assert get(web, "/readyz")[0] == 503
    assert value(web, "meshnet_capture_proofs_total", family="ipv4", result="not captured") >= 1

    sidecar.capture()
    wait_for(lambda: sidecar.status().ready)
    wait_for(lambda: in_place(sidecar))
    assert sidecar.process is not None
    told = sidecar.process.output
    assert told.count("outbound IPv4 is captured no longer") == 1  # once a change, not once a look
    assert told.count("outbound IPv4 is captured\n") == 2
    assert '"kind":"' not in told  # no line of the access log
    assert sidecar.connections() == ()


def test_where_capture_is_required_nothing_is_ready_before_it(mesh: Mesh, web: Host) -> None:
    mesh.write()
    sidecar = mesh.sidecar(web, start=False, capture=QUICK | {"required": True})
    sidecar.spawn()
    wait_for(lambda: not_ready(sidecar), what="up, and not ready")
    wait_for(lambda: "is not captured" in "".join(sidecar.status().not_ready_because))
    sidecar.capture()
    sidecar.wait_until_ready()


def test_one_family_lost_is_capture_lost(sidecar: Sidecar, web: Host) -> None:
    """istio#57199, linkerd init PR 388: IPv6 half there."""
    sidecar.meshnet("init", "--config", sidecar.config, "--backend", "iptables")
    wait_for(lambda: in_place(sidecar))
    web.run("ip6tables", "-t", "nat", "-F")
    status = wait_for(lambda: not_ready(sidecar))
    assert ["outbound IPv6" in line for line in status.not_ready_because] == [True]


@pytest.mark.parametrize("how", ["without a route", "off"])
def test_a_family_that_cannot_leave_or_is_left_alone_is_no_failure(mesh: Mesh, web: Host, how: str) -> None:
    mesh.write()
    if how == "without a route":
        web.configure("route del ::/0")
    ipv6 = "off" if how == "off" else "auto"
    sidecar = mesh.sidecar(web, start=False, capture=QUICK | {"required": True, "ipv6": ipv6})
    sidecar.spawn()
    sidecar.capture()
    sidecar.wait_until_ready()
    assert results(sidecar)["ipv6"] == ("not in the plan" if how == "off" else "no route")
    assert in_place(sidecar)


def test_no_right_at_all_is_needed(mesh: Mesh, web: Host) -> None:
    mesh.write()
    sidecar = mesh.sidecar(web, start=False, capture=QUICK)
    sidecar.spawn(by=("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--"))
    sidecar.wait_until_ready()
    sidecar.capture()
    wait_for(lambda: in_place(sidecar))
    flush(web)
    wait_for(lambda: not_ready(sidecar))


def test_off_is_off(mesh: Mesh, web: Host) -> None:
    mesh.write()
    sidecar = mesh.sidecar(web, capture={"proof_interval": "off"})
    assert sidecar.status().capture is None
    assert "meshnet_rules_in_place" not in get(web, "/metrics")[1]


def test_several_workers_prove_once_and_answer_as_one(mesh: Mesh, web: Host) -> None:
    mesh.write()
    sidecar = mesh.sidecar(web, capture=QUICK, proxy={"workers": 2})
    sidecar.capture()
    wait_for(lambda: in_place(sidecar))
    assert value(web, "meshnet_rules_in_place", direction="outbound", family="ipv4") == 1
    flush(web)
    wait_for(lambda: not_ready(sidecar))
    assert sidecar.process is not None
    assert sidecar.process.output.count("outbound IPv4 is captured no longer") == 1


def test_a_captured_connection_from_a_port_that_is_served_as_well_is_no_inbound_one(
    sidecar: Sidecar, web: Host, peer: Host
) -> None:
    sidecar.capture()
    wait_for(lambda: in_place(sidecar))
    with listening(peer, "ipv4", APP), web.open_socket() as server, web.open_socket() as client:
        for sock in (server, client):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((web.address, 9000))
        server.listen()
        client.connect((peer.address, APP))
        looked = capture_of(sidecar).proved_at
        wait_for(lambda: capture_of(sidecar).proved_at > looked)
        looked = capture_of(sidecar).proved_at
        wait_for(lambda: capture_of(sidecar).proved_at > looked)
        assert capture_of(sidecar).uncaptured == {"outbound": 0, "inbound": 0}


def test_what_got_past_the_sidecar_is_counted_and_what_is_older_than_capture_is_not(
    sidecar: Sidecar, web: Host, peer: Host
) -> None:
    with listening(peer, "ipv4", APP) as there, listening(web, "ipv4", APP) as here:
        older = [web.connect(peer.address, APP), peer.connect(web.address, APP)]
        sidecar.capture()
        wait_for(lambda: in_place(sidecar))
        captured = web.connect(peer.address, APP)
        assert capture_of(sidecar).uncaptured == {"outbound": 0, "inbound": 0}

        flush(web)
        past = [web.connect(peer.address, APP), peer.connect(web.address, APP)]
        wait_for(lambda: capture_of(sidecar).uncaptured == {"outbound": 1, "inbound": 1})
        out = f"{past[0].getsockname()[0]}:{past[0].getsockname()[1]} -> {peer.address}:{APP}"
        into = f"{past[1].getsockname()[0]}:{past[1].getsockname()[1]} -> {web.address}:{APP}"
        assert set(capture_of(sidecar).examples) == {out, into}
        assert value(web, "meshnet_uncaptured_connections", direction="inbound") == 1
        assert "got past the sidecar" in sidecar.meshnet("status", check=False)
        assert f"1 connection inbound got past the sidecar: {into} (" in sidecar.status().not_ready_because[-1]

        sidecar.capture()
        wait_for(lambda: in_place(sidecar))
        assert capture_of(sidecar).uncaptured == {"outbound": 1, "inbound": 1}  # those are past it still
        for sock in past:
            sock.close()
        while True:
            there.setblocking(False)
            try:
                there.accept()[0].close()
            except BlockingIOError:
                break
        here.close()
        wait_for(lambda: capture_of(sidecar).uncaptured == {"outbound": 0, "inbound": 0})
        wait_for(lambda: sidecar.status().ready)
        for sock in (*older, captured):
            sock.close()


def test_what_came_in_beside_the_sidecar_takes_readiness_away_though_all_that_leaves_is_captured(
    sidecar: Sidecar, web: Host, peer: Host
) -> None:
    sidecar.capture()
    wait_for(lambda: in_place(sidecar))
    web.run("nft", "flush", "chain", "inet", "meshnet", "MESHNET_IN")
    with listening(web, "ipv4", APP) as here, peer.connect(web.address, APP):
        accepted, _ = here.accept()
        with accepted:
            status = wait_for(lambda: not_ready(sidecar))
            assert in_place(sidecar)
            (why,) = status.not_ready_because
            assert "1 connection inbound got past the sidecar" in why
            assert get(web, "/readyz")[0] == 503
    sidecar.capture()
    wait_for(lambda: sidecar.status().ready)
