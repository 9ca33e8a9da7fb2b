"""`meshnet up` and `meshnet down` on a host that knows nothing of meshnet yet."""

import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from meshnet.control.authority import Authority, save_issued
from meshnet.model.connection import Direction
from meshnet.model.settings import AdminSection, CaptureSection, Settings
from meshnet_cli import supervise
from meshnet_init.host import host_facts
from tests.cli.machine import Machine, talk
from tests.proxy.programs import accept, ended_by_rst, listen
from tests.world import Host, World, wait_for

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


@pytest.fixture
def new_machine(world: World) -> Iterator[Callable[[str], Machine]]:
    with ExitStack() as stack:

        def make(name: str) -> Machine:
            machine = Machine(world, name)
            stack.callback(machine.close)
            return machine

        yield make


@pytest.fixture
def machine(new_machine: Callable[[str], Machine]) -> Machine:
    return new_machine("web")


@pytest.fixture
def peer(world: World) -> Host:
    return world.host("peer")


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
    assert dict(phases)["verify"] == "ipv4: captured, ipv6: captured"
    assert "by a new authority in" in dict(phases)["identity"]

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
    assert not machine.admin.exists()
    assert machine.meshnet("status").returncode == 4
    again = machine.meshnet("down")
    assert again.returncode == 0
    assert re.findall(r"✓ (\w+) +(.+)", again.stdout) == [("rules", "there were none"), ("proxy", "there was none")]


