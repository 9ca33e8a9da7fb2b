"""Of the commands that change a host one at a time does, and the others say which."""

import fcntl
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from meshnet_cli.vm import unfinished
from tests.cli.machine import Machine
from tests.proxy.programs import accept, listen
from tests.world import Host, Process, stand_still, wait_for

pytestmark = pytest.mark.netns

# One canary never gets an answer, so that a proof takes a while.
SILENCE = "table inet stranger { chain c { type filter hook output priority -300; ip daddr 192.0.2.2 drop; }; }"


@contextmanager
def standing(process: Process) -> Iterator[None]:
    stand_still(process.pid)
    try:
        yield
    finally:
        process.popen.send_signal(signal.SIGCONT)


def test_a_second_up_says_that_one_is_on_its_way_and_disturbs_nothing(machine: Machine) -> None:
    before = (machine.rules(), sorted(machine.home.rglob("*")), machine.files())
    first = machine.start("up")
    wait_for(lambda: re.search(r"^. discover ", first.output, re.MULTILINE), what="the first phases")
    with standing(first):
        second = machine.meshnet("up")
        assert second.returncode == 1
        assert second.stderr.endswith(
            "error: another meshnet command is changing this host\n"
            f"why: process {first.pid} (meshnet up --config {machine.config}) has not reached its end yet\n"
            f"fix: the same again, in a minute; if it does not end: ps -p {first.pid}, kill {first.pid}\n"
        )
    assert first.popen.wait(60) == 0, first.output
    assert machine.status().ready
    assert machine.meshnet("down", "--purge").returncode == 0
    wait_for(lambda: not machine.programs(), what="the end of every process")
    assert (machine.rules(), sorted(machine.home.rglob("*")), machine.files()) == before


def test_two_ups_at_the_same_moment_are_one_up(machine: Machine) -> None:
    both = [machine.start("up"), machine.start("up")]
    codes = [up.popen.wait(60) for up in both]
    said = "\n".join(up.output for up in both)
    assert sorted(codes) in ([0, 1], [0, 0]), said  # one after the other, on a busy machine
    assert codes == [0, 0] or "another meshnet command is changing this host" in said
    assert "put back" not in said
    assert machine.meshnet("up").stdout.endswith("nothing changed.   See: meshnet conns   Change: meshnet set   "
                                                 "Undo: sudo meshnet down\n")  # fmt: skip


@pytest.mark.parametrize("verb", ["down", "set"])
def test_up_keeps_the_others_out_too(machine: Machine, verb: str) -> None:
    up = machine.start("up")
    wait_for(lambda: re.search(r"^. discover ", up.output, re.MULTILINE), what="the first phases")
    config = machine.config.read_bytes()
    with standing(up):
        more = ("--config", str(machine.config), "log.level=debug") if verb == "set" else ()
        done = machine.meshnet(verb, *more)
        assert done.returncode == 1
        assert f"why: process {up.pid} (meshnet up " in done.stderr
        assert machine.meshnet("up", "--dry-run").returncode == 0, "that changes nothing"
    assert up.popen.wait(60) == 0, up.output
    assert machine.config.read_bytes() == config
    assert machine.status().ready


def test_down_keeps_up_out_until_what_is_open_has_ended(machine: Machine, peer: Host) -> None:
    machine.up()
    with listen(peer, 8080) as server, machine.host.connect(peer.address, 8080), accept(server):
        down = machine.start("down")
        wait_for(lambda: "waiting for 1 open connections" in down.output)
        done = machine.meshnet("up")
        assert done.returncode == 1
        assert f"why: process {down.pid} (meshnet down " in done.stderr
    assert down.popen.wait(20) == 0
    machine.up()


def test_a_switch_that_puts_back_has_the_turn_of_the_command_that_is_gone(machine: Machine, peer: Host) -> None:
    machine.host.run("nft", "-f", "-", stdin=SILENCE)
    with listen(peer, 8080) as server:
        up = machine.start("up")
        wait_for(lambda: "redirect to :15101" in machine.rules(), timeout=30.0, what="the rules")
        with machine.host.connect(peer.address, 8080), accept(server):  # it gets some seconds to end
            switch = machine.switch()
            up.popen.kill()
            wait_for(lambda: not (machine.home / unfinished.NAME).exists(), what="that it begins")
            done = machine.meshnet("up")
            assert done.returncode == 1
            assert f"why: process {switch} (it puts back what a command had done that is gone)" in done.stderr
    machine.host.run("nft", "delete", "table", "inet", "stranger")
    wait_for(lambda: not machine.programs(), what="the end of every process")
    machine.up()


def test_down_puts_back_first_what_a_killed_up_and_its_killed_switch_have_left(machine: Machine) -> None:
    before = (machine.rules(), sorted(machine.home.rglob("*")), machine.files())
    machine.cut_off_up()
    done = machine.meshnet("down", "--purge")
    assert done.returncode == 0, done.stderr
    assert "what it had done is put back first" in done.stderr
    wait_for(lambda: not machine.programs(), what="the end of every process")
    assert (machine.rules(), sorted(machine.home.rglob("*")), machine.files()) == before


def test_a_program_of_another_user_that_has_the_lock_is_named_and_keeps_nobody_out(
    machine: Machine, real_root: bool
) -> None:
    if not real_root:  # then there is one user
        return
    line = ("flock", "/proc/self/ns/net", "sleep", "1000")
    stranger = machine.host.spawn("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--", *line)

    def is_locked() -> bool:
        with machine.host.entered(), open("/proc/thread-self/ns/net", "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    wait_for(is_locked, what="the lock")
    done = machine.meshnet("up")
    assert done.returncode == 0, done.stderr
    assert f"process {stranger.pid} has the lock of meshnet's commands and is none of them" in done.stderr
