"""What the commands say and exit with when the sidecar does not answer as it should."""

import json
import signal
import socket
from pathlib import Path

import pytest

from meshnet.model.admin import Refused
from tests.cli.conftest import Meshnet
from tests.cli.sidecar import Sidecar, all_four, run_meshnet


def test_no_sidecar_is_exit_4_and_says_how_to_start_one(meshnet: Meshnet, tmp_path: Path) -> None:
    missing = tmp_path / "nobody.sock"
    result = meshnet("conns", "--socket", str(missing))
    assert result.exit_code == 4
    assert result.stdout == ""
    assert result.stderr == (
        f"error: no sidecar answers at {missing}\n"
        "why: No such file or directory; is the sidecar running?\n"
        "fix: sudo meshnet up, or meshnet proxy in the foreground; --socket PATH if it listens elsewhere\n"
    )


@pytest.mark.parametrize("command", ["conns", "conns -f", "explain x", "status", "endpoints"])
def test_every_command_tells_a_dead_socket_from_an_empty_answer(meshnet: Meshnet, tmp_path: Path, command: str) -> None:
    path = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    result = meshnet(*command.split(), "--socket", str(path))
    assert (result.exit_code, result.stdout) == (4, "")
    assert "why: Connection refused; is the sidecar running?" in result.stderr


def test_a_path_too_long_for_a_socket_is_no_traceback(meshnet: Meshnet) -> None:
    result = meshnet("status", "--socket", "/tmp/" + "x" * 200)
    assert result.exit_code == 4
    assert "why: AF_UNIX path too long; is the sidecar running?" in result.stderr


def test_no_right_to_ask_is_exit_5_with_the_sudo_line(sidecar: Sidecar) -> None:
    sidecar.path.chmod(0)
    with run_meshnet("conns", "--to", "my db", "--socket", str(sidecar.path), powers=False) as process:
        _, stderr = process.communicate(timeout=10)
    assert process.returncode == 5
    assert stderr == (
        f"error: may not open {sidecar.path}\n"
        "why: the admin socket belongs to root and the meshnet group\n"
        f"fix: sudo meshnet conns --to 'my db' --socket {sidecar.path}\n"
    )


def test_a_sidecar_that_does_not_answer_in_time_is_exit_6(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.hold = True
    result = meshnet("status", "--timeout", "50ms")
    assert result.exit_code == 6
    assert result.stderr == (
        f"error: the sidecar at {sidecar.path} did not answer within 0.05s\n"
        "why: it is overloaded or stuck\n"
        "fix: try again with --timeout 30s, and look at the sidecar's log\n"
    )


@pytest.mark.parametrize("answer", [[], [b'{"items":']])
def test_a_sidecar_that_hangs_up_or_talks_nonsense_is_no_traceback(
    meshnet: Meshnet, sidecar: Sidecar, answer: list[bytes]
) -> None:
    sidecar.answers = answer
    result = meshnet("endpoints")
    assert result.exit_code == (1 if answer else 4)
    assert result.stderr.startswith("error: the sidecar")


def test_an_answer_of_another_version_says_so(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.answers = [b'{"node": 7}']
    result = meshnet("status")
    assert result.exit_code == 1
    assert "the two may be of different versions\n" in result.stderr


def test_fields_that_a_newer_sidecar_adds_are_passed_over(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.answers = [b'{"items": [], "surprise": {"x": 1}}']
    assert meshnet("endpoints", "-o", "json").exit_code == 0


def test_an_error_is_json_where_json_was_asked_for(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(Refused(error="draining\x1b\u202e", fix="wait"))
    result = meshnet("status", "-o", "json")
    assert result.stdout == ""
    assert result.stderr.rstrip("\n").isprintable()
    assert json.loads(result.stderr) == {
        "error": "draining\x1b\u202e",
        "why": "",
        "fix": "wait",
        "exitCode": 1,
        "kind": "Error",
    }


def test_the_output_format_can_come_from_the_environment(
    meshnet: Meshnet, sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    sidecar.will_answer(all_four())
    monkeypatch.setenv("MESHNET_OUTPUT", "name")
    assert meshnet("conns").output == "k7f2\nk7f9\nk801\nk802\n"
    assert meshnet("conns", "-o", "table").output.startswith("ID ")


def test_ctrl_c_while_waiting_is_exit_130_without_a_traceback(sidecar: Sidecar) -> None:
    sidecar.hold = True
    with run_meshnet("status", "--timeout", "60s", "--socket", str(sidecar.path)) as process:
        sidecar.asked()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=10) == ("", "")
        assert process.returncode == 130
