"""The contract of a backend, held by each: what is written is read back, twice is once, others' rules stay."""

import ctypes
import os
import re
import signal
import struct
import sys
from collections.abc import Callable

import msgspec
import pytest

from meshnet.errors import CommandError
from meshnet_init.apply import apply, apply_plan
from meshnet_init.backends import differences
from meshnet_init.backends.iptables_binaries import by_binaries
from meshnet_init.choose import choose, every_backend
from meshnet_init.host import host_facts
from meshnet_init.plan import Host, make_plan
from meshnet_init.remove import Removed, remove
from meshnet_init.render import iptables_text, nft_text
from meshnet_init.rule import CHAIN_IN, Plan, Rule, drain_set
from tests.init.kernel import COMMANDS, Lab, backend_named, capture, legacy_rules
from tests.init.test_render import PLANS
from tests.world import World

pytestmark = pytest.mark.netns

GUARDED = {
    "inbound_mode": "tproxy",
    "strict": True,
    "quic": "reject",
    "udp": "reject",
    "reroute_interfaces": ["br-*"],
    "inbound_cidrs": ["10.0.0.0/8"],
}
OLD, NEW = {"exclude_inbound_ports": ["22"]}, {"outbound_cidrs": ["10.0.0.0/8", "fd00::/8"], "outbound_ports": ["80"]}


@pytest.fixture(params=[*(backend.name for backend in every_backend()), "legacy by its programs"])
def lab(request: pytest.FixtureRequest, world: World) -> Lab:
    """The legacy tables are written by programs where python-iptables is not installed: a pod's image, say."""
    if request.param != "legacy by its programs":
        return Lab(world, backend_named(request.param))
    backend = by_binaries("legacy", "legacy")
    assert backend is not None
    return Lab(world, backend)


def planned(**values: object) -> Plan:
    return make_plan(capture(**values), host_facts())


def in_force(lab: Lab, plan: Plan) -> bool:
    return not differences(lab.backend.expected(plan), lab.backend.installed())


def test_the_three_promised_backends_are_there() -> None:
    assert [backend.name for backend in every_backend()] == ["nft", "iptables", "legacy"]


@pytest.mark.parametrize("name", PLANS)
def test_what_is_written_is_read_back(lab: Lab, name: str) -> None:
    plan = Plan(rules=tuple(rule for rule in PLANS[name].rules if rule.gid is None), ipv6=PLANS[name].ipv6)
    with lab.app.entered():
        if name == "truthful" and lab.backend.unavailable(plan):
            assert lab.backend.name == "nft"  # a kernel may be without nft_queue; it has xt_NFQUEUE
            with pytest.raises(CommandError, match="the kernel refused the nftables rules"):
                lab.backend.apply(plan)
            assert lab.backend.installed() is None
            return
        lab.backend.apply(plan)
        installed = lab.backend.installed()

    assert differences(lab.backend.expected(plan), installed) == []
    assert installed is not None
    assert installed.redirect_ports() == {15101, 15106}
    assert installed.draining() == (name == "drain")


def test_twice_is_once_down_to_the_handles(lab: Lab) -> None:
    with lab.app.entered():
        first = apply_plan(planned(**OLD), lab.backend)
        before = lab.rules_text()
        second = apply_plan(planned(**OLD), lab.backend)

    assert (first.changed, second.changed) == (True, False)
    assert lab.rules_text() == before


def test_writing_the_same_again_leaves_the_same(lab: Lab) -> None:
    with lab.app.entered():
        lab.backend.apply(planned(**OLD))
        lab.backend.apply(planned(**NEW))
        lab.backend.apply(planned(**OLD))
        assert in_force(lab, planned(**OLD))
        lab.backend.apply(planned(**OLD))
        assert in_force(lab, planned(**OLD))


def test_install_and_removal_leave_no_trace(lab: Lab) -> None:
    before = lab.rules_text()
    with lab.app.entered():
        apply_plan(planned(), lab.backend)
        assert lab.rules_text() != before
        assert remove(0.0) == Removed(backends=(lab.backend.name,))

    assert lab.rules_text() == before
    with lab.app.entered():
        assert lab.backend.installed() is None
        assert remove(0.0) == Removed(backends=())
    assert lab.rules_text() == before


def test_asking_whether_it_can_be_used_leaves_no_trace(lab: Lab) -> None:
    before = lab.rules_text()
    with lab.app.entered():
        for plan in PLANS.values():
            if lack := lab.backend.unavailable(plan):
                assert ("queue" in lack.why, lab.backend.name) == (True, "nft")

    assert lab.rules_text() == before


