"""Whatever becomes of `meshnet set`, file and rules are the new ones and proved, or as they were before."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import CompletedProcess

import pytest

from meshnet_cli.vm.deadman import EXIT_ROLLED_BACK
from meshnet_cli.vm.unfinished import note_of_set
from tests.cli.machine import MESHNET, Machine, talk
from tests.proxy.programs import accept, listen
from tests.world import Host, Process, wait_for

pytestmark = pytest.mark.netns

CHANGE = "capture.exclude_inbound_ports=22,8000-8100"
NEW = "dport 8000-8100"
# What the canary sends is lost before our rules see it, so that the proof takes all of its time and fails.
SILENCE = "table inet silence { chain c { type filter hook output priority raw; tcp dport 15122 drop; }; }"


class Before:
    """`machine` as it is now: a sidecar is up, and a keeper keeps its rules."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        wait_for(machine.keepers, what="a keeper")
        wait_for(machine.is_kept, what="that it keeps the rules")
        self._was = self._look()

    def is_back(self) -> bool:
        return self._look() == self._was

    def rules_are_kept(self) -> bool:
        """Whoever takes them out, those of before are there again."""
        wait_for(self._machine.is_kept, what="that they are kept")
        self._machine.host.run("nft", "delete", "table", "inet", "meshnet")
        wait_for(lambda: rules(self._machine), what="a repair")
        return self.is_back()

    def _look(self) -> object:
        config = self._machine.config
        there = sorted(file.name for file in config.parent.iterdir() if not file.is_dir())
        return rules(self._machine), config.read_bytes(), there, sorted(self._machine.programs())


def rules(machine: Machine) -> str:
    """Without handles: those that were put back are others."""
    return machine.host.run("nft", "-s", "list", "table", "inet", "meshnet", check=False).stdout


@contextmanager
def silence(machine: Machine) -> Iterator[None]:
    machine.host.run("nft", "-f", "-", stdin=SILENCE)
    yield
    machine.host.run("nft", "delete", "table", "inet", "silence")


@contextmanager
def open_connection(machine: Machine, peer: Host) -> Iterator[None]:
    """One from before, which lives to the end."""
    with listen(peer, 8080) as server, machine.host.connect(peer.address, 8080) as client, accept(server) as app:
        assert talk(client, app)
        yield
        assert talk(client, app)


def start_set(machine: Machine, *more: str) -> Process:
    """Returns when the new rules are in, and their proof has begun."""
    process = machine.start("set", "--config", str(machine.config), CHANGE, *more)
    wait_for(lambda: NEW in rules(machine), timeout=30.0, what="the new rules")
    return process


def test_a_proof_that_fails_puts_file_and_rules_back(machine: Machine, peer: Host) -> None:
    machine.up()
    before = Before(machine)
    with open_connection(machine, peer):
        with silence(machine):
            done = machine.meshnet("set", "--config", str(machine.config), CHANGE)
        assert done.returncode == 7, done.stdout + done.stderr
        assert "✗ put back: rules and file are as they were\nerror: the rules of these settings do not" in done.stderr
        assert before.is_back()
        assert before.rules_are_kept()
    assert machine.meshnet("rules", "verify").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_set_is_ended_while_it_proves_the_rules(machine: Machine, peer: Host, number: signal.Signals) -> None:
    machine.up()
    before = Before(machine)
    with open_connection(machine, peer):
        with silence(machine):
            for _ in range(5):
                process = start_set(machine)
                process.popen.send_signal(number)
                if process.popen.wait(30) != EXIT_ROLLED_BACK:
                    break  # on a busy machine the proof may be over by itself before the signal comes
            assert process.popen.returncode == (130 if number is signal.SIGINT else -number), process.output
            wait_for(before.is_back, timeout=30.0, what="everything is as before")
        assert before.rules_are_kept()


def test_set_that_hangs_once_the_rules_are_in_is_put_back_in_time(machine: Machine) -> None:
    machine.up()
    before = Before(machine)
    with silence(machine):
        process = start_set(machine, "--rollback-after", "5s")
        process.popen.send_signal(signal.SIGSTOP)
        try:
            wait_for(lambda: NEW not in rules(machine), timeout=30.0, what="the old rules")
        finally:
            process.popen.send_signal(signal.SIGCONT)
        assert process.popen.wait(30) == 7, process.output
    wait_for(before.is_back, what="everything is as before")
    assert before.rules_are_kept()


def test_set_is_killed_when_the_file_is_new_and_the_rules_are_not(machine: Machine) -> None:
    machine.up()
    before = Before(machine)
    old, (keeper,) = machine.config.read_bytes(), machine.keepers()
    os.kill(keeper, signal.SIGSTOP)  # it is waited for, before rules are changed
    try:
        process = machine.start("set", "--config", str(machine.config), CHANGE)
        wait_for(lambda: machine.config.read_bytes() != old, timeout=30.0, what="the new file")
        process.popen.kill()
        wait_for(lambda: machine.config.read_bytes() == old, timeout=30.0, what="the old file")
        assert NEW not in rules(machine)
    finally:
        os.kill(keeper, signal.SIGCONT)
    wait_for(before.is_back, timeout=30.0, what="everything is as before")
    assert before.rules_are_kept()


