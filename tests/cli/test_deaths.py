"""What dies on a host in the mesh: sidecar, supervisor, or both; and what has changed by when it comes back."""

import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from meshnet_cli import lock
from meshnet_cli.vm.units import WATCHDOG
from tests.cli.machine import Machine, talk
from tests.proxy.programs import accept, listen
from tests.world import Host, stand_still, wait_for

pytestmark = pytest.mark.netns


def test_a_killed_sidecar_is_started_again_and_traffic_goes_on(machine: Machine, peer: Host) -> None:
    pid = machine.up().pid
    os.kill(pid, signal.SIGKILL)
    again = wait_for(lambda: (status := machine.ready()) and status.pid != pid and status, what="another sidecar")
    assert again.pid in machine.programs()
    with listen(peer, 8080) as server, machine.host.connect(peer.address, 8080) as client, accept(server) as app:
        assert talk(client, app)
    assert len(machine.connections()) == 1
    assert "the sidecar ended with -9" in machine.log.read_text()


def test_a_sidecar_that_hangs_is_killed_after_the_time_that_systemd_gives_it(machine: Machine, peer: Host) -> None:
    pid, rules = machine.up().pid, machine.rules()
    stand_still(pid)
    again = wait_for(
        lambda: (status := machine.ready()) and status.pid != pid and status,
        timeout=3.0 * WATCHDOG,
        what="another sidecar",
    )
    assert "supervise: the sidecar hangs" in machine.log.read_text()
    assert (machine.rules(), again.pid in machine.programs()) == (rules, True)
    with listen(peer, 8080) as server, machine.host.connect(peer.address, 8080) as client, accept(server) as app:
        assert talk(client, app)


def test_a_killed_supervisor_is_told_by_up_and_status_with_what_to_type(machine: Machine, peer: Host) -> None:
    pid = machine.up().pid
    assert "supervisor" not in machine.meshnet("status").stdout
    (supervisor,) = (program for program in machine.programs() if program != pid)
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: machine.programs() == [pid])
    with listen(peer, 8080) as server, machine.host.connect(peer.address, 8080) as client, accept(server) as app:
        assert talk(client, app)
    done = machine.meshnet("up")
    assert done.returncode == 0, done.stderr
    assert f"warning: nobody looks after the sidecar (pid {pid})" in done.stderr
    assert "sudo meshnet down && sudo meshnet up\n" in done.stderr
    assert re.search(r"^problem +its supervisor was killed: ", machine.meshnet("status").stdout, re.MULTILINE)
    down = machine.meshnet("down")
    assert down.returncode == 0, down.stderr
    assert "✓ proxy      stopped" in down.stdout
    again = machine.meshnet("up")
    assert (again.returncode, again.stderr) == (0, "")
    assert "supervisor" not in machine.meshnet("status").stdout
    assert len(machine.programs()) == 2


def test_the_rules_are_kept_and_whoever_keeps_them_too(machine: Machine) -> None:
    """istio#61182: rules vanish later."""
    before = machine.rules()
    machine.up()
    (keeper,) = wait_for(machine.keepers, what="a keeper")
    wait_for(lambda: "keeper: keeping" in machine.meshnet("status").stdout, what="that status tells of it")
    machine.host.run("nft", "delete", "table", "inet", "meshnet")
    wait_for(lambda: "table inet meshnet" in machine.rules(), what="the rules again")
    os.kill(keeper, signal.SIGKILL)
    log = machine.log
    wait_for(lambda: "the keeper of the rules ended with -9" in log.read_text(), what="that its end is told")
    wait_for(lambda: (now := machine.keepers()) and keeper not in now, what="another keeper")
    assert machine.meshnet("down").returncode == 0
    assert machine.keepers() == []
    assert machine.rules() == before


def test_a_keeper_that_hangs_is_killed_after_the_time_that_systemd_gives_it(machine: Machine) -> None:
    """istio#61182: rules vanish later."""
    machine.up()
    (keeper,) = wait_for(machine.keepers, what="a keeper")
    stand_still(keeper)
    machine.host.run("nft", "delete", "table", "inet", "meshnet")
    wait_for(lambda: "table inet meshnet" in machine.rules(), timeout=3.0 * WATCHDOG, what="the rules again")
    assert "supervise: the keeper of the rules hangs: it is killed\n" in machine.log.read_text()
    wait_for(machine.is_kept, what="another keeper")
    assert keeper not in machine.keepers()