def test_rules_of_others_stay_as_they_are(lab: Lab) -> None:
    lab.app.run("nft", "-f", "-", stdin=FOREIGN_NFT)
    for command in ("iptables", "ip6tables"):
        lab.app.run(f"{command}-restore", "--noflush", stdin=FOREIGN_IPTABLES)
    before = lab.rules_text()

    with lab.app.entered():
        apply_plan(planned(**OLD), lab.backend)
        apply_plan(planned(**NEW), lab.backend)
        assert before_lines(before) <= before_lines(lab.rules_text())
        remove(0.0)

    assert lab.rules_text() == before


NATIVE_RULES_IN_IPTABLES_TABLE = """
table ip nat {
  chain PREROUTING {
    type nat hook prerouting priority -100;
    ip saddr { 1.2.3.4, 5.6.7.8 } tcp dport 81 redirect to :8080
  }
}
"""


def test_an_iptables_table_only_nft_understands_is_left_alone(lab: Lab) -> None:
    lab.app.run("nft", "-f", "-", stdin=NATIVE_RULES_IN_IPTABLES_TABLE)
    before = lab.rules_text()

    with lab.app.entered():
        if lab.backend.name == "iptables":  # it would write what it could never read again
            with pytest.raises(CommandError) as caught:
                apply_plan(planned(), lab.backend)
            assert "--backend nft" in caught.value.fix
        else:
            apply_plan(planned(), lab.backend)
            assert in_force(lab, planned())
        remove(0.0)

    assert lab.rules_text() == before


def test_the_older_backends_rules_go_when_the_newer_ones_are_in_force(lab: Lab) -> None:
    with lab.app.entered():
        for other in every_backend():
            apply_plan(planned(**OLD), other)
            applied = apply_plan(planned(**NEW), lab.backend)
            assert applied.replaced == ((other.name,) if other.name != lab.backend.name else ())
            assert [backend.name for backend in every_backend() if backend.installed()] == [lab.backend.name]
            remove(0.0)


def test_rules_of_two_backends_are_removed_together(lab: Lab) -> None:
    before = lab.rules_text()
    with lab.app.entered():
        for backend in every_backend():
            backend.apply(planned(**OLD))
        assert set(remove(0.0).backends) == {backend.name for backend in every_backend()}

    assert lab.rules_text() == before


def test_hits_are_counted_and_a_second_apply_keeps_them(lab: Lab) -> None:
    lab.install()
    with pytest.raises(ConnectionRefusedError):
        lab.app.connect(lab.peer.address, 80)
    lab.install()

    with lab.app.entered():
        installed = lab.backend.installed()
    assert installed is not None
    assert sum(counted.packets for counted in installed.rules if counted.rule.redirect == 15101) == 1


_PR_CAPBSET_DROP = 24

BAD = {
    "nft": Rule(chain=CHAIN_IN, why="longer than the kernel takes " * 20),
    "iptables": Rule(chain=CHAIN_IN, family="ipv6", gid=0),  # nobody knows the group of what arrives
}


def test_a_table_that_is_refused_takes_the_others_back_with_it(lab: Lab) -> None:
    bad = Rule(chain="MESHNET_GUARD_IN", family="ipv6", gid=0, why="long " * 99)
    with lab.app.entered():
        for older in (None, OLD, GUARDED):
            if older is not None:
                lab.backend.apply(planned(**older))
            before = before_lines(without_handles(lab.rules_text()))
            with pytest.raises(CommandError):
                lab.backend.apply(Plan(rules=(*planned(**NEW).rules, *planned(**GUARDED).rules[-3:], bad)))
            # A table that iptables has made anew stands behind those that were there.
            assert before_lines(without_handles(lab.rules_text())) == before


def test_jumps_keep_their_place_ahead_of_others_when_a_change_is_taken_back(lab: Lab) -> None:
    if lab.backend.name == "nft":  # which has no jumps
        return
    bad = Rule(chain="MESHNET_GUARD_IN", family="ipv6", gid=0)
    four = COMMANDS[lab.backend.name]
    with lab.app.entered():
        lab.backend.apply(planned(**OLD))
        for command in (four, four.replace("iptables", "ip6tables")):
            lab.app.run(command, "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", "9", "-j", "ACCEPT")
        with pytest.raises(CommandError):
            lab.backend.apply(Plan(rules=(*planned(**NEW).rules, bad)))
        first = lab.app.run(four, "-t", "nat", "-S", "OUTPUT").stdout.splitlines()[1]
    assert first == "-A OUTPUT -p tcp -j MESHNET_OUT"


