import math
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from meshnet.errors import ConfigError
from meshnet.model.snapshot import Snapshot
from meshnet.proxy import directory as directory_module
from meshnet.proxy import follow as follow_module
from meshnet.proxy.directory import load_directory
from meshnet.proxy.follow import follow

SERVICE = """\
apiVersion: meshnet.dev/v1
kind: Service
metadata: {name: web}
spec:
  ports: [{port: %d}]
  endpoints: [{address: 10.1.0.1}]
"""


@dataclass
class Watcher:
    """What `follow` reported, in order: the version and ports of a snapshot, or the text of a refusal."""

    reports: trio.MemoryReceiveChannel[tuple[int, list[int]] | str]
    reload: trio.MemorySendChannel[None]

    async def next(self) -> tuple[int, list[int]] | str:
        with trio.fail_after(20):
            return await self.reports.receive()


@asynccontextmanager
async def following(directory: Path, version: int = 0, *, nothing_to_lose: bool = True) -> AsyncIterator[Watcher]:
    send, receive = trio.open_memory_channel[tuple[int, list[int]] | str](math.inf)
    ask, asked = trio.open_memory_channel[None](1)

    async def apply(snapshot: Snapshot) -> None:
        send.send_nowait((snapshot.version, [service.port for service in snapshot.services]))

    async def refused(error: ConfigError) -> None:
        send.send_nowait(str(error))

    async def run() -> None:
        await follow(str(directory), version, apply, refused, nothing_to_lose=lambda: nothing_to_lose, reload=asked)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        yield Watcher(receive, ask)
        nursery.cancel_scope.cancel()


