"""`meshnet up` and `meshnet down` on a host that knows nothing of meshnet yet."""

import re
import signal
import socket
import stat
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from meshnet.control.authority import Authority, save_issued
from meshnet.model.admin import GROUP
from meshnet.model.connection import Direction
from meshnet.model.settings import AdminSection, CaptureSection, Settings
from meshnet_cli import preflight, supervise
from meshnet_init.host import host_facts
from tests.cli.machine import Machine, talk
from tests.proxy.programs import accept, ended_by_rst, listen
from tests.world import Host, wait_for

pytestmark = pytest.mark.netns

# Canaries die here before any redirect sees them.
STRANGER = (
    "table inet stranger { chain c { type filter hook output priority -300;"
    " ip daddr 192.0.2.2 reject with tcp reset; ip6 daddr 2001:db8::2 reject with tcp reset; }; }"
)

# A service for which a sidecar needs a certificate.
MESHED = """
apiVersion: meshnet.dev/v1
kind: Service
metadata: {name: api}
spec:
  addresses: [10.96.0.10]
  ports: [{port: 8080}]
  endpoints: [{address: 10.77.0.9, tunnel: meshnet, identity: spiffe://local/ns/default/sa/api}]
"""

GID = CaptureSection().gid

# One canary never gets an answer, so that the proof takes a while before it fails.
SILENCE = "table inet stranger { chain c { type filter hook output priority -300; ip daddr 192.0.2.2 drop; }; }"

