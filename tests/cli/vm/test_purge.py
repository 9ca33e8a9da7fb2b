"""`meshnet down --purge` takes away what meshnet made, and nothing else."""

import re
import signal
from datetime import UTC, datetime

import pytest

from meshnet.control.authority import Authority, save_issued
from tests.cli.machine import Machine, talk
from tests.proxy.programs import accept, listen
from tests.world import Host, wait_for

pytestmark = pytest.mark.netns


def test_nothing_is_left(machine: Machine) -> None:
    before = (machine.rules(), sorted(machine.home.rglob("*")), machine.files())
    machine.up()
    done = machine.meshnet("down", "--purge")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^✓ purge +\d+ things taken away$", done.stdout, re.MULTILINE)
    wait_for(lambda: not machine.programs(), what="the end of every process")
    assert (machine.rules(), sorted(machine.home.rglob("*")), machine.files()) == before
    again = machine.meshnet("down", "--purge")
    assert again.returncode == 0
    assert "✓ purge      there was nothing\n" in again.stdout


def test_what_others_made_stays_and_is_told(machine: Machine) -> None:
    now = datetime.now(UTC)
    save_issued(Authority.create("local", now=now).issue("spiffe://local/ns/default/sa/web", now=now), machine.identity)
    identity = machine.files()
    machine.up()
    assert machine.meshnet("down").returncode == 0
    (machine.mesh / "own.yaml").write_text("# mine\n")
    done = machine.meshnet("down", "--purge")
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"! it stays: directory {machine.mesh}: it has own.yaml\n"
    assert machine.files() == identity | {machine.mesh / "own.yaml": b"# mine\n"}


def test_down_that_is_killed_while_it_drains_is_typed_again(machine: Machine, peer: Host) -> None:
    before = (machine.rules(), machine.files())
    machine.up()
    with listen(peer, 8080) as server, machine.host.connect(peer.address, 8080) as client, accept(server) as app:
        down = machine.start("down", "--purge")
        wait_for(lambda: "waiting for 1 open connections" in down.output)
        down.popen.send_signal(signal.SIGKILL)
        down.popen.wait()
        assert talk(client, app)
        again = machine.start("down", "--purge")
        wait_for(lambda: "waiting for 1 open connections" in again.output)
        assert talk(client, app)
        client.close()
        app.close()
        assert again.popen.wait(20) == 0, again.output
    assert (machine.rules(), machine.files()) == before
