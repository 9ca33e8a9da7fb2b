"""What becomes of meshnet.toml when a run of `meshnet set` is put back."""

import os
from pathlib import Path

import pytest

from meshnet.model.settings import MeshSection, Settings
from meshnet_cli.vm.ledger import Ledger, rights_of
from meshnet_cli.vm.unfinished import Edit, Unfinished, boot_id, put_back


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "etc" / "meshnet.toml"
    file.parent.mkdir()
    file.write_bytes(b"# old\r\n")
    file.chmod(0o640)
    return file


def unfinished(file: Path, old: bytes | None) -> Unfinished:
    state = file.parent.parent / "state"
    return Unfinished(
        pid=os.getpid(),
        boot=boot_id(),
        settings=Settings(mesh=MeshSection(last_good=str(state / "last-good.json"))),
        config=str(file),
        by_systemd=False,
        keep=len(Ledger(state).entries),
        edit=Edit(file=str(file), old=old, new=b"# new\n", rights="" if old is None else rights_of(file)),
    )


def test_nothing_was_changed_and_nothing_is_put_back(file: Path) -> None:
    run = unfinished(file, b"# old\r\n")
    before = file.stat()
    assert put_back(run) == []
    after = file.stat()
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)


def test_the_old_text_comes_back_byte_by_byte_with_its_rights(file: Path) -> None:
    run = unfinished(file, b"# old\r\n")
    file.unlink()
    file.write_bytes(b"# new\n")
    (file.parent / ".meshnet.toml.draft").touch()
    (file.parent / ".meshnet.toml.unfinished.draft").touch()
    assert put_back(run) == []
    assert file.read_bytes() == b"# old\r\n"
    assert (rights_of(file), os.listdir(file.parent)) == (run.edit and run.edit.rights, [file.name])


def test_what_somebody_has_changed_since_stays_and_is_told(file: Path) -> None:
    run = unfinished(file, b"# old\r\n")
    file.write_bytes(b"# by hand\n")
    assert put_back(run) == [f"file {file}: somebody has changed it since"]
    assert file.read_bytes() == b"# by hand\n"


@pytest.mark.parametrize("text", ["", "# new\n"])
def test_a_file_that_was_not_there_is_taken_away_with_its_folder(tmp_path: Path, text: str) -> None:
    file = tmp_path / "etc" / "meshnet.toml"
    run = unfinished(file, None)
    Ledger(run.state()).note_file(file)
    file.parent.mkdir()
    if text:
        file.write_text(text)
    assert put_back(run) == []
    assert os.listdir(tmp_path) == []
