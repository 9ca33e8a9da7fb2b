"""A sidecar is killed: new connections are refused, or go direct where that was asked for by name."""

import os
import signal
import socket

import pytest

from meshnet.errors import CommandError
from tests.init.kernel import APP_PORT, listening
from tests.proxy.metrics import value
from tests.world import Mesh, Sidecar, World, wait_for

pytestmark = pytest.mark.netns

AS_ITS_UNIT = ("setpriv", "--bounding-set=-all,+net_admin,+net_raw", "--inh-caps=-all", "--no-new-privs", "--")
"""The rights that `meshnet-rules.service` has."""


def test_rules_can_be_removed_right_after_a_sidecar_has_come_back(world: World, mesh: Mesh) -> None:
    site = Site(world, mesh)
    for _ in range(3):
        site.kill()
        site.sidecar.start()
        site.sidecar.release("0s")
        assert "table inet meshnet" not in site.web.run("nft", "list", "ruleset").stdout
        site.sidecar.capture()
        site.until_captured()


def test_a_sidecar_that_comes_back_with_other_settings_gets_rules_that_fit_it(world: World, mesh: Mesh) -> None:
    site = Site(world, mesh)
    site.kill()
    site.sidecar.config.write_text(site.sidecar.config.read_text() + "[proxy]\noutbound_port = 16101\n")
    site.sidecar.spawn()
    wait_for(lambda: "redirect to :16101" in site.web.run("nft", "list", "ruleset").stdout, timeout=20.0)
    site.until_captured()


def test_settings_that_do_not_fit_the_sidecar_that_runs_change_no_rules(world: World, mesh: Mesh) -> None:
    site = Site(world, mesh)
    before = site.web.run("nft", "-a", "-s", "list", "ruleset").stdout
    site.sidecar.config.write_text(site.sidecar.config.read_text() + "[proxy]\noutbound_port = 16101\n")
    for number in (signal.SIGHUP, signal.SIGKILL):
        os.kill(site.keeper.pid, number)
        if number == signal.SIGKILL:
            site.keeper = site.web.spawn("meshnet", "rules", "keep", "--config", site.sidecar.config, name="again")
        wait_for(lambda: "the settings do not fit the sidecar that runs" in site.keeper.output, timeout=20.0)
        assert site.web.run("nft", "-a", "-s", "list", "ruleset").stdout == before
    wait_for(lambda: "16101" in "".join(site.sidecar.status().not_ready_because), timeout=20.0)


class Site:
    """`web` has a sidecar and a keeper, started through `by`; `peer` has neither, and a server."""

    def __init__(self, world: World, mesh: Mesh, *, by: tuple[str, ...] = AS_ITS_UNIT, **capture: object) -> None:
        self.web, self.peer = world.host("web"), world.host("peer")
        mesh.write()
        self.sidecar: Sidecar = mesh.sidecar(self.web, start=False, capture={"proof_interval": "300ms", **capture})
        self.sidecar.spawn()
        keeper = ("meshnet", "rules", "keep", "--config", self.sidecar.config)
        self.keeper = self.web.spawn(*by, *keeper, name="keeper")
        self.until_captured()

    def until_captured(self) -> None:
        def captured() -> bool:
            try:
                status = self.sidecar.status().capture
            except CommandError:  # it has not come up yet
                return False
            keeper = status.keeper if status is not None and status.in_place else None
            return keeper is not None and keeper.in_place and keeper.sidecar == "alive"

        wait_for(captured, what="captured and kept")

    def kill(self) -> None:
        assert self.sidecar.process is not None
        os.kill(self.sidecar.process.pid, signal.SIGKILL)
        self.sidecar.process.popen.wait()

    def reaches_peer(self, target: str = "") -> bool:
        try:
            with self.web.connect(target or self.peer.address, APP_PORT, timeout=2.0):
                return True
        except ConnectionRefusedError:
            return False