def test_a_keeper_that_hangs_does_not_keep_its_supervisor_from_ending(machine: Machine) -> None:
    machine.up()
    (keeper,) = wait_for(machine.keepers, what="a keeper")
    (supervisor,) = (program for program in machine.programs() if program != machine.status().pid)
    stand_still(keeper)
    os.kill(supervisor, signal.SIGTERM)
    wait_for(lambda: not (machine.programs() or machine.keepers()), timeout=20.0, what="the end of every process")


def test_a_keeper_does_not_outlive_its_supervisor(machine: Machine) -> None:
    pid = machine.up().pid
    wait_for(machine.keepers, what="a keeper")
    (supervisor,) = (program for program in machine.programs() if program != pid)
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: not machine.keepers(), what="its end")


def test_a_supervisor_that_ended_in_order_is_no_killed_one(machine: Machine) -> None:
    machine.up()
    (supervisor,) = (program for program in machine.programs() if program != machine.status().pid)
    os.kill(supervisor, signal.SIGTERM)
    wait_for(lambda: not machine.programs(), what="the end of every process")
    machine.start("proxy", "--config", str(machine.config))
    wait_for(machine.ready, what="a sidecar that something else looks after")
    assert machine.meshnet("up").stderr == ""
    assert "supervisor" not in machine.meshnet("status").stdout


def test_down_after_everything_was_killed_leaves_nothing(machine: Machine) -> None:
    rules = machine.rules()
    machine.up()
    machine.close()
    assert machine.run_files() == {"admin.sock", "supervise.lock", "sidecar.log"}
    done = machine.meshnet("down")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"✓ (\w+) +(.+)", done.stdout) == [("rules", "removed"), ("proxy", "there was none")]
    assert machine.run_files() == {"sidecar.log"}
    assert machine.rules() == rules


def test_rules_without_a_sidecar_are_right_but_refuse(machine: Machine) -> None:
    machine.up()
    machine.close()
    wait_for(lambda: not machine.host.listens(15101))  # its threads may outlive it for a moment
    done = machine.meshnet("rules", "verify")
    assert done.returncode == 0, done.stdout
    assert "! new connections that the rules capture are refused until a sidecar runs\n" in done.stdout
    assert done.stdout.endswith("fix: sudo meshnet up\n")
    machine.up()
    assert "refused" not in machine.meshnet("rules", "verify").stdout


def test_up_does_not_wait_for_a_sidecar_that_does_not_stay_up(machine: Machine) -> None:
    rules = machine.rules()
    up = machine.start("up", MESHNET_ADMIN__HEALTH_ADDRESS="192.0.2.9")  # which is not an address of this host
    assert up.popen.wait(15) == 7
    log = machine.log
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
        log = machine.log.read_text()
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


def test_up_has_a_sidecar_that_is_looked_after_tried_again(machine: Machine) -> None:
    machine.up()
    log = machine.log
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


def test_down_ends_a_sidecar_that_does_not_stay_up(machine: Machine) -> None:
    rules = machine.rules()
    machine.up()
    with port_taken_from_the_sidecar(machine):
        log = machine.log
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
    log = machine.log
    wait_for(lambda: "the sidecar ended with 78" in log.read_text(), what="a restart in vain")
    assert machine.rules() == rules
    yield
    machine.configure()


def test_a_supervisor_whose_starter_was_killed_before_it_wrote_the_number_down_can_be_ended(machine: Machine) -> None:
    folder = machine.log.parent
    folder.mkdir(parents=True)
    (folder / lock.NAME).touch()
    with listen(machine.host, 15106):  # it is between two lives most of the time
        program = (sys.executable, "-m", "meshnet_cli.supervise", str(machine.config))
        supervisor = machine.host.spawn("flock", "--no-fork", str(folder / lock.NAME), *program, **machine.environment)
        wait_for(lambda: lock.is_held(folder), what="its lock")
        done = machine.meshnet("down")
        assert done.returncode == 0, done.stderr
        assert "✓ proxy      stopped\n" in done.stdout
        wait_for(lambda: not supervisor.alive, what="its end")
