"""The strict guard of a keeper: a flush of all rules cuts nothing, and lets nothing pass in plain text."""

import os
import signal

import pytest

from meshnet_cli.demo.wire import Capture
from meshnet_init.backends.nft import NftBackend, netlink_socket
from meshnet_init.foreign import foreign_rules
from meshnet_init.host import host_facts
from meshnet_init.keep import guard
from meshnet_init.plan import make_plan
from meshnet_init.render import KEEPER_TABLE
from meshnet_init.rule import CHAIN_OUT
from tests.init.kept import Kept
from tests.init.kernel import APP_PORT, COMMANDS, OTHER_PORT, address_of, capture, connect, listening
from tests.init.sides import Sides, transparent
from tests.world import Host, Mesh, ProgramFailed, World, stand_still, wait_for

pytestmark = pytest.mark.netns

SAID = b"still there?"  # by connections that are tried
SERVICE = {"ipv4": "10.96.0.10", "ipv6": "fd96::10"}


def held(host: Host) -> bool:
    return f"table inet {KEEPER_TABLE}" in host.run("nft", "list", "tables").stdout


def caught(host: Host) -> int:
    """How many connections the guard has redirected."""
    with host.entered():
        installed = guard.held()
    assert installed is not None
    return sum(counted.packets for counted in installed.rules if counted.rule.redirect)


def start(kept: Kept, more: str = "") -> None:
    kept.configure(f"strict = true\n{more}")
    kept.start()
    wait_for(lambda: held(kept.host), timeout=30.0, what="the guard stands")


def flush(host: Host, backend: str) -> None:
    """All rules there are."""
    if backend != "nft":
        for command in (COMMANDS[backend], COMMANDS[backend].replace("iptables", "ip6tables")):
            for table in ("mangle", "nat", "filter"):
                host.run(command, "-t", table, "-F")
    host.run("nft", "flush", "ruleset")


def test_between_a_flush_and_its_repair_all_is_captured_as_before(kept: Kept, sides: Sides) -> None:
    """istio#61182: rules vanish later."""
    start(kept)
    inward, outward = sides.call_in(sides.inbound), sides.call_out(sides.outbound)
    assert caught(kept.host) == 0, "the rules decide before it"
    pid = kept.now().pid
    stand_still(pid)
    flush(kept.host, kept.lab.backend.name)
    assert not kept.is_captured()
    with Capture(kept.lab.world.switch, SAID) as wire:
        assert outward.works()
        sides.call_out(sides.outbound)
    assert (wire.with_marker, wire.lost) == (0, 0)
    assert inward.works()
    sides.call_in(sides.inbound)
    assert caught(kept.host) == 2
    os.kill(pid, signal.SIGCONT)
    kept.repaired()
    assert inward.works()
    assert outward.works()


def test_what_is_given_to_a_listener_without_translation_still_is(by_nft: Kept, family: str) -> None:
    start(by_nft, "inbound_mode = 'tproxy'\n")
    host, peer = by_nft.host, by_nft.lab.peer
    with transparent(host, family) as proxy, listening(host, family, APP_PORT) as application:
        opened = [connect(peer, address_of(host, family), APP_PORT, proxy, application)]
        stand_still(by_nft.now().pid)
        flush(host, "nft")
        opened.append(connect(peer, address_of(host, family), APP_PORT, proxy, application))
        assert all(each.works() for each in opened)
    for each in opened:
        each.close()


def test_without_it_they_leave_in_plain_text(by_nft: Kept) -> None:
    host, peer = by_nft.host, by_nft.lab.peer
    by_nft.start()
    assert not held(host)
    with listening(host, "ipv4", 15101, "127.0.0.1") as outbound, listening(peer, "ipv4", APP_PORT) as server:
        captured = connect(host, peer.address, APP_PORT, outbound)
        stand_still(by_nft.now().pid)
        flush(host, "nft")
        with Capture(by_nft.lab.world.switch, SAID) as wire:
            captured.client.sendall(SAID)
            direct = connect(host, peer.address, APP_PORT, server, outbound)
            wait_for(lambda: wire.with_marker)
    for each in (captured, direct):
        each.close()