def has_ended(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_by_default_new_connections_are_refused_until_a_sidecar_is_back(world: World, mesh: Mesh) -> None:
    site = Site(world, mesh)
    with listening(site.peer, "ipv4", APP_PORT):
        with site.web.connect(site.peer.address, APP_PORT) as captured:
            site.kill()
            assert has_ended(captured)
            wait_for(lambda: "the sidecar is gone: new connections are refused" in site.keeper.output)
            assert not site.reaches_peer()
        site.sidecar.start()
        site.until_captured()
        assert site.reaches_peer()


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
@pytest.mark.parametrize(
    ("backend", "strict"),
    [("nft", False), ("nft", True), ("iptables", False), ("iptables", True), ("legacy", True)],
)
def test_fail_open_by_name_lets_them_go_direct_until_a_sidecar_is_ready(
    world: World, mesh: Mesh, backend: str, strict: bool, family: str
) -> None:
    site = Site(world, mesh, fail="open", required=True, backend=backend, strict=strict)
    target = site.peer.address6 if family == "ipv6" else site.peer.address
    with listening(site.peer, family, APP_PORT) as server:
        with site.web.connect(target, APP_PORT) as captured:
            seen_by_peer = server.accept()[0]
            assert seen_by_peer.getpeername() != captured.getsockname()
            seen_by_peer.close()
            site.kill()
            wait_for(lambda: site.reaches_peer(target), what="new connections go direct")
            server.accept()[0].close()
            assert has_ended(captured)
        with site.web.connect(target, APP_PORT) as direct:
            direct_end = server.accept()[0]
            assert direct_end.getpeername() == direct.getsockname()
            site.sidecar.start()
            site.until_captured()
            direct.sendall(b"lives on")
            assert direct_end.recv(8) == b"lives on"
            direct_end.close()
        with site.web.connect(target, APP_PORT) as captured, server.accept()[0] as end:
            assert end.getpeername() != captured.getsockname()
    assert value(site.web, "meshnet_rules_keeper") == 1


def test_a_keeper_that_begins_before_a_sidecar_puts_nothing_in_where_it_is_to_fail_open(
    world: World, mesh: Mesh
) -> None:
    web, peer = world.host("web"), world.host("peer")
    mesh.write()
    sidecar = mesh.sidecar(web, start=False, capture={"proof_interval": "300ms", "fail": "open"})
    keeper = web.spawn("meshnet", "rules", "keep", "--config", sidecar.config, name="keeper")
    wait_for(lambda: "meshnet/keeper" in web.run("cat", "/proc/net/unix").stdout)
    with listening(peer, "ipv4", APP_PORT) as server:
        with web.connect(peer.address, APP_PORT) as direct, server.accept()[0] as end:
            assert end.getpeername() == direct.getsockname()
        sidecar.start()
        wait_for(lambda: "captured again" in keeper.output)
        with web.connect(peer.address, APP_PORT) as captured, server.accept()[0] as end:
            assert end.getpeername() != captured.getsockname()


def test_what_comes_in_and_is_taken_by_another_program_makes_the_sidecar_not_ready(world: World, mesh: Mesh) -> None:
    """istio#56414: rules placed after others. The sidecar cannot see it; the keeper's visitor can."""
    web = world.host("web")
    mesh.write()
    ahead = "table inet ahead { chain c { type nat hook prerouting priority -150; tcp dport 15122 redirect to :9; }; }"
    web.run("nft", "-f", "-", stdin=ahead)
    sidecar = mesh.sidecar(web, capture={"proof_interval": "300ms"})
    web.spawn("meshnet", "rules", "keep", "--config", sidecar.config, name="keeper")

    def lost() -> str:
        return "".join(line for line in sidecar.status().not_ready_because if "inbound IPv4 is not captured" in line)

    wait_for(lost)
    assert value(web, "meshnet_rules_in_place", direction="inbound", family="ipv4") == 0
    wait_for(lambda: value(web, "meshnet_rules_in_place", direction="outbound", family="ipv4") == 1)
    assert lost()
    web.run("nft", "delete", "table", "inet", "ahead")
    sidecar.wait_until_ready()
    wait_for(lambda: value(web, "meshnet_rules_in_place", direction="inbound", family="ipv4") == 1)


def test_inbound_capture_that_another_program_takes_later_is_noticed_by_the_clock(world: World, mesh: Mesh) -> None:
    """Our rules are as planned, so nothing is repaired: only a visitor can tell."""
    site = Site(world, mesh, inbound_proof_interval="500ms")

    def inbound() -> float:
        return value(site.web, "meshnet_rules_in_place", direction="inbound", family="ipv4")

    wait_for(lambda: inbound() == 1)
    ahead = "table inet ahead { chain c { type nat hook prerouting priority -150; tcp dport 15122 redirect to :9; }; }"
    site.web.run("nft", "-f", "-", stdin=ahead)
    wait_for(lambda: inbound() == 0)
    wait_for(lambda: any("inbound IPv4 is not captured" in line for line in site.sidecar.status().not_ready_because))
    site.web.run("nft", "delete", "table", "inet", "ahead")
    wait_for(lambda: inbound() == 1)


def test_visitors_leave_no_connection_behind(world: World, mesh: Mesh) -> None:
    """One whose end is closed once its cable is cut is open to the sidecar until a keepalive finds that."""
    site = Site(world, mesh)
    for _ in range(3):
        assert "inbound" in site.sidecar.meshnet("rules", "verify", "--config", str(site.sidecar.config))
    wait_for(
        lambda: not site.web.run("ss", "-tnH", "state", "connected", "sport", "=", ":15106").stdout,
        what="the end of each visit",
    )


def test_the_sidecar_tells_of_the_keepers_repairs(world: World, mesh: Mesh) -> None:
    site = Site(world, mesh)
    for family in ("ipv4", "ipv6"):  # which the sidecar cannot see by itself
        wait_for(lambda family=family: value(site.web, "meshnet_rules_in_place", direction="inbound", family=family))
    assert site.sidecar.connections() == ()
    site.web.run("nft", "flush", "ruleset")
    wait_for(lambda: value(site.web, "meshnet_rules_repairs_total") >= 1)
    shown = site.sidecar.meshnet("status", check=False)
    assert "keeper: keeping, pid " in shown
    assert "after nft (pid " in shown
    assert site.sidecar.process is not None
    assert "the keeper has repaired the rules (changed by nft (pid " in site.sidecar.process.output
    assert site.keeper.terminate() == 0
    wait_for(lambda: "nobody keeps the rules" in site.sidecar.meshnet("status", check=False))
