"""Whatever becomes of `meshnet up`, the host is in the mesh afterwards, or as it was before."""

import json
import re
import signal

import pytest

from meshnet_cli.vm import unfinished
from tests.cli.machine import Machine, talk
from tests.proxy.programs import accept, listen
from tests.world import Host, wait_for

pytestmark = pytest.mark.netns

PHASES = ("discover", "account", "identity", "proxy", "rules", "verify")


class Before:
    """`machine` as it is now, but for the log, which says why a sidecar ended."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._was = self._look()

    def is_back(self) -> bool:
        return not self._machine.programs() and self._look() == self._was

    def _look(self) -> object:
        files = {file: data for file, data in self._machine.files().items() if file.name != "sidecar.log"}
        return self._machine.rules(), files


@pytest.mark.parametrize("phase", PHASES[1:])
def test_up_is_killed_when_a_phase_begins_and_open_connections_live(machine: Machine, peer: Host, phase: str) -> None:
    before = Before(machine)
    with listen(peer, 8080) as server, machine.host.connect(peer.address, 8080) as client, accept(server) as app:
        up = machine.start("up")
        previous = PHASES[PHASES.index(phase) - 1]
        wait_for(lambda: re.search(rf"^. {previous} ", up.output, re.MULTILINE), what=f"the phase before {phase}")
        up.popen.kill()
        wait_for(before.is_back, timeout=20, what="everything is as before")
        assert talk(client, app)


def test_up_that_hangs_once_the_rules_are_in_is_put_back_in_time(machine: Machine) -> None:
    before = Before(machine)
    up = machine.start("up", "--rollback-after", "2s")
    wait_for(lambda: "redirect to :15101" in machine.rules(), timeout=30.0, what="the rules")
    up.popen.send_signal(signal.SIGSTOP)
    try:
        wait_for(lambda: "redirect to :15101" not in machine.rules(), timeout=20, what="no rules")
        wait_for(lambda: [up.pid] == machine.programs(), timeout=20, what="the end of the sidecar")
    finally:
        up.popen.send_signal(signal.SIGCONT)
    assert up.popen.wait(20) == 7, up.output
    wait_for(before.is_back, what="everything is as before")


def test_what_was_up_before_stays_when_a_second_up_is_killed(machine: Machine) -> None:
    pid = machine.up().pid
    rules, files = machine.rules(), machine.files()
    up = machine.start("up")
    wait_for(lambda: "discover" in up.output)
    up.popen.kill()
    wait_for(lambda: len(machine.programs()) == 2, what="the end of the switch")
    assert (machine.rules(), machine.status().pid) == (rules, pid)
    assert machine.files().keys() == files.keys()


def test_the_switch_is_killed_too_and_the_next_up_puts_back(machine: Machine) -> None:
    machine.cut_off_up()
    note = machine.home / unfinished.NAME
    assert json.loads(note.read_bytes())["captures"]
    rules = machine.rules()
    done = machine.meshnet("up")
    assert done.returncode == 0, done.stderr
    assert "what it had done is put back first" in done.stderr
    assert machine.rules() != rules, "they are new ones"
    assert not note.exists()
