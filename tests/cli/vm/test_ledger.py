"""What meshnet made, and only that, is taken away again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshnet.errors import CommandError
from meshnet_cli.vm.ledger import NAME, Ledger, rights_of


def made(ledger: Ledger, file: Path, text: str = "ours") -> None:
    ledger.note_file(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_what_was_made_goes_last_first_and_the_state_with_it(tmp_path: Path) -> None:
    state = tmp_path / "lib" / "meshnet"
    ledger = Ledger(state)
    made(ledger, state / "ca" / "ca.pem")
    made(ledger, tmp_path / "etc" / "mesh.d" / "a.yaml")
    assert Ledger(state).entries == ledger.entries, "it is on disk"
    assert Ledger(state).undo() == []
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "mesh.d").mkdir()
    (tmp_path / "mesh.d" / "own.yaml").write_text("own")
    ledger = Ledger(tmp_path / "state")
    made(ledger, tmp_path / "mesh.d" / "own.yaml", "own")
    made(ledger, tmp_path / "mesh.d" / "ours.yaml")
    assert ledger.undo() == []
    assert [path.name for path in (tmp_path / "mesh.d").iterdir()] == ["own.yaml"]
    assert not (tmp_path / "state").exists()


def test_a_folder_of_ours_with_somebody_elses_file_stays_and_is_told(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "state")
    made(ledger, tmp_path / "mesh.d" / "ours.yaml")
    (tmp_path / "mesh.d" / "own.yaml").write_text("own")
    assert ledger.undo() == [f"directory {tmp_path}/mesh.d: it has own.yaml"]
    assert (tmp_path / "mesh.d" / "own.yaml").read_text() == "own"
    assert not (tmp_path / "mesh.d" / "ours.yaml").exists()


def test_only_what_a_run_has_made_is_undone(tmp_path: Path) -> None:
    state = tmp_path / "state"
    ledger = Ledger(state)
    made(ledger, tmp_path / "first")
    keep = len(ledger.entries)
    made(ledger, tmp_path / "second")
    assert ledger.undo(keep) == []
    assert (tmp_path / "first").exists()
    assert not (tmp_path / "second").exists()
    assert Ledger(state).entries == ledger.entries
    assert Ledger(state).undo() == []
    assert list(tmp_path.iterdir()) == []


def test_rights_come_back(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("k")
    key.chmod(0o640)
    ledger = Ledger(tmp_path / "state")
    before = rights_of(key)
    ledger.note("rights", key, before)
    key.chmod(0o600)
    assert ledger.undo() == []
    assert rights_of(key) == before
    assert before.endswith(":640")


def test_what_is_gone_already_is_no_problem(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "state")
    made(ledger, tmp_path / "folder" / "file")
    (tmp_path / "folder" / "file").unlink()
    (tmp_path / "folder").rmdir()
    assert ledger.undo() == []


def test_what_cannot_be_read_is_an_error_and_nothing_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("no json")
    with pytest.raises(CommandError, match="cannot be read"):
        Ledger(tmp_path)
    assert (tmp_path / NAME).read_text() == "no json"


def test_where_it_cannot_be_written_nothing_may_be_made(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    ledger = Ledger(tmp_path / "state")
    with pytest.raises(CommandError, match="cannot write"):
        made(ledger, tmp_path / "file")
    assert not os.path.lexists(tmp_path / "file")


def test_where_it_may_not_be_written_it_says_what_to_type(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    program = "import sys; from pathlib import Path; from meshnet_cli.vm.ledger import Ledger\n"
    program += "Ledger(Path(sys.argv[1])).note_file(Path('/anywhere'))"
    done = subprocess.run(
        ["setpriv", "--bounding-set=-dac_override", "--", sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "CommandError" in done.stderr, done.stderr
    assert f"cannot write {tmp_path / NAME}" in done.stderr


def test_the_draft_of_a_file_whose_writer_was_killed_goes_with_it(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "state")
    made(ledger, tmp_path / "identity" / "key.pem")
    (tmp_path / "identity" / ".key.pem.x8d2").write_text("half")
    (tmp_path / "state" / f".{NAME}.k3s9").write_text("half")
    assert ledger.undo() == []
    assert list(tmp_path.iterdir()) == []