# Runs a command where /etc/group is another file.
OTHER_GROUPS = ("unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/group && exec "$@"')


class Nothing:
    """`machine` as it is now; `changed` says what is different later."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._was = self._look()

    def changed(self) -> bool:
        return self._look() != self._was

    def _look(self) -> object:
        return self._machine.rules(), self._machine.programs(), self._machine.files()


def test_up_makes_what_is_missing_and_a_second_up_changes_nothing(machine: Machine, peer: Host) -> None:
    done = machine.meshnet("up")
    assert done.returncode == 0, done.stderr
    phases = re.findall(r"^✓ (\w+) +[\d.]+s  (.+)$", done.stdout, re.MULTILINE)
    assert [name for name, _ in phases] == ["preflight", "discover", "identity", "proxy", "rules", "verify"]
    assert dict(phases)["verify"] == (
        "outbound ipv4: captured, outbound ipv6: captured, inbound ipv4: captured, inbound ipv6: captured"
    )
    assert "by a new authority in" in dict(phases)["identity"]
    # This machine's own /etc is not ours: tests/cli/vm/test_without_systemd.py has one that is.
    assert re.search(r"^- account .* none is made: .*; the sidecar is root with", done.stdout, re.MULTILINE)

    status = machine.status()
    assert status.ready
    assert re.fullmatch(r"spiffe://local/ns/default/sa/[\w-]+", status.certificate.identity)
    assert (machine.identity / "key.pem").stat().st_mode & 0o777 == 0o600
    assert machine.mesh.is_dir()
    assert machine.meshnet("rules", "verify").returncode == 0
    with listen(peer, 8080) as server, machine.host.connect(peer.address, 8080) as client, accept(server) as app:
        assert talk(client, app)
        assert [item.original_destination for item in machine.connections()] == [f"{peer.address}:8080"]

    rules, certificate = machine.rules(), (machine.identity / "cert.pem").read_bytes()
    again = machine.meshnet("up")
    assert again.returncode == 0
    assert "nothing changed" in again.stdout
    assert machine.status().pid == status.pid
    assert (machine.rules(), (machine.identity / "cert.pem").read_bytes()) == (rules, certificate)


def test_down_leaves_nothing_and_a_second_down_has_nothing_to_do(machine: Machine) -> None:
    rules = machine.rules()
    machine.up()
    assert machine.rules() != rules
    assert len(machine.programs()) == 2  # the sidecar, and who looks after it
    done = machine.meshnet("down")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"✓ (\w+) +(.+)", done.stdout) == [("rules", "removed"), ("proxy", "stopped")]
    assert machine.rules() == rules
    wait_for(lambda: not machine.programs(), what="the end of every process")
    assert machine.run_files() == {"sidecar.log"}
    assert machine.meshnet("status").returncode == 4
    again = machine.meshnet("down")
    assert again.returncode == 0
    assert re.findall(r"✓ (\w+) +(.+)", again.stdout) == [("rules", "there were none"), ("proxy", "there was none")]


def test_a_host_that_nothing_can_leave_is_told_that_nothing_was_proved(machine: Machine) -> None:
    machine.host.run("ip", "-4", "route", "flush", "default")
    machine.host.run("ip", "-6", "route", "flush", "default")
    unproved = "nothing outbound proved: no route out of this host (add a route, then: meshnet rules verify)"
    done = machine.meshnet("up")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^! verify .*s  {re.escape(unproved)}$", done.stdout, re.MULTILINE)
    assert "✓ verify" not in done.stdout
    assert f"! {unproved}\n" in machine.meshnet("init", "--config", str(machine.config), "--verify").stdout
    assert f"! {unproved}\n" in machine.meshnet("rules", "verify").stdout


def test_a_dry_run_shows_the_rules_and_changes_nothing(machine: Machine) -> None:
    before = Nothing(machine)
    done = machine.meshnet("up", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "redirect to :15101" in done.stdout
    assert not before.changed()
    machine.configure("[capture]\nbackend = 'iptables'\n")
    assert "# iptables-restore --noflush\n" in machine.meshnet("up", "--dry-run").stdout
    machine.configure("[capture]\nbackend = 'auto'\n")
    machine.host.run(
        "iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-p", "udp", "-j", "ACCEPT"
    )  # it takes legacy then
    assert "# iptables-restore --noflush\n" in machine.meshnet("up", "--dry-run").stdout


def test_open_connections_live_through_up_and_down_which_waits_for_those_it_captured(
    machine: Machine, peer: Host
) -> None:
    with ExitStack() as stack:
        servers = {host: stack.enter_context(listen(host, 8080)) for host in (peer, machine.host)}

        def both_ways() -> list[tuple[socket.socket, socket.socket]]:
            found = []
            for caller, called in ((machine.host, peer), (peer, machine.host)):
                client = stack.enter_context(caller.connect(called.address, 8080))
                found.append((client, stack.enter_context(accept(servers[called]))))
            return found

        direct = both_ways()
        machine.up()
        assert all(talk(client, app) for client, app in direct)
        captured = both_ways()
        assert all(talk(client, app) for client, app in captured)
        assert {item.direction for item in machine.connections()} == {Direction.OUTBOUND, Direction.INBOUND}

        down = machine.start("down")
        wait_for(lambda: "waiting for 2 open connections" in down.output)
        assert all(talk(client, app) for client, app in (*direct, *captured))
        late = both_ways()
        assert all(talk(client, app) for client, app in late)
        assert len(machine.connections()) == 2  # what is new goes direct by now
        assert down.alive
        for client, app in captured:
            client.close()
            app.close()
        assert down.popen.wait(10) == 0
        wait_for(lambda: not machine.programs(), what="the end of every process")
        assert "table" not in machine.rules().replace("table inet own", "")
        assert all(talk(client, app) for client, app in (*direct, *late))


def test_what_outlives_the_drain_is_cut_at_both_ends_and_counted(machine: Machine, peer: Host) -> None:
    rules = machine.rules()
    machine.up()
    with ExitStack() as stack:
        ends = []
        for caller, called in ((machine.host, peer), (peer, machine.host)):
            server = stack.enter_context(listen(called, 8080))
            client = stack.enter_context(caller.connect(called.address, 8080))
            app = stack.enter_context(accept(server))
            assert talk(client, app)
            ends += [client, app]
        done = machine.meshnet("down", "--drain", "300ms")
        assert done.returncode == 0, done.stderr
        assert "2 connections were still open after 0.3 s and are cut" in done.stderr
        assert re.findall(r"✓ (\w+) +(.+)", done.stdout) == [("rules", "removed"), ("proxy", "stopped")]
        for end in ends:  # an idle client is told, too, by who it thinks it speaks with
            assert ended_by_rst(end)
    assert machine.rules() == rules
    wait_for(lambda: not machine.programs(), what="the end of every process")


def test_when_the_proof_fails_everything_is_put_back(machine: Machine) -> None:
    machine.host.run("nft", "-f", "-", stdin=STRANGER)
    rules = machine.rules()
    done = machine.meshnet("up")
    assert done.returncode == 7
    assert "✗ verify" in done.stderr
    assert "put back" in done.stderr
    assert re.search(r"^error: the rules do not do what they should\nwhy: .*ipv4: not captured", done.stderr, re.M)
    assert machine.rules() == rules
    wait_for(lambda: not machine.programs(), what="the end of every process")
    assert not machine.admin.exists()


def test_what_was_captured_before_a_failed_proof_is_cut_at_both_ends(machine: Machine, peer: Host) -> None:
    machine.host.run("nft", "-f", "-", stdin=SILENCE)
    rules = machine.rules()
    with listen(peer, 8080) as server:
        up = machine.start("up")
        wait_for(lambda: "redirect to :15101" in machine.rules(), what="the rules")
        with machine.host.connect(peer.address, 8080) as client, accept(server) as app:
            assert talk(client, app)
            assert up.popen.wait(20) == 7
            assert ended_by_rst(app)
            assert ended_by_rst(client)
    assert machine.rules() == rules
    wait_for(lambda: not machine.programs(), what="the end of every process")


def test_an_interrupted_up_leaves_no_sidecar(machine: Machine) -> None:
    rules = machine.rules()
    now = datetime.now(UTC)
    save_issued(Authority.create("local", now=now).issue("spiffe://local/ns/default/sa/web", now=now), machine.identity)
    (machine.identity / "key.pem").chmod(0)  # who has the right to all files may read it, the sidecar has not
    machine.mesh.mkdir()
    (machine.mesh / "api.yaml").write_text(MESHED)
    up = machine.start("up")
    settings = Settings(admin=AdminSection(socket=str(machine.admin)))

    def lacks_a_certificate() -> bool:
        status = supervise.running(settings)
        return status is not None and any("no certificate" in because for because in status.not_ready_because)

    wait_for(lacks_a_certificate, what="a sidecar that is up but not ready")
    assert up.alive
    up.popen.send_signal(signal.SIGINT)
    assert up.popen.wait(10) == 130
    wait_for(lambda: not machine.programs(), what="the end of every process")
    assert machine.rules() == rules


def test_a_failing_proof_takes_nothing_away_that_was_up_before(machine: Machine) -> None:
    pid = machine.up().pid
    machine.host.run("nft", "-f", "-", stdin=STRANGER)
    rules = machine.rules()
    done = machine.meshnet("up")
    assert done.returncode == 1
    assert "put back" not in done.stderr
    assert (machine.rules(), machine.status().pid) == (rules, pid)


def test_a_taken_port_is_named_and_nothing_is_changed(machine: Machine) -> None:
    with listen(machine.host, 15106):
        before = Nothing(machine)
        done = machine.meshnet("up")
        assert done.returncode == 1
        assert done.stderr.endswith(
            "error: port 15106 is taken\n"
            "why: the sidecar needs it (Address already in use)\n"
            "fix: see who has it: ss -ltnp 'sport = :15106'\n"
        )
        assert not before.changed()


def test_without_the_right_to_change_rules_it_says_what_to_type(machine: Machine) -> None:
    before = Nothing(machine)
    done = machine.meshnet("up", by=("setpriv", "--bounding-set=-net_admin", "--"))
    assert done.returncode == 5
    assert f"fix: sudo meshnet up --config {machine.config}\n" in done.stderr
    looking = machine.meshnet("up", "--dry-run", by=("setpriv", "--bounding-set=-net_admin", "--"))
    assert f"fix: sudo meshnet up --dry-run --config {machine.config}\n" in looking.stderr
    assert not before.changed()


def test_without_the_right_to_change_rules_down_takes_nothing_away(machine: Machine) -> None:
    pid = machine.up().pid
    rules = machine.rules()
    done = machine.meshnet("down", by=("setpriv", "--bounding-set=-net_admin", "--"))
    assert done.returncode == 5
    assert f"fix: sudo meshnet down --config {machine.config}\n" in done.stderr
    assert (machine.rules(), machine.status().pid) == (rules, pid)


def test_a_mistake_in_the_settings_is_shown_with_its_line(machine: Machine) -> None:
    machine.configure("[capture]\nbackends = 'nft'\n")
    before = Nothing(machine)
    done = machine.meshnet("up")
    assert done.returncode == 78
    assert f"{machine.config}:11" in done.stderr
    assert "backend" in done.stderr
    assert not before.changed()


def test_a_program_in_the_sidecars_group_is_refused_by_name(machine: Machine) -> None:
    if is_mapped(GID):
        by: tuple[str, ...] = ()
        sleeper = machine.host.spawn("setpriv", f"--regid={GID}", "--clear-groups", "--", "sleep", "1000")
        wait_for(lambda: Path(f"/proc/{sleeper.pid}/comm").read_text() == "sleep\n")
        program = rf"{sleeper.pid} \(sleep\)"
    else:  # we have one group: in namespaces further in it gets that number, and the program is `meshnet up` itself
        by = ("unshare", "--user", "--net", "--map-user=0", f"--map-group={GID}", "--")
        program = r"\d+ \(python.*\)"
    before = Nothing(machine)
    done = machine.meshnet("up", by=by)
    assert done.returncode == 1
    assert re.search(rf"^error: process {program} runs with the group {GID}$", done.stderr, re.MULTILINE)
    assert "fix: choose another group" in done.stderr
    assert not before.changed()


def test_another_hosts_sidecar_is_not_in_the_way(new_machine: Callable[[str], Machine]) -> None:
    one, other = new_machine("one"), new_machine("other")  # it has the same group, and rules of its own
    assert one.up().pid != other.up().pid


def test_an_identity_that_is_there_is_used_as_it_is(machine: Machine) -> None:
    issued = Authority.create("example", now=datetime.now(UTC)).issue(
        "spiffe://example/ns/shop/sa/till", now=datetime.now(UTC)
    )
    save_issued(issued, machine.identity)
    files = machine.files()
    assert machine.up().certificate.identity == "spiffe://example/ns/shop/sa/till"
    assert {file: machine.files()[file] for file in files} == files
    assert not (machine.home / "ca").exists()


@pytest.mark.parametrize(
    ("issued", "what", "mend"),
    [
        (timedelta(days=-30), "the certificate of this host has expired\n", ""),
        (timedelta(days=30), "the certificate of this host is not valid yet\n", "set the clock: timedatectl; or "),
    ],
    ids=["expired", "not yet valid"],
)
def test_a_certificate_of_another_time_is_refused_at_once(
    machine: Machine, issued: timedelta, what: str, mend: str
) -> None:
    then = datetime.now(UTC) + issued
    name = "spiffe://local/ns/default/sa/web"
    save_issued(Authority.create("local", now=then).issue(name, now=then), machine.identity)
    before = Nothing(machine)
    done = machine.meshnet("up")
    assert done.returncode == 1
    assert "✗ identity" in done.stderr
    assert f"error: {what}" in done.stderr
    assert re.search(r"^why: it (ended|begins) at \d{4}-", done.stderr, re.MULTILINE)
    assert (
        f"fix: {mend}where the authority is: meshnet ca issue --identity {name} --out DIR;"
        f" copy DIR/* to {machine.identity}/\n"
    ) in done.stderr
    assert not before.changed()


def test_an_identity_that_cannot_be_read_is_refused_at_once_with_a_line_that_mends_it(machine: Machine) -> None:
    machine.up()
    assert machine.meshnet("down").returncode == 0
    (machine.identity / "key.pem").write_text("no key")
    done = machine.meshnet("up")
    assert done.returncode == 1
    assert f"error: the identity in {machine.identity} is of no use\n" in done.stderr
    fix = re.search(r"^fix: sudo meshnet (.+)$", done.stderr, re.MULTILINE)
    assert fix is not None
    issue = fix[1].replace("SPIFFE_ID", "spiffe://local/ns/default/sa/web").split()
    assert machine.meshnet(*issue).returncode == 0
    machine.up()


def test_what_the_sidecar_logs_is_not_for_everybody(machine: Machine) -> None:
    log = machine.log
    log.parent.mkdir(parents=True)
    log.touch(0o644)
    pid = machine.up().pid
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert umask("self") == umask(pid)  # what else it writes is as its administrator wants it


def test_the_group_meshnet_gets_the_admin_socket_and_nobody_else(machine: Machine) -> None:
    if not is_mapped(GID):
        return  # there is no group but ours
    groups = machine.home / "group"
    groups.write_text("root:x:0:\n")
    assert machine.meshnet("up", by=(*OTHER_GROUPS, str(groups))).returncode == 0
    assert stat.S_IMODE(machine.admin.stat().st_mode) == 0o600
    assert machine.meshnet("down").returncode == 0
    groups.write_text(f"root:x:0:\n{GROUP}:x:4321:\n")
    done = machine.meshnet("up", by=(*OTHER_GROUPS, str(groups)))
    assert done.returncode == 0, done.stderr
    found = machine.admin.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o660, 0, 4321)
    log = machine.log.read_text()
    assert "cannot be given" not in log


def test_the_sidecar_has_its_group_and_one_right(machine: Machine) -> None:
    pid = machine.up().pid
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    net_admin = f"{1 << 12:016x}"
    assert (status["CapPrm"], status["CapEff"], status["CapBnd"]) == (net_admin, net_admin, net_admin)
    assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    if is_mapped(GID):
        assert status["Gid"].split() == [str(GID)] * 4
        assert status["Groups"].split() == []


@pytest.mark.parametrize(
    ("family", "address", "why_not"),
    [
        (socket.AF_INET, "127.0.0.1", "loopback only"),
        (socket.AF_INET, "127.0.0.53", "loopback only"),
        (socket.AF_INET6, "::1", "loopback only"),
        (socket.AF_INET6, "::ffff:127.0.0.54", "loopback only"),
        (socket.AF_INET, "0.0.0.0", ""),
        (socket.AF_INET6, "::", ""),
    ],
)
def test_who_listens_on_loopback_only_is_not_captured(peer: Host, family: int, address: str, why_not: str) -> None:
    with peer.open_socket(family) as server:
        server.bind((address, 53))
        server.listen()
        with peer.entered():
            assert preflight.listeners(Settings()) == [preflight.Listener(53, why_not)]


def test_down_takes_the_rules_out_even_if_nothing_says_where_the_sidecar_is(machine: Machine) -> None:
    rules = machine.rules()
    machine.up()
    machine.config.write_text("[admin\n")
    by = ("env", f"MESHNET_ADMIN__SOCKET={machine.home}/nowhere/admin.sock")
    done = machine.meshnet("down", by=by)
    assert done.returncode == 78
    assert machine.rules() == rules
    assert "fix: mend them, then again: sudo meshnet down\n" in done.stderr


def test_up_with_other_settings_than_the_sidecars_says_which(machine: Machine) -> None:
    machine.up()
    before = machine.rules()
    machine.configure("[proxy]\nmark = 0x2000\ninbound_port = 16106\n")
    done = machine.meshnet("up")
    assert done.returncode == 1
    assert "port 16106" in done.stderr
    assert "mark 0x2000" in done.stderr
    assert "fix: start it again with these settings: sudo meshnet down && sudo meshnet up\n" in done.stderr
    assert machine.rules() == before


def test_a_folder_that_cannot_be_written_is_told(machine: Machine) -> None:
    (machine.home / "run").write_text("a file where the folder of the admin socket should be")
    done = machine.meshnet("up")
    assert done.returncode == 7
    assert f"error: cannot write to {machine.home}/run" in done.stderr
    assert not machine.identity.exists(), "what was made before is put back"
    assert "fix: name another folder: admin.socket" in done.stderr


def umask(pid: int | str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith("Umask:"))


def is_mapped(gid: int) -> bool:
    return any(gid in gids for gids in host_facts().gids)
