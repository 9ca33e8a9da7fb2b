"""What systemd hears of a sidecar that it has started (sd_notify(3)), on a real socket."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshnet_cli.demo.mesh import Sidecar
from tests.proxy.programs import stopped
from tests.world import Mesh, World, wait_for

pytestmark = pytest.mark.netns


@pytest.fixture
def ear(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(str(tmp_path / "notify"))
        ear.settimeout(10)
        yield ear


def start(world: World, mesh: Mesh, ear: socket.socket, **more: str) -> Sidecar:
    mesh.write()
    sidecar = mesh.sidecar(world.host("web"), start=False)
    sidecar.spawn(NOTIFY_SOCKET=ear.getsockname(), **more)
    return sidecar


def heard(ear: socket.socket) -> dict[str, str]:
    lines = ear.recv(4096).decode().splitlines()
    return dict(line.split("=", 1) for line in lines)  # type: ignore[misc] # two parts each


def test_it_says_that_it_is_there_how_it_is_and_that_it_ends(world: World, mesh: Mesh, ear: socket.socket) -> None:
    sidecar = start(world, mesh, ear, WATCHDOG_USEC="200000")
    first = heard(ear)
    assert (first["READY"], first["WATCHDOG"]) == ("1", "1")
    sidecar.wait_until_ready()
    assert wait_for(lambda: (said := heard(ear))["STATUS"] == "0 services, 0 connections" and said)
    assert "READY" not in heard(ear), "that is said once"
    assert sidecar.stop() == 0


def test_a_loop_that_stands_still_says_nothing(world: World, mesh: Mesh, ear: socket.socket) -> None:
    sidecar = start(world, mesh, ear, WATCHDOG_USEC="100000")
    heard(ear)
    with stopped(sidecar):
        ear.settimeout(0.5)
        with pytest.raises(TimeoutError):
            while True:
                heard(ear)
        ear.settimeout(10)
    assert heard(ear)["WATCHDOG"] == "1"


def test_why_it_is_not_ready_is_its_status(world: World, mesh: Mesh, ear: socket.socket) -> None:
    sidecar = mesh.sidecar(world.host("web"), start=False)
    Path(sidecar.settings.mesh.directory, "bad.yaml").write_text("no: mesh\n")
    sidecar.spawn(NOTIFY_SOCKET=ear.getsockname(), WATCHDOG_USEC="100000")
    assert wait_for(lambda: heard(ear)["STATUS"].startswith("not ready: ") or None)
    assert sidecar.process is not None


def test_where_nobody_listens_it_runs_all_the_same(world: World, mesh: Mesh, tmp_path: Path) -> None:
    mesh.write()
    sidecar = mesh.sidecar(world.host("web"), start=False)
    sidecar.spawn(NOTIFY_SOCKET=str(tmp_path / "nobody"))
    sidecar.wait_until_ready()
    assert sidecar.process is not None
    assert "cannot tell" in sidecar.process.output