def test_a_quotation_mark_and_an_odd_mask_of_others_are_in_nobodys_way(lab: Lab) -> None:
    for command in ("iptables", "iptables-legacy"):
        lab.app.run(command, "-t", "nat", "-N", "it's")
        lab.app.run(command, "-t", "nat", "-A", "OUTPUT", "-s", "10.0.0.0/255.0.255.0", "-j", "it's")
    lab.install(**OLD)
    with lab.app.entered():
        assert in_force(lab, planned(**OLD))
        remove(0.0)


@pytest.mark.parametrize("older", [OLD, None])
def test_one_bad_rule_rejects_the_whole_and_what_was_stays(lab: Lab, older: dict[str, object] | None) -> None:
    with lab.app.entered():
        if older is not None:
            lab.backend.apply(planned(**older))
        before = lab.rules_text()
        bad = BAD["nft" if lab.backend.name == "nft" else "iptables"]
        with pytest.raises(CommandError) as caught:
            lab.backend.apply(Plan(rules=(*planned(**NEW).rules, bad)))

    assert without_handles(lab.rules_text()) == without_handles(before)
    assert "what was in force still is" in caught.value.what
    assert caught.value.why
    assert caught.value.fix


@pytest.mark.parametrize("point", range(12))
def test_killed_at_any_point_the_old_state_or_the_new_is_in_force(lab: Lab, point: int) -> None:
    old, new = planned(**OLD), planned(**NEW)
    with lab.app.entered():
        lab.backend.apply(old)
        calls = run_killed(lambda: lab.backend.apply(new), None)
        lab.backend.apply(old)
        run_killed(lambda: lab.backend.apply(new), calls * point // 12)

        if lab.backend.name == "nft":
            assert in_force(lab, old) or in_force(lab, new)
        else:  # each family for itself: iptables has no transaction over both
            installed = lab.backend.installed()
            assert installed is not None
            assert not installed.problems
            for family in ("ipv4", "ipv6"):
                found = [counted.rule for counted in installed.rules if counted.rule.family == family]
                assert found in (plain_rules(old, family), plain_rules(new, family))
        apply_plan(new, lab.backend)
        assert in_force(lab, new)
        remove(0.0)
        assert lab.backend.installed() is None


def test_a_rule_by_hand_a_lost_rule_and_a_changed_order_are_seen_and_repaired(lab: Lab) -> None:
    lab.install(**OLD)
    damages = NFT_DAMAGES if lab.backend.name == "nft" else IPTABLES_DAMAGES
    command = COMMANDS[lab.backend.name]
    with lab.app.entered():
        for damage, said in damages:
            lab.app.run(command, *damage.split())
            found = differences(lab.backend.expected(planned(**OLD)), lab.backend.installed())
            assert any(said in line for line in found), found
            assert apply_plan(planned(**OLD), lab.backend).changed
            assert in_force(lab, planned(**OLD))


@pytest.mark.parametrize("settings", [NEW, GUARDED], ids=["plain", "guarded"])
def test_the_text_says_the_same_as_what_the_backend_writes(lab: Lab, settings: dict[str, object]) -> None:
    plan = planned(**settings)
    with lab.app.entered():
        lab.backend.apply(plan)
        written = without_handles(lab.rules_text())
        lab.backend.delete()
    if lab.backend.name == "nft":
        lab.app.run("nft", "-f", "-", stdin=nft_text(plan))
    else:
        four = COMMANDS[lab.backend.name]
        lab.app.run(f"{four}-restore", "--noflush", stdin=iptables_text(plan, "ipv4"))
        six = four.replace("iptables", "ip6tables")
        lab.app.run(f"{six}-restore", "--noflush", stdin=iptables_text(plan, "ipv6"))

    assert without_handles(lab.rules_text()) == written


def test_auto_takes_the_first_that_works(world: World) -> None:
    host = world.host("app")
    with host.entered():
        assert choose("auto", planned()).backend.name == "nft"
        applied = apply(capture(), "iptables")
        assert (applied.backend, applied.changed) == ("iptables", True)
        assert apply(capture(backend="nft")).replaced == ("iptables",)


def test_auto_takes_legacy_where_others_have_rules_there_istio15519(world: World) -> None:
    host = world.host("app")
    foreign = ("-t", "nat", "{}", "PREROUTING", "-p", "tcp", "--dport", "7777", "-j", "RETURN")
    with host.entered():
        for command in ("iptables-legacy", "ip6tables-legacy"):
            host.run(command, *(word.format("-A") for word in foreign))
            assert apply(capture()).backend == "legacy"
            host.run(command, *(word.format("-D") for word in foreign))
            assert apply(capture()).replaced == ("legacy",), "its own rules are no reason to stay"
            assert legacy_rules(host, "ip") == legacy_rules(host, "ip6") == ""


def test_to_try_a_backend_makes_no_table_here(world: World) -> None:
    host = world.host("app")
    with host.entered():
        assert choose("legacy", planned()).backend.name == "legacy"
    assert "nat" not in host.run("cat", "/proc/net/ip_tables_names", check=False).stdout.split()


def test_an_unknown_backend_is_told_with_those_there_are() -> None:
    with pytest.raises(CommandError) as caught:
        choose("ipfw", planned())
    assert caught.value.code == 2
    assert "nft" in caught.value.fix


def test_without_the_right_to_the_error_says_sudo(lab: Lab) -> None:
    with lab.app.entered():
        status = in_child(lambda: without_rights(lab))

    assert status == 5


def test_facts_of_the_host_are_those_of_the_calling_thread(world: World) -> None:
    host = world.host("app")
    with host.entered():
        assert host_facts().ipv6
        with open("/proc/sys/net/ipv6/conf/all/disable_ipv6", "w") as switch:
            switch.write("1")
        assert host_facts() == Host(ipv6=False, gids=host_facts().gids)


def test_an_apply_of_a_drain_set_over_nothing_captures_nothing(lab: Lab) -> None:
    with lab.app.entered():
        lab.backend.apply(drain_set([15106]))
        installed = lab.backend.installed()
        assert installed is not None
        assert installed.draining()
        assert not any(counted.rule.redirect for counted in installed.rules)


FOREIGN_NFT = """
table inet meshnet_neighbour {
  chain MESHNET_IN {
    type nat hook prerouting priority -105;
    tcp dport 7777 counter redirect to :7778
  }
  chain input {
    type filter hook input priority 0; policy accept;
    tcp dport 7779 counter accept
  }
}
"""
FOREIGN_IPTABLES = """*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A DOCKER -p tcp -m tcp --dport 7777 -j REDIRECT --to-ports 7778
COMMIT
*filter
-A INPUT -p tcp -m tcp --dport 7779 -j ACCEPT
COMMIT
"""

NFT_DAMAGES = [
    ("add rule inet meshnet MESHNET_IN tcp dport 80 accept", "not meshnet's"),
    ("insert rule inet meshnet MESHNET_OUT ip daddr 10.0.0.0/9 counter return", "not in the plan"),
    ("insert rule inet meshnet MESHNET_IN tcp dport 15108 counter return", "not in the plan"),
    ("flush chain inet meshnet MESHNET_OUT", "missing in MESHNET_OUT"),
    ("delete chain inet meshnet MESHNET_IN", "MESHNET_IN is missing"),
    ("flush table inet meshnet", "missing in MESHNET_IN"),
]
IPTABLES_DAMAGES = [
    ("-t nat -A MESHNET_IN -p tcp --dport 80 -j ACCEPT", "not meshnet's"),
    ("-t nat -I MESHNET_OUT -d 10.0.0.0/9 -j RETURN", "not in the plan"),
    ("-t nat -F MESHNET_OUT", "missing in MESHNET_OUT"),
    ("-t nat -D OUTPUT -p tcp -j MESHNET_OUT", "OUTPUT does not jump to MESHNET_OUT"),
    ("-t nat -I PREROUTING -p tcp -j MESHNET_IN", "jump that is not in the plan"),
    ("-t nat -A PREROUTING -p tcp --dport 9 -j MESHNET_IN", "jump that is not in the plan"),
]


def without_handles(text: str) -> str:
    return re.sub(r" # handle \d+", "", text)


def before_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines()}


