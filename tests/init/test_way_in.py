"""Settings changed by hand, and read again, do not capture the port by which SSH reaches the host."""

import signal
import sys
from collections.abc import Sequence

import msgspec
import pytest

from meshnet.errors import CommandError
from meshnet.model.settings import CaptureSection, Settings
from meshnet_init.keep.way_in import captured_ways_in, need_way_in
from meshnet_init.plan import Host as HostFacts
from meshnet_init.plan import make_plan
from meshnet_init.rule import Rule
from tests.init.kept import Kept
from tests.init.kernel import INBOUND, connect, listening
from tests.init.test_fail import Site
from tests.world import Mesh, World, wait_for

pytestmark = pytest.mark.netns

SSH = 2222
# A program that is called sshd, as the kernel shows it, and listens; a caller is told so.
SSHD = f"""import ctypes, socket
ctypes.CDLL(None).prctl(15, b'sshd', 0, 0, 0)
with socket.create_server(('0.0.0.0', {SSH})) as server:
    while True:
        server.accept()[0].sendall(b'here')
"""


@pytest.fixture
def reached(by_nft: Kept) -> Kept:
    """A host with rules that leave SSH alone, and what says so."""
    by_nft.host.spawn(sys.executable, "-c", SSHD)
    _settings(by_nft, exclude=[SSH])
    wait_for(lambda: _answers(by_nft), what="sshd")
    return by_nft


def _settings(kept: Kept, exclude: list[int], more: str = "") -> None:
    kept.configure(more)
    kept.config.write_text(kept.config.read_text().replace("ports = []", f"ports = {[str(port) for port in exclude]}"))


def _answers(kept: Kept) -> bool:
    try:
        with kept.lab.peer.connect(kept.host.address, SSH) as client:
            return client.recv(4) == b"here"
    except ConnectionRefusedError:
        return False


def _excludes(kept: Kept) -> bool:
    return f"dport {SSH} " in kept.lab.rules_text()


def _again(kept: Kept) -> None:
    assert kept.process is not None
    kept.process.popen.send_signal(signal.SIGHUP)


def _plan(**capture: object) -> Sequence[Rule]:
    return make_plan(Settings(capture=msgspec.convert(capture, CaptureSection)), HostFacts()).rules


@pytest.mark.parametrize("port", [22, 2222])
def test_also_those_of_some_networks_alone_are_somebodys_way_in(port: int) -> None:
    for_nobody = _plan(exclude_inbound_ports=[str(port)])
    for_some = _plan(exclude_inbound_ports=[], inbound_cidrs=["10.0.0.0/8"])
    for_all = _plan(exclude_inbound_ports=[])
    for wanted, before in [(for_some, for_nobody), (for_all, for_nobody), (for_all, for_some)]:
        with pytest.raises(CommandError, match=f"would capture port {port}"):
            need_way_in(wanted, [before], {port})
    for wanted, before in [(for_some, for_some), (for_some, for_all), (for_nobody, for_all), (for_all, for_all)]:
        need_way_in(wanted, [before], {port})
    assert [captured_ways_in(rules, {port}) for rules in (for_nobody, for_some, for_all)] == [[], [port], [port]]


def test_on_sighup_the_settings_stay_as_they_were_until_the_risk_is_accepted(reached: Kept) -> None:
    reached.start()
    _settings(reached, exclude=[])
    _again(reached)
    why = f"would capture port {SSH}, by which SSH may reach this host; the rules stay as they are"
    wait_for(lambda: why in reached.now().problem, what="a refusal")
    assert "--accept-risk=lose-ssh" in reached.log
    assert (_excludes(reached), _answers(reached)) == (True, True)
    reached.flush()
    reached.repaired()
    assert (_excludes(reached), _answers(reached)) == (True, True)

    reached.host.run("meshnet", "init", "--config", reached.config, "--accept-risk=lose-ssh")
    report = reached.now()
    assert (report.state, report.in_place, report.problem) == ("keeping", True, "")
    with listening(reached.host, "ipv4", INBOUND) as inbound:
        connect(reached.lab.peer, reached.host.address, SSH, inbound).close()
    _again(reached)  # what is captured already is nothing new
    wait_for(lambda: reached.now().looked_at > report.looked_at)
    assert reached.now().in_place


def test_a_keeper_that_begins_beside_such_rules_keeps_them(reached: Kept) -> None:
    reached.start()
    assert reached.process is not None
    assert reached.process.terminate() == 0
    _settings(reached, exclude=[])
    reached.start()
    wait_for(lambda: f"would capture port {SSH}" in reached.now().problem, what="a refusal")
    wait_for(lambda: reached.now().in_place, what="the rules that were there")
    assert (_excludes(reached), _answers(reached)) == (True, True)
    reached.flush()
    reached.repaired()
    assert (_excludes(reached), _answers(reached)) == (True, True)
    _again(reached)
    wait_for(lambda: reached.log.count("would capture port") == 2, what="the same again")
    assert (_excludes(reached), _answers(reached)) == (True, True)

    _settings(reached, exclude=[SSH, 80])
    _again(reached)
    wait_for(lambda: "dport 80 " in reached.lab.rules_text(), what="rules that leave it alone")
    assert (reached.now().problem, _excludes(reached), _answers(reached)) == ("", True, True)


def test_the_routes_of_such_rules_are_kept_as_well(reached: Kept) -> None:
    routed = "original_source = true\n"
    _settings(reached, exclude=[SSH], more=routed)
    reached.start()
    routes = reached.host.run("ip", "rule").stdout
    assert reached.process is not None
    assert reached.process.terminate() == 0
    _settings(reached, exclude=[], more=routed)
    reached.start()
    wait_for(lambda: f"would capture port {SSH}" in reached.now().problem, what="a refusal")
    wait_for(lambda: reached.now().in_place, what="the rules that were there")
    looked = reached.now().looked_at
    wait_for(lambda: reached.now().looked_at > looked, what="another look")
    assert (reached.now().repairs, reached.host.run("ip", "rule").stdout) == (0, routes)


def test_nor_do_they_once_a_sidecar_comes_back_where_its_death_lets_all_pass(world: World, mesh: Mesh) -> None:
    """capture.fail = "open": meanwhile no rules are in force that could be compared."""
    site = Site(world, mesh, by=(), fail="open", exclude_inbound_ports=[str(SSH)])
    site.web.spawn(sys.executable, "-c", SSHD)
    wait_for(lambda: site.web.listens(SSH), what="sshd")
    site.kill()
    wait_for(lambda: "new connections go direct" in site.keeper.output, what="no capture")
    config = site.sidecar.config
    config.write_text(config.read_text().replace(f'"{SSH}"', "").replace(f"'{SSH}'", ""))
    site.sidecar.start()
    wait_for(lambda: f"would capture port {SSH}" in site.keeper.output, timeout=20.0, what="a refusal")
    site.until_captured()
    with site.peer.connect(site.web.address, SSH) as client:
        assert client.recv(4) == b"here"


def test_where_nothing_captures_yet_who_puts_the_rules_in_was_asked(reached: Kept) -> None:
    """`up --accept-risk`, and a reboot after it."""
    _settings(reached, exclude=[])
    reached.start()
    with listening(reached.host, "ipv4", INBOUND) as inbound:
        connect(reached.lab.peer, reached.host.address, SSH, inbound).close()
    assert f"port {SSH} is captured, by which SSH may reach this host" in reached.log
