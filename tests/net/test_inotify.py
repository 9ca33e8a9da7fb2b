"""What the kernel tells of a folder, and what of it is passed on."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from meshnet.net.inotify import Inotify
from tests.relay.rig import descriptors

CHANGES: list[Callable[[Path], object]] = [
    lambda file: file.write_text("more"),
    lambda file: file.chmod(0o600),
    lambda file: file.unlink(),
    lambda file: file.rename(file.parent.parent / "elsewhere"),
    lambda file: (file.parent.parent / "from").write_text("") or (file.parent.parent / "from").rename(file),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@pytest.mark.parametrize("change", CHANGES, ids=["write", "chmod", "unlink", "move away", "move here"])
async def test_a_change_of_a_file_is_told_by_its_path(folder: Path, change: Callable[[Path], object]) -> None:
    file = folder / "naïve \udce9.yaml"  # a name of bytes that are no UTF-8
    file.write_text("")
    with Inotify([str(folder)]) as changes:
        change(file)
        with trio.fail_after(5):
            assert await changes.changed() == {str(file)}


async def test_who_waits_hears_of_what_comes_and_then_of_no_more(folder: Path) -> None:
    with Inotify([str(folder)]) as changes, trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, (folder / "new").mkdir)
            assert await changes.changed() == {str(folder / "new")}
        (folder / "new" / "deeper").write_text("")  # not in the folder itself
        with trio.move_on_after(0.05) as patience:
            await changes.changed()
        assert patience.cancelled_caught


async def test_of_several_folders_each_is_told_and_its_own_end_too(folder: Path) -> None:
    with Inotify([str(folder), str(folder.parent)]) as changes, trio.fail_after(5):
        folder.rmdir()
        assert await changes.changed() == {str(folder)}


async def test_where_events_are_lost_every_folder_may_have_changed(folder: Path) -> None:
    many = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    with Inotify([str(folder)]) as changes, trio.fail_after(60):
        file = folder / "file"
        descriptor = os.open(file, os.O_CREAT | os.O_RDWR)
        for number in range(many // 2 + 1):  # two events each; two alike in a row would be told as one
            os.write(descriptor, b"x")
            os.fchmod(descriptor, 0o600 + number % 2)
        os.close(descriptor)
        told: set[str] = set()
        while str(folder) not in told:
            told |= await changes.changed()


def test_what_is_no_folder_is_an_error_and_leaves_nothing_open(folder: Path) -> None:
    (folder / "file").write_text("")
    before = descriptors()
    for path in (folder / "file", folder / "none"):
        with pytest.raises(OSError, match=str(path)):
            Inotify([str(folder), str(path)])
    assert descriptors() == before


async def test_who_waits_when_it_is_closed_is_told(folder: Path) -> None:
    changes = Inotify([str(folder)])
    with pytest.RaisesGroup(trio.ClosedResourceError):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(changes.changed)
            await trio.testing.wait_all_tasks_blocked()
            changes.__exit__()