async def test_the_first_state_is_applied_and_then_every_change(tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text(SERVICE % 80)
    async with following(tmp_path, version=41) as watcher:
        assert await watcher.next() == (42, [80])
        (tmp_path / "web.yaml").write_text(SERVICE % 81)
        assert await watcher.next() == (43, [81])
        (tmp_path / "db.yml").write_text((SERVICE % 5432).replace("web", "db"))
        assert await watcher.next() == (44, [5432, 81])
        (tmp_path / "web.yaml").unlink()
        assert await watcher.next() == (45, [5432])


async def test_a_bad_state_is_refused_once_and_the_good_one_after_it_is_applied(tmp_path: Path) -> None:
    file = tmp_path / "web.yaml"
    file.write_text(SERVICE % 80)
    async with following(tmp_path) as watcher:
        assert await watcher.next() == (1, [80])
        file.write_text((SERVICE % 80).replace("endpoints", "endpoint"))
        refusal = f'{file}:6: Service web, spec.endpoint: unknown field (did you mean "endpoints"?)'
        assert await watcher.next() == refusal
        await watcher.reload.send(None)  # who asks is told again
        assert await watcher.next() == refusal
        (tmp_path / "db.yaml").write_text(SERVICE % 5432)  # a change that leaves the problem as it was
        (tmp_path / "db.yaml").unlink()
        file.write_text(SERVICE % 80)
        assert await watcher.next() == (2, [80])


async def test_what_changes_nothing_makes_no_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, texts_read = trio.open_memory_channel[None](math.inf)

    def counting(directory: str, version: int, *, may_be_empty: bool) -> Snapshot:
        snapshot = load_directory(directory, version, may_be_empty=may_be_empty)
        trio.from_thread.run_sync(read.send_nowait, None)
        return snapshot

    monkeypatch.setattr(follow_module, "load_directory", counting)
    (tmp_path / "web.yaml").write_text(SERVICE % 80)
    async with following(tmp_path) as watcher:
        assert await watcher.next() == (1, [80])
        await texts_read.receive()
        (tmp_path / "web.yaml").write_text("# new words\n" + SERVICE % 80)
        with trio.fail_after(20):
            await texts_read.receive()
        (tmp_path / "web.yaml").write_text(SERVICE % 81)
        assert await watcher.next() == (2, [81])


async def test_a_configmap_is_followed_through_its_links(tmp_path: Path) -> None:
    def publish(name: str, port: int) -> None:
        """As the kubelet does: a new folder, a new link to it, renamed over the old one."""
        (tmp_path / name).mkdir()
        (tmp_path / name / "web.yaml").write_text(SERVICE % port)
        (tmp_path / "..data_tmp").symlink_to(name)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    publish("..2024_01", 80)
    (tmp_path / "web.yaml").symlink_to("..data/web.yaml")
    async with following(tmp_path) as watcher:
        assert await watcher.next() == (1, [80])
        publish("..2024_02", 81)
        assert await watcher.next() == (2, [81])
        publish("..2024_03", 82)
        assert await watcher.next() == (3, [82])


async def test_a_directory_is_waited_for_with_every_folder_above_it(tmp_path: Path) -> None:
    directory = tmp_path / "etc" / "mesh.d"
    async with following(directory) as watcher:
        missing = f"{directory}: there is no such directory (create it, or set directory in [mesh])"
        assert await watcher.next() == missing
        directory.mkdir(parents=True)
        assert await watcher.next() == (1, [])
        (directory / "web.yaml").write_text(SERVICE % 80)
        assert await watcher.next() == (2, [80])


async def test_a_directory_may_be_replaced_by_rename_and_behind_a_link(tmp_path: Path) -> None:
    for port in (80, 81, 82):
        (tmp_path / str(port)).mkdir()
        (tmp_path / str(port) / "web.yaml").write_text(SERVICE % port)
    directory = tmp_path / "mesh.d"
    (tmp_path / "80").rename(directory)
    async with following(directory) as watcher:
        assert await watcher.next() == (1, [80])
        directory.rename(tmp_path / "old")
        assert "there is no such directory" in await watcher.next()
        (tmp_path / "81").rename(directory)
        assert await watcher.next() == (2, [81])
        directory.rename(tmp_path / "older")
        directory.symlink_to("82")
        while (report := await watcher.next()) != (3, [82]):
            assert "there is no such directory" in report
        (directory / "web.yaml").write_text(SERVICE % 83)
        assert await watcher.next() == (4, [83])
        (tmp_path / "new").symlink_to("old")
        (tmp_path / "new").rename(directory)
        assert await watcher.next() == (5, [80])


async def test_losing_every_file_is_no_reason_to_forget_the_mesh(tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text(SERVICE % 80)
    async with following(tmp_path) as watcher:
        assert await watcher.next() == (1, [80])
        (tmp_path / "web.yaml").unlink()
        refusal = f"{tmp_path}: no *.yaml file is left (to empty the mesh, leave one without content)"
        assert await watcher.next() == refusal
        (tmp_path / "web.yaml").write_text("# nothing, and meant so\n")
        assert await watcher.next() == (2, [])


async def test_nor_is_losing_them_while_nobody_looked(tmp_path: Path) -> None:
    async with following(tmp_path, nothing_to_lose=False) as watcher:
        refusal = f"{tmp_path}: no *.yaml file is left (to empty the mesh, leave one without content)"
        assert await watcher.next() == refusal
        (tmp_path / "web.yaml").write_text("kind: Nonsense\n")
        assert "apiVersion" in str(await watcher.next())
        (tmp_path / "web.yaml").unlink()
        assert await watcher.next() == refusal
        (tmp_path / "web.yaml").write_text(SERVICE % 80)
        assert await watcher.next() == (1, [80])


async def test_a_change_behind_a_link_to_elsewhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_module, "_LOOK_EVERY", 0.2)
    directory = tmp_path / "mesh.d"
    directory.mkdir()
    (tmp_path / "web").write_text(SERVICE % 80)
    (directory / "web.yaml").symlink_to(tmp_path / "web")
    async with following(directory) as watcher:
        assert await watcher.next() == (1, [80])
        (tmp_path / "web").write_text(SERVICE % 81)
        assert await watcher.next() == (2, [81])


async def test_a_signal_receiver_can_ask_for_a_reload(tmp_path: Path) -> None:
    send, receive = trio.open_memory_channel[str](math.inf)

    async def apply(_: Snapshot) -> None:
        raise AssertionError("there is nothing to apply")

    async def refused(error: ConfigError) -> None:
        await send.send(str(error))

    with trio.open_signal_receiver(signal.SIGHUP) as hangups:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: follow(str(tmp_path / "x"), 0, apply, refused, reload=hangups))
            with trio.fail_after(20):
                first = await receive.receive()
                os.kill(os.getpid(), signal.SIGHUP)
                assert await receive.receive() == first
            nursery.cancel_scope.cancel()