def test_a_file_that_nobody_can_write_is_told_and_nothing_is_changed(machine: Machine) -> None:
    machine.config = machine.home / "etc" / "meshnet.toml"
    machine.config.parent.mkdir()
    machine.configure()
    machine.up()
    before = Before(machine)
    folder = str(machine.config.parent)
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    done = machine.meshnet(
        "set", "--config", str(machine.config), CHANGE, by=("unshare", "--mount", "sh", "-c", script, folder)
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr == (
        f"error: cannot write {machine.config}.unfinished, by which everything could be put back\n"
        "why: Read-only file system\n"
        f"fix: df -h {folder}; findmnt -T {folder}; ls -ld {folder}\n"
    )
    wait_for(before.is_back, what="the end of the switch")
    assert before.rules_are_kept()


def test_a_file_that_nobody_can_write_any_more_keeps_no_rules_in(machine: Machine) -> None:
    """What can be put back is: the disk was there when `set` began."""
    machine.config = machine.home / "etc" / "meshnet.toml"
    machine.config.parent.mkdir()
    machine.configure()
    machine.up()
    before, folder, old = rules(machine), str(machine.config.parent), machine.config.read_bytes()
    with silence(machine):
        go = machine.home / "go"
        script = (
            'mount --bind "$0" "$0"; { until [ -e "$GO" ]; do sleep 0.1; done; mount -o remount,ro,bind "$0"; } & '
            'exec "$@"'
        )
        line = (*MESHNET, "set", "--config", str(machine.config), CHANGE)
        by = ("unshare", "--mount", "sh", "-c", script, folder)
        change = machine.host.spawn(*by, *line, name="set", GO=str(go), **machine.environment)
        wait_for(lambda: NEW in rules(machine), timeout=30.0, what="the new rules")
        go.touch()
        assert change.popen.wait(60) == 1
    assert f"error: cannot take away {machine.config}.unfinished, by which everything" in change.output
    wait_for(lambda: rules(machine) == before, timeout=30.0, what="the old rules")
    assert machine.config.read_bytes() != old
    done = machine.meshnet("up")  # the disk can be written again
    assert done.returncode == 0, done.stderr
    assert machine.config.read_bytes() == old


def test_a_set_that_ends_well_leaves_nothing_of_the_switch(machine: Machine) -> None:
    machine.up()
    programs = sorted(machine.programs())
    there = set(machine.files())
    done = machine.meshnet("set", "--config", str(machine.config), CHANGE)
    assert done.returncode == 0, done.stderr
    assert NEW in rules(machine)
    assert sorted(machine.programs()) == programs
    assert set(machine.files()) == there


@pytest.mark.parametrize("verb", ["set", "up"])
@pytest.mark.parametrize("boot", ["this boot", "another boot"])
def test_the_switch_is_killed_too_and_the_next_command_puts_back(machine: Machine, verb: str, boot: str) -> None:
    machine.up()
    before, old = Before(machine), machine.config.read_text()
    note = note_of_set(machine.config)
    with silence(machine):
        process = start_set(machine)
        os.kill(machine.switch(), signal.SIGKILL)
        process.popen.kill()
        process.popen.wait()
    if boot == "another boot":
        note.write_text(json.dumps({**json.loads(note.read_bytes()), "boot": "another"}))
    assert NEW in rules(machine)
    done = machine.meshnet("up") if verb == "up" else set_log_level(machine)
    assert done.returncode == 0, done.stderr
    assert "was stopped in its middle: what it had done is put back first" in done.stderr
    assert not note.exists()
    assert machine.config.read_text() == (old if verb == "up" else f'{old}\n[log]\nlevel = "debug"\n')
    machine.config.write_text(old)
    wait_for(before.is_back, what="the old rules")
    assert before.rules_are_kept()


def set_log_level(machine: Machine) -> CompletedProcess[str]:
    return machine.meshnet("set", "--config", str(machine.config), "log.level=debug")


def test_two_at_once_are_refused(machine: Machine) -> None:
    machine.up()
    with silence(machine):
        process = start_set(machine)
        process.popen.send_signal(signal.SIGSTOP)  # so that it is there still
        try:
            done = set_log_level(machine)
        finally:
            process.popen.send_signal(signal.SIGCONT)
        assert done.returncode == 1
        assert f"why: process {process.pid} (meshnet set --config {machine.config} {CHANGE}) has not" in done.stderr
        assert process.popen.wait(60) == 7
