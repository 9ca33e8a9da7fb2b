"""The keeper: rules that others change come back, by name of who changed them; what is open lives on."""

import signal
import socket
from pathlib import Path

import msgspec
import pytest

import meshnet.net.keeper
from tests.init.kept import Kept
from tests.init.kernel import APP_PORT, INBOUND, OUTBOUND, connect, listening
from tests.init.sides import marked
from tests.lesser_kernel import lacking
from tests.world import ProgramFailed, wait_for

pytestmark = pytest.mark.netns


def test_rules_that_another_program_flushes_come_back_and_nothing_is_cut(kept: Kept) -> None:
    """istio#61182, kuma PR 16766: rules vanish later."""
    host, peer = kept.host, kept.lab.peer
    with listening(peer, "ipv4", APP_PORT) as direct:
        older = connect(host, peer.address, APP_PORT, direct)
    assert kept.start().repairs == 0
    with listening(host, "ipv4", OUTBOUND, "127.0.0.1") as outbound, listening(host, "ipv4", INBOUND) as inbound:
        captured = [
            connect(host, peer.address, APP_PORT, outbound),
            connect(peer, host.address, APP_PORT, inbound),
        ]
        kept.flush()
        report = kept.repaired()
        captured.append(connect(host, peer.address, APP_PORT, outbound))
    assert all(each.works() for each in (older, *captured))
    assert (report.state, report.in_place) == ("keeping", True)
    assert report.last_repair is not None
    assert report.last_repair.differences
    by = {"nft": "nft (pid ", "iptables": "tables (pid ", "legacy": ""}[kept.lab.backend.name]
    assert by in report.last_repair.by
    assert "rules repaired" in kept.log
    for each in (older, *captured):
        each.close()


def test_one_rule_that_is_slipped_in_is_taken_out(kept: Kept) -> None:
    kept.start()
    if kept.lab.backend.name == "nft":
        kept.host.run("nft", "insert", "rule", "inet", "meshnet", "MESHNET_OUT", "tcp", "dport", "5432", "return")
    else:
        command = "iptables-legacy" if kept.lab.backend.name == "legacy" else "iptables"
        kept.host.run(command, "-t", "nat", "-I", "MESHNET_OUT", "-p", "tcp", "--dport", "5432", "-j", "RETURN")
    report = kept.repaired()
    assert report.last_repair is not None
    assert "5432" in "".join(report.last_repair.differences)
    with kept.host.entered():
        assert "5432" not in kept.lab.rules_text()


def test_rules_that_are_put_ahead_of_ours_are_put_behind_again_and_stay(kept: Kept) -> None:
    """istio#56414: somebody whose jump came first translated what ours never saw."""
    host, peer = kept.host, kept.lab.peer
    looked = kept.start().looked_at
    legacy = kept.lab.backend.name == "legacy"
    to = (
        "-p",
        "tcp",
        "-d",
        "10.96.0.7",
        "--dport",
        "443",
        "-j",
        "DNAT",
        "--to-destination",
        f"{peer.address}:{APP_PORT}",
    )
    host.run("iptables-legacy" if legacy else "iptables", "-t", "nat", "-I", "OUTPUT", *to)
    host.configure(f"route add 10.96.0.7/32 via {peer.address}")
    if kept.lab.backend.name == "nft":  # is asked first wherever they stand
        wait_for(lambda: kept.now().looked_at > looked)
        assert kept.now().repairs == 0
    else:
        report = kept.repaired()
        assert report.last_repair is not None
        assert "ahead of MESHNET_OUT in OUTPUT: -d 10.96.0.7/32 -p tcp" in "".join(report.last_repair.differences)
        wait_for(lambda: kept.now().in_place)
    with listening(host, "ipv4", OUTBOUND, "127.0.0.1") as outbound, listening(peer, "ipv4", APP_PORT) as direct:
        connect(host, "10.96.0.7", 443, outbound, direct).close()
        own = marked(host, "ipv4", 0x1000)
        connect(host, "10.96.0.7", 443, direct, outbound, client=own).close()


def test_what_comes_later_is_tried_and_another_backend_taken_if_need_be(by_nft: Kept) -> None:
    """IPv6, whose tables lack what those of IPv4 have: rules of kinds that nobody had tried."""
    host = by_nft.host

    def lived() -> str:
        host.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
        host.run("iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", "7", "-j", "RETURN")
        process = host.spawn(
            "meshnet", "rules", "keep", "--config", by_nft.config, name="keeper", MESHNET_CAPTURE__BACKEND="auto"
        )
        first = wait_for(lambda: report.backend if (report := by_nft.now()).in_place else "")
        host.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=0")
        wait_for(lambda: (report := by_nft.now()).in_place and report.backend == "nft", what="the rules by nft")
        captured = host.run("iptables-legacy", "-t", "nat", "-S").stdout.count("REDIRECT")
        return f"{first}, then nft; {captured} left by the first; {process.terminate()}"

    assert lacking(["REDIRECT"], lived, "ipv6") == "legacy, then nft; 0 left by the first; 0"


def test_who_fights_is_named_and_it_goes_on_with_pauses(by_nft: Kept) -> None:
    by_nft.start()
    other = by_nft.host.spawn("sh", "-c", "while :; do nft flush ruleset; sleep 0.3; done", name="other")

    def named() -> bool:
        report = by_nft.now()
        repair = report.last_repair
        return report.state == "fighting" and repair is not None and repair.by.startswith("nft (pid ")

    wait_for(named, timeout=40.0, what="a fight with nft")
    assert "changes the rules again and again" in by_nft.log
    other.kill()
    # The last of its flushes may still be on its way.
    wait_for(lambda: by_nft.now().in_place and by_nft.is_captured(), timeout=60.0, what="rules that stay")


