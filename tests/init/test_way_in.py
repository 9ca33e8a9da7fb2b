"""Settings changed by hand, and read again, do not capture the port by which SSH reaches the host."""

import signal
import sys

import pytest

from tests.init.kept import Kept
from tests.init.kernel import INBOUND, connect, listening
from tests.world import wait_for

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


def _settings(kept: Kept, exclude: list[int]) -> None:
    kept.configure()
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


def test_on_sighup_the_settings_stay_as_they_were_until_the_risk_is_accepted(reached: Kept) -> None:
    reached.start()
    _settings(reached, exclude=[])
    _again(reached)
    why = f"would capture port {SSH}, by which SSH reaches this host; the rules stay as they are"
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


def test_a_keeper_that_begins_beside_such_rules_leaves_them(reached: Kept) -> None:
    reached.start()
    assert reached.process is not None
    assert reached.process.terminate() == 0
    _settings(reached, exclude=[])
    reached.start()
    report = reached.now()
    wait_for(lambda: reached.now().state == "failing", what="a refusal")
    assert f"would capture port {SSH}" in reached.now().problem
    assert (_excludes(reached), _answers(reached)) == (True, True)
    reached.flush()
    looked = reached.now().looked_at
    wait_for(lambda: reached.now().looked_at > looked, what="another look")
    assert reached.now().state == "failing"
    assert _answers(reached)

    _settings(reached, exclude=[SSH])
    _again(reached)
    wait_for(lambda: reached.now().in_place, what="rules that leave it alone")
    assert (_excludes(reached), _answers(reached)) == (True, True)
    assert reached.now().pid == report.pid


def test_where_nothing_captures_yet_who_puts_the_rules_in_was_asked(reached: Kept) -> None:
    """`up --accept-risk`, and a reboot after it."""
    _settings(reached, exclude=[])
    reached.start()
    with listening(reached.host, "ipv4", INBOUND) as inbound:
        connect(reached.lab.peer, reached.host.address, SSH, inbound).close()