def test_a_dry_run_shows_the_rules_and_changes_nothing(machine: Machine) -> None:
    before = Nothing(machine)
    done = machine.meshnet("up", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "redirect to :15101" in done.stdout
    assert not before.changed()


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


def test_what_outlives_the_drain_is_cut_and_counted(machine: Machine, peer: Host) -> None:
    machine.up()
    with listen(peer, 8080) as server, machine.host.connect(peer.address, 8080) as client, accept(server) as app:
        assert talk(client, app)
        done = machine.meshnet("down", "--drain", "300ms")
        assert done.returncode == 0, done.stderr
        assert "1 connections were still open after 0.3 s and are cut" in done.stderr
        assert ended_by_rst(app)
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


def test_an_interrupted_up_leaves_no_sidecar(machine: Machine) -> None:
    rules = machine.rules()
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    expired = Authority.create("local", now=long_ago).issue("spiffe://local/ns/default/sa/web", now=long_ago)
    save_issued(expired, machine.identity)
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
    assert "fix: sudo meshnet up\n" in done.stderr
    assert not before.changed()


def test_without_the_right_to_change_rules_down_takes_nothing_away(machine: Machine) -> None:
    pid = machine.up().pid
    rules = machine.rules()
    done = machine.meshnet("down", by=("setpriv", "--bounding-set=-net_admin", "--"))
    assert done.returncode == 5
    assert "sudo" in done.stderr
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


def test_a_killed_sidecar_is_started_again_and_traffic_goes_on(machine: Machine, peer: Host) -> None:
    pid = machine.up().pid
    os.kill(pid, signal.SIGKILL)
    again = wait_for(lambda: (status := machine.ready()) and status.pid != pid and status, what="another sidecar")
    assert again.pid in machine.programs()
    with listen(peer, 8080) as server, machine.host.connect(peer.address, 8080) as client, accept(server) as app:
        assert talk(client, app)
    assert len(machine.connections()) == 1
    assert "the sidecar ended with -9" in (machine.home / "run" / "sidecar.log").read_text()


def test_up_does_not_wait_for_a_sidecar_that_does_not_stay_up(machine: Machine) -> None:
    rules = machine.rules()
    up = machine.start("up", MESHNET_ADMIN__HEALTH_ADDRESS="192.0.2.9")  # which is not an address of this host
    assert up.popen.wait(15) == 7
    log = machine.home / "run" / "sidecar.log"
    assert log.read_text().count("the sidecar ended with 1; again") == 3
    assert "error: the sidecar does not stay up: it ended with exit code 1\n" in up.output
    assert "why: no address to listen on for health\n" in up.output
    assert f"fix: ip addr; or less {log}\n" in up.output
    wait_for(lambda: not machine.programs(), what="the end of every process")
    assert machine.rules() == rules


def test_a_sidecar_restarted_with_bad_settings_comes_back_when_they_are_mended(machine: Machine, peer: Host) -> None:
    with bad_settings_at_a_restart(machine), listen(peer, 8080):
        with pytest.raises(ConnectionRefusedError):  # closed, not around the mesh
            machine.host.connect(peer.address, 8080)
        log = (machine.home / "run" / "sidecar.log").read_text()
        assert f"it is in {machine.config}:11" in log
        assert f"sooner if {machine.config} changes" in log
        assert "sudo meshnet down" in log
        told = machine.meshnet("up")
        assert told.returncode == 78
        assert f"{machine.config}:11" in told.stderr
    wait_for(machine.ready, what="a sidecar with the mended settings")
    with listen(peer, 8080) as server, machine.host.connect(peer.address, 8080) as client, accept(server) as app:
        assert talk(client, app)


@pytest.mark.parametrize("mistake", ["[proxy]\noutbound_prt = 1\n", "[proxy\n"], ids=["unknown key", "no TOML"])
def test_down_works_with_bad_settings(machine: Machine, peer: Host, mistake: str) -> None:
    rules = machine.rules()
    with bad_settings_at_a_restart(machine, mistake):
        done = machine.meshnet("down")
        assert done.returncode == 0, done.stderr
        assert "the settings are wrong" in done.stderr
        assert re.findall(r"✓ (\w+) +(.+)", done.stdout) == [("rules", "removed"), ("proxy", "stopped")]
        assert machine.rules() == rules
        assert not machine.programs()
    with listen(peer, 8080) as server, machine.host.connect(peer.address, 8080) as client, accept(server) as app:
        assert talk(client, app)


def test_down_takes_the_rules_out_even_if_nothing_says_where_the_sidecar_is(machine: Machine) -> None:
    rules = machine.rules()
    machine.up()
    machine.config.write_text("[admin\n")
    by = ("env", f"MESHNET_ADMIN__SOCKET={machine.home}/nowhere/admin.sock")
    done = machine.meshnet("down", by=by)
    assert done.returncode == 78
    assert machine.rules() == rules
    assert "fix: mend them, then again: sudo meshnet down\n" in done.stderr


def test_up_has_a_sidecar_that_is_looked_after_tried_again(machine: Machine) -> None:
    machine.up()
    log = machine.home / "run" / "sidecar.log"
    with port_taken_from_the_sidecar(machine):
        wait_for(lambda: "again in 1.6 s" in log.read_text(), what="starts in vain")
        done = machine.meshnet("up")
        assert done.returncode == 1
        assert "cannot listen on port 15106" in done.stderr
        assert "put back" not in done.stderr
        wait_for(lambda: "again in 6.4 s" in log.read_text(), what="more starts in vain")
        (supervisor,) = machine.programs()
    again = machine.meshnet("up")
    assert again.returncode == 0, again.stderr
    assert supervisor in machine.programs()


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
    assert done.returncode == 1
    assert f"error: cannot write to {machine.home}/run" in done.stderr
    assert "fix: name another folder: admin.socket" in done.stderr


def test_down_ends_a_sidecar_that_does_not_stay_up(machine: Machine) -> None:
    rules = machine.rules()
    machine.up()
    with port_taken_from_the_sidecar(machine):
        log = machine.home / "run" / "sidecar.log"
        wait_for(lambda: "cannot listen on port 15106" in log.read_text(), what="a start in vain")
        done = machine.meshnet("down")
        assert done.returncode == 0, done.stderr
        assert re.findall(r"✓ (\w+) +(.+)", done.stdout) == [("rules", "removed"), ("proxy", "stopped")]
        wait_for(lambda: not machine.programs(), what="the end of every process")
    assert machine.rules() == rules


def test_without_a_sidecar_rules_refuse_and_up_mends_it(machine: Machine, peer: Host) -> None:
    machine.up()
    rules = machine.rules()
    machine.close()
    wait_for(lambda: not machine.host.listens(15101))  # its threads may outlive it for a moment
    with listen(peer, 8080) as server:
        with pytest.raises(ConnectionRefusedError):
            machine.host.connect(peer.address, 8080)
        machine.up()
        assert machine.rules() == rules
        with machine.host.connect(peer.address, 8080) as client, accept(server) as app:
            assert talk(client, app)


def port_taken_from_the_sidecar(machine: Machine) -> socket.socket:
    """The port is taken in the moment in which the sidecar has died and is not back yet."""

    def take() -> socket.socket:
        if status := machine.ready():
            os.kill(status.pid, signal.SIGKILL)
        sock = machine.host.open_socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("0.0.0.0", 15106))
            sock.listen()
        except OSError:
            sock.close()
            raise
        return sock

    return wait_for(take)


@contextmanager
def bad_settings_at_a_restart(machine: Machine, mistake: str = "[proxy]\noutbound_prt = 1\n") -> Iterator[None]:
    """The sidecar that was up dies and finds settings that somebody has broken; in the end they are mended."""
    pid = machine.up().pid
    rules = machine.rules()
    machine.configure(mistake)
    os.kill(pid, signal.SIGKILL)
    log = machine.home / "run" / "sidecar.log"
    wait_for(lambda: "the sidecar ended with 78" in log.read_text(), what="a restart in vain")
    assert machine.rules() == rules
    yield
    machine.configure()


def is_mapped(gid: int) -> bool:
    return any(gid in gids for gids in host_facts().gids)
