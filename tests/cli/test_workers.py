"""A sidecar of several processes on a host in the mesh: every command treats it as one."""

import os
import signal

import pytest

from tests.cli.machine import Machine, talk
from tests.proxy.programs import accept, listen
from tests.world import Host, wait_for

pytestmark = pytest.mark.netns


@pytest.fixture
def machine(machine: Machine) -> Machine:
    machine.configure("[proxy]\nworkers = 2\n")
    return machine


def test_up_verify_and_down_find_one_sidecar(machine: Machine, peer: Host) -> None:
    status = machine.up()
    assert (status.ready, len(status.workers)) == (True, 2)
    assert {status.pid, *(worker.pid for worker in status.workers)} < set(machine.programs())
    verified = machine.meshnet("rules", "verify")
    assert verified.returncode == 0, verified.stdout
    assert machine.meshnet("up").returncode == 0
    assert machine.status().pid == status.pid
    with listen(peer, 8080) as server, machine.host.connect(peer.address, 8080) as client, accept(server) as app:
        assert talk(client, app)
    assert len(machine.connections()) == 1
    down = machine.meshnet("down")
    assert down.returncode == 0, down.stderr
    assert machine.programs() == []


def test_one_worker_is_one_process(machine: Machine) -> None:
    machine.configure("[proxy]\nworkers = 1\n")
    status = machine.up()
    assert status.workers == ()
    supervisor, sidecar = sorted(machine.programs())
    assert status.pid in (supervisor, sidecar)


def test_a_killed_parent_is_started_again_while_its_workers_still_drain(machine: Machine, peer: Host) -> None:
    before = machine.up()
    with listen(peer, 8080) as server, machine.host.connect(peer.address, 8080) as client, accept(server) as app:
        os.kill(before.pid, signal.SIGKILL)
        wait_for(lambda: (status := machine.ready()) and status.pid != before.pid, what="another sidecar")
        assert talk(client, app)
        with machine.host.connect(peer.address, 8080) as later, accept(server) as other:
            assert talk(later, other)
            assert talk(client, app)
    old = {worker.pid for worker in before.workers}
    wait_for(lambda: not old & set(machine.programs()), what="the end of the old workers")
    log = machine.log.read_text()
    assert "the sidecar ended with -9" in log
    assert "worker 1: the parent is gone" in log


def test_a_wrong_number_of_workers_is_told_with_its_line(machine: Machine) -> None:
    machine.configure("[proxy]\nworkers = 0\n")
    line = machine.config.read_text().splitlines().index("workers = 0") + 1
    done = machine.meshnet("proxy", "--config", str(machine.config))
    assert done.returncode == 78
    assert done.stderr == (
        "error: proxy.workers: 0 is not between 1 and 64\n"
        f"why: it is in {machine.config}:{line}\n"
        "fix: write workers = 1, the default\n"
    )