def plain_rules(plan: Plan, family: str) -> list[Rule]:
    return [msgspec.structs.replace(rule, why="") for rule in plan.of_family(family)]


def run_killed(work: Callable[[], object], point: int | None) -> int:
    """Runs `work` in a child that kills itself at its `point`th call of a function; its number of calls when None."""
    reading, writing = os.pipe()

    def child() -> int:
        calls = 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += 1
            if calls == point:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        work()
        sys.setprofile(None)
        os.write(writing, str(calls).encode())
        return 0

    status = in_child(child)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    assert said if point is None else status == -signal.SIGKILL or point == 0
    return int(said or 0)


def in_child(work: Callable[[], int]) -> int:
    """What `work` returns, done by a fork of this process; negative: the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = work()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def without_rights(lab: Lab) -> int:
    """The code of the error that a process without capabilities gets from every method."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)  # _LINUX_CAPABILITY_VERSION_3, this process
    for capability in range(64):  # else root gets them back with the next program
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    if libc.capset(header, none):
        return 98
    codes = set()
    for attempt in (
        lambda: lab.backend.unavailable(planned()),
        lab.backend.installed,
        lambda: lab.backend.apply(planned()),
    ):
        try:
            attempt()
        except CommandError as error:
            codes.add(error.code if "sudo" in error.fix else 97)
    return codes.pop() if len(codes) == 1 else 96