async def test_it_ends_soon_after_it_is_cancelled(tmp_path: Path) -> None:
    started = trio.current_time()
    async with following(tmp_path) as watcher:
        assert await watcher.next() == (1, [])
        started = trio.current_time()
    assert trio.current_time() - started < 2


def test_what_editors_leave_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text(SERVICE % 80)
    for name in (".web.yaml.swp", "#web.yaml#", "web.yaml~", "web.yaml.bak", ".hidden.yaml", "README"):
        (tmp_path / name).write_text("[")
    (tmp_path / ".#web.yaml").symlink_to("me@host.1:2")
    (tmp_path / "folder").mkdir()
    snapshot = load_directory(str(tmp_path))
    assert (snapshot.version, [service.name for service in snapshot.services]) == (1, ["web:80"])


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal() -> str:
        with pytest.raises(ConfigError) as caught:
            load_directory(str(tmp_path))
        return str(caught.value).removeprefix(f"{tmp_path}/")

    file = tmp_path / "a.yaml"
    os.mkfifo(file)
    assert refusal() == "a.yaml: not a regular file"
    file.unlink()
    file.mkdir()
    assert refusal() == "a.yaml: cannot be read: Is a directory"
    file.rmdir()
    file.symlink_to("nowhere")
    assert refusal() == "a.yaml: cannot be read: No such file or directory"
    file.unlink()
    file.write_bytes(b"# a\n# \xff\n")
    assert refusal() == "a.yaml:2: not UTF-8 text"
    file.write_text("\ufeff# a mark of the byte order is fine\n")
    load_directory(str(tmp_path))
    monkeypatch.setattr(directory_module, "_MOST_BYTES", 1 << 20)
    file.write_text("#" * (1 << 19))
    (tmp_path / "b.yaml").write_text("#" * (1 << 19))
    load_directory(str(tmp_path))
    (tmp_path / "c.yaml").write_text("#")
    assert refusal() == "c.yaml: with this file the directory has more than 1 MiB"


def large(name: str = "many") -> str:
    """More than is read within the sidecar."""
    endpoints = "".join(f"  - address: 10.2.{number >> 8}.{number & 255}\n" for number in range(10_000))
    return (
        SERVICE.replace("name: web", f"name: {name}") % 80
        + "# "
        + "x" * (256 << 10)
        + "\n---\n"
        + (
            f"apiVersion: meshnet.dev/v1\nkind: Service\nmetadata: {{name: all}}\nspec:\n  ports: [{{port: 7}}]\n"
            f"  endpoints:\n{endpoints}"
        )
    )


async def test_a_large_mesh_is_read_by_another_program_to_the_same_end(tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text(large())
    async with following(tmp_path) as watcher:
        assert await watcher.next() == (1, [7, 80])
        (tmp_path / "web.yaml").write_text("# new words\n" + large())
        (tmp_path / "db.yaml").write_text(SERVICE % 5432)
        assert await watcher.next() == (2, [7, 80, 5432])
        (tmp_path / "db.yaml").unlink()
        (tmp_path / "web.yaml").write_text(SERVICE % 81)
        assert await watcher.next() == (3, [81])


async def test_what_is_wrong_with_a_large_mesh_is_told_as_it_is_of_a_small_one(tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text(large("Web"))
    with pytest.raises(ConfigError) as caught:
        load_directory(str(tmp_path))
    async with following(tmp_path) as watcher:
        assert await watcher.next() == str(caught.value)


async def test_when_a_large_mesh_is_gone_the_last_good_state_stays(tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text(large())
    async with following(tmp_path) as watcher:
        assert await watcher.next() == (1, [7, 80])
        (tmp_path / "web.yaml").unlink()
        assert "no *.yaml file is left" in str(await watcher.next())


async def test_a_reader_that_cannot_do_its_work_refuses_the_mesh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "web.yaml").write_text(large())
    monkeypatch.setattr(follow_module, "_READER", "signal")  # a program that prints nothing of use
    async with following(tmp_path) as watcher:
        assert "does not begin like a snapshot" in str(await watcher.next())
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-such-program"))
    async with following(tmp_path) as watcher:
        assert "no program can be started: No such file or directory" in str(await watcher.next())
