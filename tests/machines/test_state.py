"""What is taken for a leftover of meshnet's, on a host that is no machine of its own."""

import pytest

from tests.machines.machine import Failed, Machine
from tests.machines.state import leftovers, need_same
from tests.world import Host, World

pytestmark = pytest.mark.netns


class Here(Machine):
    """`then` is typed once somebody has looked at the host."""

    def __init__(self, host: Host, then: str = "") -> None:
        self.name = host.name
        self._host, self._then = host, then

    def run(self, command: str, *, stdin: str | None = None, code: int | None = 0) -> str:
        # The files of this host are many, and neither they nor its processes are this test's.
        network = (stdin or "").partition("\nnft ")[2].partition("\npgrep ")[0]
        said = self._host.run("sh", "-c", command, stdin=f"nft {network}").stdout
        self._host.run("sh", "-c", self._then)
        self._then = ""
        return said


@pytest.fixture
def host(world: World) -> Host:
    return world.host("web")


def test_a_proof_that_is_under_way_is_waited_for(host: Host) -> None:
    before = leftovers(Here(host))
    host.run("ip", "link", "add", "mnproof0", "type", "veth", "peer", "name", "mnproof1")
    host.run("ip", "link", "set", "mnproof0", "up")
    host.run("ip", "addr", "add", "192.0.2.9/30", "dev", "mnproof0")
    need_same(Here(host, then="ip link del mnproof0"), before)


@pytest.mark.parametrize(
    ("leave", "line"),
    [
        ("ip link add left0 type veth peer name left1", "link left0 <BROADCAST,MULTICAST,M-DOWN>"),
        ("ip netns add left", "namespace left"),
        ("iptables-legacy -t nat -A OUTPUT -p udp -j ACCEPT", "rule iptables *nat -A OUTPUT -p udp -j ACCEPT"),
        ("ip6tables-legacy -t mangle -N MESHNET_IN", "rule ip6tables *mangle :MESHNET_IN -"),
        ("iptables-legacy -P FORWARD DROP", "rule iptables *filter :FORWARD DROP"),
    ],
)
def test_links_namespaces_and_legacy_rules_are_left_over_too(host: Host, leave: str, line: str) -> None:
    before = leftovers(Here(host))
    host.run("sh", "-c", leave)
    try:
        with pytest.raises(Failed, match="is not as it was") as failed:
            need_same(Here(host), before)
    finally:
        host.run("ip", "netns", "del", "left", check=False)
    assert f"+ {line}\n" in f"{failed.value}\n"


def test_a_legacy_table_that_somebody_has_looked_at_is_nothing(host: Host) -> None:
    before = leftovers(Here(host))
    host.run("iptables-legacy", "-t", "nat", "-S")
    need_same(Here(host), before)
