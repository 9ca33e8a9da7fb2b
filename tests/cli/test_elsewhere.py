"""Commands on the wrong host, and on a host that another version of meshnet has left in the middle of its work."""

import json
import re

import pytest

from meshnet_cli.vm.unfinished import NAME
from tests.cli.machine import Machine
from tests.world import Host

pytestmark = pytest.mark.netns

ELSEWHERE = "is in another network namespace than this command"


@pytest.mark.parametrize("command", [("up",), ("down",), ("down", "--purge"), ("set", "log.level=debug")])
def test_from_another_network_namespace_nothing_is_changed(
    machine: Machine, peer: Host, command: tuple[str, ...]
) -> None:
    """The admin socket is found there, the rules are not: `down` would end the sidecar, and leave its rules."""
    pid = machine.up().pid
    rules, files = machine.rules(), machine.files()
    settings = ("--config", str(machine.config)) if command[0] == "set" else ()
    done = machine.meshnet(*command, *settings, on=peer)
    assert done.returncode == 1
    assert f"the sidecar of these settings (pid {pid}) {ELSEWHERE}" in done.stderr
    assert f"sudo nsenter --net=/proc/{pid}/ns/net meshnet" in done.stderr
    assert (machine.rules(), machine.status().pid, machine.files().keys()) == (rules, pid, files.keys())
    assert "meshnet" not in peer.run("nft", "list", "ruleset").stdout


def test_from_another_network_namespace_the_rules_are_not_put_in(machine: Machine, peer: Host) -> None:
    machine.up()
    done = machine.meshnet("init", "--verify", "--config", str(machine.config), on=peer)
    assert ELSEWHERE in done.stderr
    assert "meshnet" not in peer.run("nft", "list", "ruleset").stdout


def test_who_is_told_to_go_there_can(machine: Machine, peer: Host) -> None:
    machine.up()
    said = machine.meshnet("down", on=peer).stderr
    found = re.search(r"sudo (nsenter --net=\S+) meshnet", said)
    assert found is not None
    done = machine.meshnet("down", by=tuple(found[1].split()), on=peer)
    assert done.returncode == 0, done.stderr
    assert not machine.programs()


def test_what_another_version_has_left_half_done_is_not_passed_over(machine: Machine) -> None:
    """`up` says so and changes nothing; `down` takes everything out, as it would anyway."""
    note = machine.home / NAME
    machine.cut_off_up()
    written = json.loads(note.read_text())
    written["settings"]["admin"]["recent"] = 1000  # which once was a setting
    note.write_text(json.dumps(written))
    before = machine.rules()
    done = machine.meshnet("up")
    assert done.returncode == 1
    assert f"what has to be put back cannot be read from {note}" in done.stderr
    assert "unknown field `recent`" in done.stderr
    assert "sudo meshnet down" in done.stderr
    assert (machine.rules(), note.exists()) == (before, True)
    done = machine.meshnet("down", "--purge")
    assert done.returncode == 0, done.stderr
    assert f"cannot be read from {note}" in done.stderr
    assert not note.exists()
    assert not machine.programs()
    assert "meshnet" not in machine.rules()
    assert machine.meshnet("up").returncode == 0