def test_sigterm_leaves_the_rules_and_sighup_reads_the_settings_again(by_nft: Kept) -> None:
    by_nft.start()
    assert by_nft.process is not None
    by_nft.configure("exclude_outbound_ports = ['5432']\n")
    by_nft.process.popen.send_signal(signal.SIGHUP)
    wait_for(lambda: "dport 5432" in by_nft.lab.rules_text())
    by_nft.config.write_text("[capture]\nexclude_outbound_ports = ['many']\n")
    by_nft.process.popen.send_signal(signal.SIGHUP)
    wait_for(lambda: "the settings stay as they were" in by_nft.log)
    looked = by_nft.now().looked_at
    wait_for(lambda: by_nft.now().looked_at > looked, what="the rules taken up again")  # else it puts them in anew
    by_nft.flush()
    by_nft.repaired()
    assert "dport 5432" in by_nft.lab.rules_text()
    rules = by_nft.lab.rules_text()
    assert by_nft.process.terminate() == 0
    assert by_nft.lab.rules_text() == rules
    assert by_nft.ask() is None


def test_rules_that_are_taken_out_on_purpose_stay_out_until_they_are_put_in(by_nft: Kept) -> None:
    by_nft.start()
    assert "rules removed (nft)" in by_nft.host.run("meshnet", "init", "remove").stdout
    assert by_nft.now().state == "stood down"
    assert "stand down" in by_nft.log
    by_nft.host.run("nft", "add", "table", "inet", "others")  # makes it look
    looked = by_nft.now().looked_at
    wait_for(lambda: by_nft.now().looked_at > looked)
    assert not by_nft.is_captured()
    by_nft.configure("exclude_outbound_ports = ['5432']\n")
    by_nft.host.run("meshnet", "init", "--config", by_nft.config)
    wait_for(lambda: by_nft.now().in_place)
    by_nft.flush()
    by_nft.repaired()
    assert "dport 5432" in by_nft.lab.rules_text()


def test_there_is_one_keeper_for_a_network_namespace(by_nft: Kept) -> None:
    pid = by_nft.start().pid
    with pytest.raises(ProgramFailed, match=f"another keeper .*\nwhy: process {pid} of user 0 .*\nfix: ") as failed:
        by_nft.host.run("meshnet", "rules", "keep", "--config", by_nft.config)
    assert failed.value.status == 1
    assert by_nft.now().pid == pid


def test_without_the_right_to_it_says_what_to_type(by_nft: Kept) -> None:
    command = ("setpriv", "--bounding-set=-net_admin", "--", "meshnet", "rules", "keep", "--config", by_nft.config)
    done = by_nft.host.run(*command, check=False)
    assert done.returncode == 5
    assert done.stderr.endswith(f"fix: sudo meshnet rules keep --config {by_nft.config}\n")


def test_a_program_without_rights_is_no_keeper_and_stands_nobody_down(by_nft: Kept, real_root: bool) -> None:
    if not real_root:  # then there is no other user here
        return
    nobody = ("setpriv", "--reuid=65534", "--clear-groups", "python3", "-c")
    squat = "import socket; s = socket.socket(1); s.bind(chr(0) + 'meshnet/keeper'); s.listen(); s.accept()[0].recv(9)"
    squatter = by_nft.host.spawn(*nobody, squat, name="squatter")
    wait_for(lambda: "meshnet/keeper" in by_nft.host.run("cat", "/proc/net/unix").stdout)
    assert by_nft.ask() is None
    squatter.kill()
    by_nft.start()
    words = "import socket; s = socket.socket(1); s.connect(chr(0) + 'meshnet/keeper'); "
    words += """s.send(b'{"type":"stand-down"}\\n'); print(s.recv(9))"""
    assert by_nft.host.run(*nobody, words).stdout == "b''\n"
    assert by_nft.now().state == "keeping"


def test_a_keeper_of_the_keepers_user_is_believed(
    by_nft: Kept, real_root: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which nobody is here: under systemd it is one that only `meshnet up` makes."""
    if not real_root:  # then there is no other user here
        return
    by_nft.start()
    report = by_nft.now()
    assert by_nft.process is not None
    by_nft.process.kill()
    words = "import socket, sys; s = socket.socket(1); s.bind(chr(0) + 'meshnet/keeper'); s.listen()\n"
    words += "while True:\n c, _ = s.accept()\n if c.recv(9): c.send(sys.argv[1].encode())\n c.close()\n"
    nobody = ("setpriv", "--reuid=65534", "--clear-groups", "python3", "-c")
    by_nft.host.spawn(*nobody, words, msgspec.json.encode(report).decode(), name="other")
    wait_for(lambda: "meshnet/keeper" in by_nft.host.run("cat", "/proc/net/unix").stdout)
    assert by_nft.ask() is None
    monkeypatch.setattr(meshnet.net.keeper, "KEEPER_USER", "nobody")
    assert by_nft.ask() == report


def test_systemd_hears_of_it(by_nft: Kept, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(str(tmp_path / "notify"))
        ear.settimeout(10)
        by_nft.start(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000")
        first = ear.recv(4096).decode()
        assert "READY=1\n" in first
        assert "WATCHDOG=1\n" in first
        assert "STATUS=keeping, " in first
        assert "READY=1" not in ear.recv(4096).decode()
