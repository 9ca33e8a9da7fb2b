"""Who looks after a sidecar, with other programs in the sidecar's place."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshnet.errors import CommandError
from meshnet.model.settings import AdminSection, Settings
from meshnet_cli import lock, supervise
from tests.cli.sidecar import ROOT, clean_environment
from tests.world import stand_still, wait_for

# Runs a supervisor whose sidecar is the Python code of the second argument.
SUPERVISOR = """
import sys
from meshnet.model.settings import AdminSection, Settings
from meshnet_cli import supervise
settings = Settings(admin=AdminSection(socket=sys.argv[1]))
supervise.sidecar_command = lambda settings, config: [sys.argv[5], "-c", sys.argv[2]]
supervise.LOG_SIZE = int(sys.argv[3])
supervise.START_TIMEOUT, supervise.WATCHDOG = map(float, sys.argv[6:])
sys.exit(supervise.Supervisor(settings, sys.argv[4]).run())
"""

Run = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    found = Settings(admin=AdminSection(socket=str(tmp_path / "admin.sock")))
    supervise.log_file(found).parent.mkdir()
    return found


@pytest.fixture
def run(settings: Settings, tmp_path: Path) -> Iterator[Run]:
    started = []

    def start(
        sidecar: str,
        log_size: int = supervise.LOG_SIZE,
        command: str = sys.executable,
        silence: tuple[float, float] = (supervise.START_TIMEOUT, supervise.WATCHDOG),
    ) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", SUPERVISOR, settings.admin.socket, sidecar, str(log_size)),
                *("meshnet.toml", command, *map(str, silence)),
            ],
            cwd=tmp_path,
            env=clean_environment()
            | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "cli", "init"))},
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_sidecar_that_dies_is_started_again_until_it_ends_in_order(run: Run, settings: Settings) -> None:
    sidecar = """
import os, pathlib
lives = pathlib.Path("lives")
lives.touch()
lives.write_text(lives.read_text() + ".")
print("life", len(lives.read_text()), flush=True)
if len(lives.read_text()) < 3:
    os.abort()
"""
    assert run(sidecar).wait(10) == 0
    assert supervise.log_file(settings).read_text().splitlines() == [
        "life 1",
        "supervise: the sidecar ended with -6; again in 0.2 s",
        "life 2",
        "supervise: the sidecar ended with -6; again in 0.4 s",
        "life 3",
    ]


# Its settings are wrong until they say "good".
READS_SETTINGS = """
import pathlib
file = pathlib.Path("meshnet.toml")
raise SystemExit(0 if file.exists() and file.read_text() == "good" else 78)
"""


def test_a_configuration_that_cannot_work_is_tried_again_as_soon_as_it_changes(
    run: Run, settings: Settings, tmp_path: Path
) -> None:
    process = run(READS_SETTINGS)
    log = supervise.log_file(settings)
    wait_for(lambda: log.read_text().count("the sidecar ended with 78; again in 30.0 s") == 1)
    assert "sooner if meshnet.toml changes" in log.read_text()
    (tmp_path / "meshnet.toml").write_text("bad")
    wait_for(lambda: log.read_text().count("the sidecar ended with 78; again in 30.0 s") == 2)
    (tmp_path / "new").write_text("good")
    (tmp_path / "new").rename(tmp_path / "meshnet.toml")
    assert process.wait(10) == 0


def test_a_configuration_that_cannot_work_does_not_keep_it_from_ending(run: Run, settings: Settings) -> None:
    process = run(READS_SETTINGS)
    wait_for(lambda: "again in 30.0 s" in supervise.log_file(settings).read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 78


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_cuts_a_pause_short(run: Run, settings: Settings, number: signal.Signals) -> None:
    process = run("raise SystemExit(78)")
    log = supervise.log_file(settings)
    wait_for(lambda: log.read_text().count("again in 30.0 s") == 1)
    process.send_signal(number)
    wait_for(lambda: log.read_text().count("again in 30.0 s") == 2)


def test_what_the_last_sidecar_said_is_told_apart_from_what_was_said_before(settings: Settings) -> None:
    log = supervise.log_file(settings)
    log.write_text("error: of long ago\nsupervise: the sidecar ended with 9; again in 0.2 s\n")
    output = supervise.Output(settings)
    assert (output.exit_codes(), output.last_words()) == ([], [])
    with log.open("a") as file:
        file.write("one\nsupervise: the sidecar ended with -6; again in 0.2 s\n2\nerror: x\nwhy: y\n       z\nfix: f\n")
        file.write("supervise: the sidecar ended with 78; again in 30.0 s\nsupervise: sooner if it changes\n")
    assert output.exit_codes() == [-6, 78]
    assert output.last_words() == ["error: x", "why: y", "       z", "fix: f"]
    log.write_text("anew\n")
    assert output.last_words() == ["anew"]


def test_a_sidecar_that_cannot_be_run_at_all_is_told_in_the_log(run: Run, settings: Settings) -> None:
    process = run("", command="/nowhere/setpriv")
    log = supervise.log_file(settings)
    wait_for(lambda: "the sidecar ended with 127" in log.read_text())
    assert log.read_text().startswith("cannot run /nowhere/setpriv: No such file or directory\n")
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 127


# It speaks until its second life, in which it says nothing.
SPEAKS = """
import os, pathlib, socket, threading
lives = pathlib.Path("lives")
lives.touch()
lives.write_text(lives.read_text() + ".")
print("life", len(lives.read_text()), os.getpid(), flush=True)
every = int(os.environ["WATCHDOG_USEC"]) / 2e6
speaker = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
speaker.connect(os.environ["NOTIFY_SOCKET"].replace("@", chr(0)))
while len(lives.read_text()) < 2:
    speaker.send(b"WATCHDOG=1")
    print("alive", flush=True)
    threading.Event().wait(every)
