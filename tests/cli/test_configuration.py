"""Which settings a command works with, and what it says when they are wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Meshnet
from tests.cli.sidecar import WITHOUT_POWERS, Sidecar, all_four, clean_environment, run_meshnet

BROKEN = "[proxy]\nmark = 'x'\nmrak = 1\n"
# What follows is about files that a sidecar would be started with: it must not come so far.
PROXY = ("proxy", "--config")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "meshnet.toml"


def test_settings_that_are_not_there_or_no_file_are_told_with_what_to_type(meshnet: Meshnet, file: Path) -> None:
    result = meshnet(*PROXY, str(file))
    assert result.exit_code == 78
    assert result.stderr == (
        f"error: there are no such settings\nwhy: it is about {file}\nfix: name another: --config FILE\n"
    )
    result = meshnet(*PROXY, str(file.parent))
    assert result.stderr == (
        "error: the settings cannot be read: Is a directory\n"
        f"why: it is about {file.parent}\nfix: name a file: --config FILE\n"
    )


def test_settings_that_may_not_be_read_are_told_with_what_to_type(file: Path) -> None:
    file.touch(mode=0)
    with run_meshnet(*PROXY, str(file), powers=False) as process:
        _, stderr = process.communicate(timeout=10)
    assert process.returncode == 78
    what, why, fix = stderr.splitlines()
    assert (what, why) == ("error: the settings cannot be read: permission denied", f"why: it is about {file}")
    assert fix in (f"fix: ls -ld {file}", f"fix: sudo meshnet proxy --config {file}")


def test_the_usual_settings_in_a_folder_that_may_not_be_entered_are_no_traceback(file: Path) -> None:
    file.parent.chmod(0)
    script = (
        "import sys; from meshnet_cli import configuration; from meshnet_cli.main import main\n"
        "configuration.DEFAULT_CONFIG = configuration.DEFAULT_SOCKET = sys.argv[1]\n"
        "main.main(sys.argv[2:])"
    )
    try:
        warned, refused = (
            subprocess.run(
                [*WITHOUT_POWERS, sys.executable, "-c", script, str(file), command],
                env={**clean_environment(), "PYTHONPATH": os.pathsep.join(sys.path)},
                capture_output=True,
                text=True,
            )
            for command in ("status", "proxy")
        )
    finally:
        file.parent.chmod(0o700)
    assert warned.stderr.startswith(f"warning: the settings are not read: {file}: the settings cannot be read: ")
    assert warned.returncode == 5
    assert refused.stderr.startswith("error: the settings cannot be read: permission denied\n")
    assert refused.returncode == 78


def test_settings_that_are_no_text_are_told_with_the_line(meshnet: Meshnet, file: Path) -> None:
    file.write_bytes(b"[proxy]\n# \xff\n")
    assert meshnet(*PROXY, str(file)).stderr == (
        f"error: the settings are not UTF-8 text\nwhy: it is in {file}:2\nfix: save the file as UTF-8\n"
    )


def test_a_wrong_setting_is_told_with_its_line_and_what_to_write(meshnet: Meshnet, file: Path) -> None:
    file.write_text("[proxy]\n\nmark = 'x'\n")
    assert meshnet(*PROXY, str(file)).stderr == (
        f'error: proxy.mark: expected a whole number, got "x"\nwhy: it is in {file}:3\n'
        "fix: write mark = 4096, the default\n"
    )


def test_several_wrong_settings_are_a_line_each(meshnet: Meshnet, file: Path) -> None:
    file.write_text(BROKEN)
    assert meshnet(*PROXY, str(file)).stderr == (
        'error: proxy.mark: expected a whole number, got "x" (write mark = 4096, the default)\n'
        f'       {file}:3: proxy.mrak: unknown key (did you mean "mark"?)\n'
        f"why: it is in {file}:2\nfix: edit {file}, line 2\n"
    )


def test_a_wrong_variable_is_told_with_what_to_set(
    meshnet: Meshnet, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.touch()
    monkeypatch.setenv("MESHNET_PROXY__MARK", "x")
    assert meshnet(*PROXY, str(file)).stderr == (
        'error: proxy.mark: expected a whole number, got "x"\nwhy: the variable MESHNET_PROXY__MARK says so\n'
        "fix: set MESHNET_PROXY__MARK=4096, the default, or unset it\n"
    )


# Where a sidecar is asked.


@pytest.fixture
def unnamed(meshnet: Meshnet, monkeypatch: pytest.MonkeyPatch) -> Meshnet:
    """`meshnet ARGS` without a word about the socket."""
    monkeypatch.delenv("MESHNET_SOCKET")
    return meshnet


def test_the_socket_is_the_one_of_the_settings(
    unnamed: Meshnet, sidecar: Sidecar, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(f"[admin]\nsocket = '{sidecar.path}'\n")
    monkeypatch.setenv("MESHNET_CONFIG", str(file))
    sidecar.will_answer(all_four())
    result = unnamed("conns", "-o", "name")
    assert (result.output, result.exit_code) == ("k7f2\nk7f9\nk801\nk802\n", 0)
    nobody = file.with_name("nobody.sock")
    monkeypatch.setenv("MESHNET_ADMIN__SOCKET", str(nobody))
    assert f"no sidecar answers at {nobody}\n" in unnamed("conns").stderr
    monkeypatch.delenv("MESHNET_CONFIG")
    assert f"no sidecar answers at {nobody}\n" in unnamed("conns").stderr


@pytest.mark.parametrize("command", ["conns", "conns -f", "status", "explain x", "endpoints"])
def test_broken_settings_are_a_warning_in_one_line_and_the_sidecar_is_asked_all_the_same(
    unnamed: Meshnet, file: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    file.write_text(BROKEN)
    monkeypatch.setenv("MESHNET_CONFIG", str(file))
    monkeypatch.setattr("meshnet_cli.configuration.DEFAULT_SOCKET", "/nowhere/admin.sock")
    warning, error, *_ = unnamed(*command.split()).stderr.splitlines()
    assert warning == (
        f'warning: the settings are not read: {file}:2: proxy.mark: expected a whole number, got "x" '
        "(write mark = 4096, the default), and 1 more; looking for the sidecar at /nowhere/admin.sock"
    )
    assert error.startswith("error: no sidecar answers at /nowhere/admin.sock")


def test_where_json_was_asked_for_the_warning_is_json_too(
    unnamed: Meshnet, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESHNET_CONFIG", str(file))
    monkeypatch.setattr("meshnet_cli.configuration.DEFAULT_SOCKET", "/nowhere/admin.sock")
    warning, error = unnamed("status", "-o", "json").stderr.splitlines()
    assert warning == (
        f'{{"warning":"the settings are not read: {file}: there are no such settings (name another: --config FILE); '
        'looking for the sidecar at /nowhere/admin.sock","kind":"Warning"}'
    )
    assert error.startswith('{"error":"no sidecar answers')


@pytest.mark.parametrize("named", ["flag", "variable"])
def test_who_names_the_socket_is_not_bothered_with_settings(
    unnamed: Meshnet, sidecar: Sidecar, file: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    file.write_text(BROKEN)
    monkeypatch.setenv("MESHNET_CONFIG", str(file))
    sidecar.will_answer(all_four())
    if named == "variable":
        monkeypatch.setenv("MESHNET_SOCKET", str(sidecar.path))
    result = unnamed("conns", "-o", "name", *(["--socket", str(sidecar.path)] if named == "flag" else []))
    assert (result.stderr, result.exit_code) == ("", 0)
