"""Files that are replaced whole."""

import stat
from pathlib import Path

import pytest

from meshnet.net.files import write_files


def test_the_folder_and_the_files_are_for_their_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    write_files(folder, {"a": b"1", "b": b"2"})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {"a": b"1", "b": b"2"}
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "a", folder / "b")] == [0o700, 0o600, 0o600]


def test_who_has_the_old_file_open_reads_all_of_the_old_one(tmp_path: Path) -> None:
    write_files(tmp_path, {"a": b"old"})
    with (tmp_path / "a").open("rb") as reader:
        write_files(tmp_path, {"a": b"new"})
        assert reader.read() == b"old"
    assert (tmp_path / "a").read_bytes() == b"new"


def test_when_one_cannot_be_written_none_is_replaced_and_no_draft_stays(tmp_path: Path) -> None:
    write_files(tmp_path, {"a": b"old"})
    with pytest.raises(FileNotFoundError):
        write_files(tmp_path, {"a": b"new", "missing/b": b"2"})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a": b"old"}


def test_without_replace_what_is_there_stays_be_it_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "b").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match=r"b is already there"):
        write_files(tmp_path, {"a": b"1", "b": b"2"}, replace=False)
    assert [file.name for file in tmp_path.iterdir()] == ["b"]


def test_a_file_in_the_place_of_the_folder_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        write_files(tmp_path / "file", {"a": b"1"})