threading.Event().wait()
"""


def test_a_sidecar_that_is_stopped_or_never_says_a_word_is_killed(run: Run, settings: Settings) -> None:
    log = supervise.log_file(settings)
    run(SPEAKS, silence=(5.0, 2.0))
    wait_for(lambda: log.exists() and log.read_text().count("alive") > 6, what="longer than it may be silent")
    life = re.search(r"^life 1 (\d+)$", log.read_text(), re.MULTILINE)
    assert life is not None
    assert "it is killed" not in log.read_text()
    stand_still(int(life[1]))
    says = "supervise: the sidecar"
    killed = f"{says} hangs, or its loop stands still: it is killed\n{says} ended with -9"
    wait_for(lambda: f"alive\n{killed}" in log.read_text(), what="that it is killed")
    wait_for(lambda: log.read_text().count(killed) == 2, timeout=20.0, what="that the second one is killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_end_goes_to_the_sidecar_and_nothing_is_started_after_it(
    run: Run, settings: Settings, number: signal.Signals
) -> None:
    # It ends with an error, which would otherwise be a reason to start it again.
    sidecar = """
import signal
numbers = [signal.SIGTERM, signal.SIGINT]
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
print("up", flush=True)
print(signal.sigwait(numbers).name)
exit(3)
"""
    process = run(sidecar)
    log = supervise.log_file(settings)
    wait_for(lambda: log.read_text() == "up\n")
    process.send_signal(number)
    assert process.wait(10) == 3
    assert log.read_text() == f"up\n{number.name}\n"


def test_a_signal_between_two_lives_is_the_end_too(run: Run, settings: Settings) -> None:
    process = run("raise SystemExit('dead')")
    log = supervise.log_file(settings)
    wait_for(lambda: "again in 1.6 s" in log.read_text())
    lives = log.read_text().count("dead")
    process.send_signal(signal.SIGTERM)
    assert process.wait(1.0) == 1
    assert log.read_text().count("dead") == lives


def test_what_it_prints_takes_bounded_room(run: Run, settings: Settings) -> None:
    assert run("for number in range(2000): print(number)", log_size=1000).wait(10) == 0
    log = supervise.log_file(settings)
    files = sorted(log.parent.glob("sidecar.log*"))
    assert len(files) == 1 + supervise.LOG_FILES
    assert all(file.stat().st_size <= 1000 for file in files)
    assert log.read_text().endswith("1999\n")
    assert (1 + supervise.LOG_FILES) * supervise.LOG_SIZE < 100_000_000


def test_bytes_that_are_no_text_do_not_stop_it(run: Run, settings: Settings) -> None:
    assert run(r"import os; os.write(1, b'\xff\x00 and so on\n')").wait(10) == 0
    assert supervise.log_file(settings).read_text() == "\\xff\x00 and so on\n"


def test_two_for_one_admin_socket_are_refused(settings: Settings) -> None:
    held = lock.take(supervise.log_file(settings).parent)
    assert held is not None
    with held:
        assert supervise.is_supervised(settings)
        with pytest.raises(CommandError, match="already being looked after"):
            supervise.start(settings, None)
    assert not supervise.is_supervised(settings)


def test_stopping_what_is_not_there_is_no_error(settings: Settings) -> None:
    assert supervise.stop(settings, drain=0.0) is False