def test_what_others_turn_elsewhere_meanwhile_is_refused(by_nft: Kept, family: str) -> None:
    start(by_nft)
    host, peer = by_nft.host, address_of(by_nft.lab.peer, family)
    stand_still(by_nft.now().pid)
    flush(host, "nft")
    to = f"ip to {peer}" if family == "ipv4" else f"ip6 to [{peer}]"
    ahead = f"tcp dport {APP_PORT} dnat {to}:{OTHER_PORT}"
    host.run(
        "nft", "-f", "-", stdin=f"table inet ahead {{ chain c {{ type nat hook output priority -150; {ahead}; }}; }}"
    )
    with listening(by_nft.lab.peer, family, OTHER_PORT), pytest.raises(ConnectionRefusedError):
        host.connect(peer, APP_PORT)


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
@pytest.mark.parametrize(("backend", "truthful"), [("nft", False), ("iptables", False), ("iptables", True)])
def test_what_is_meant_for_a_tunnel_is_never_to_be_read_on_the_wire(
    world: World, mesh: Mesh, backend: str, truthful: bool, family: str
) -> None:
    web, api = world.host("web"), world.host("api")
    mesh.write(mesh.service("api", [APP_PORT], [api], addresses=list(SERVICE.values())))
    mesh.sidecar(api).capture()
    sidecar = mesh.sidecar(web, capture={"strict": True, "backend": backend, "truthful_connect": truthful})
    keeper = web.spawn("meshnet", "rules", "keep", "--config", sidecar.config, name="keeper")
    wait_for(lambda: held(web), timeout=30.0, what="the guard stands")
    with listening(api, "ipv4", APP_PORT) as server, Capture(world.switch, SAID) as wire:
        opened = [connect(web, SERVICE[family], APP_PORT, server)]
        assert opened[0].works()
        stand_still(keeper.pid)
        flush(web, backend)
        assert opened[0].works()
        opened += [connect(web, SERVICE[family], APP_PORT, server) for _ in range(10)]
        assert all(each.works() for each in opened)
    assert (wire.with_marker, wire.lost) == (0, 0)
    assert 15108 in wire.tcp_ports
    for each in opened:
        each.close()


@pytest.mark.parametrize(
    "command",
    [
        f"delete table inet {KEEPER_TABLE}",
        f"flush table inet {KEEPER_TABLE}",
        f"flush chain inet {KEEPER_TABLE} MESHNET_OUT",
        f"insert rule inet {KEEPER_TABLE} MESHNET_OUT accept",
        f"add table inet {KEEPER_TABLE} {{ flags dormant; }}",
    ],
)
def test_nobody_else_may_change_it(by_nft: Kept, command: str) -> None:
    start(by_nft)
    before = by_nft.lab.rules_text()
    with pytest.raises(ProgramFailed, match="Operation not permitted"):
        by_nft.host.run("nft", *command.split())
    assert by_nft.lab.rules_text() == before


def test_it_is_not_taken_for_another_programs(by_nft: Kept) -> None:
    start(by_nft)
    with by_nft.host.entered():
        assert foreign_rules("nft", CHAIN_OUT, "10.1.2.3", APP_PORT) == ((), ())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_goes_with_the_keeper_and_comes_with_the_next(kept: Kept, sides: Sides, number: signal.Signals) -> None:
    start(kept)
    opened = [sides.call_in(sides.inbound), sides.call_out(sides.outbound)]
    assert kept.process is not None
    os.kill(kept.now().pid, number)
    kept.process.popen.wait()
    wait_for(lambda: not held(kept.host))
    assert kept.is_captured()
    opened += [sides.call_in(sides.inbound), sides.call_out(sides.outbound)]
    start(kept)
    assert kept.now().repairs == 0
    assert all(each.works() for each in opened)


def test_rules_that_are_taken_out_take_it_along(kept: Kept, sides: Sides) -> None:
    before = kept.lab.rules_text()
    start(kept)
    opened = [sides.call_in(sides.inbound), sides.call_out(sides.outbound)]
    removal = kept.host.spawn("meshnet", "init", "remove", "--drain", "30s", name="removal")
    wait_for(lambda: not kept.is_captured())
    assert not held(kept.host)
    assert all(each.works() for each in opened)
    sides.call_in(sides.application)
    sides.call_out(sides.server)
    for each in opened:
        each.close()
    removal.popen.wait(timeout=60)
    wait_for(lambda: kept.lab.rules_text() == before)


def test_it_follows_the_settings(by_nft: Kept) -> None:
    start(by_nft)
    assert by_nft.process is not None
    by_nft.configure("strict = true\nexclude_outbound_ports = ['5432']\n")
    for _ in range(2):
        by_nft.host.run("meshnet", "init", "--config", by_nft.config)
        wait_for(lambda: in_guard(by_nft.host, "dport 5432"))
    assert "5432" in by_nft.host.run("meshnet", "rules", "show").stdout.partition("backend keeper")[2]
    by_nft.configure()
    by_nft.process.popen.send_signal(signal.SIGHUP)
    wait_for(lambda: not held(by_nft.host))
    assert by_nft.now().unguarded == ""


def in_guard(host: Host, words: str) -> bool:
    return words in host.run("nft", "list", "table", "inet", KEEPER_TABLE, check=False).stdout


def test_where_it_cannot_stand_that_is_said_and_the_rules_have_their_own(by_nft: Kept) -> None:
    with by_nft.host.entered(), netlink_socket() as somebody:
        NftBackend(KEEPER_TABLE, somebody).apply(make_plan(capture(), host_facts()))
        # More rules than the kernel has room to complain of.
        by_nft.configure(f"strict = true\nexclude_outbound_ports = {[str(port) for port in range(20000, 20400, 2)]}\n")
        by_nft.start()
        report = wait_for(lambda: now if (now := by_nft.now()).unguarded else None, timeout=30.0)
        assert report.state == "keeping"
        assert "Operation not permitted" in report.unguarded
        assert "who flushes all rules lets connections pass until they are repaired" in by_nft.log
    assert "MESHNET_GUARD_OUT" in by_nft.lab.rules_text()
    wait_for(lambda: held(by_nft.host) and not by_nft.now().unguarded, timeout=30.0)
    assert in_guard(by_nft.host, "reset")
