"""What systemd hears of a sidecar that it has started (sd_notify(3)), on a real socket."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshnet_cli.demo.mesh import Sidecar
from tests.proxy.programs import accept, listen, read, stopped
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
    """What it says of itself; that its listeners are to be kept is said apart."""
    said: dict[str, str] = {}
    while "WATCHDOG" not in said:
        said = assignments(ear.recv(4096))
    return said


def assignments(text: bytes) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.decode().splitlines())  # type: ignore[misc] # two parts each


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


def test_it_has_its_listeners_kept_and_takes_over_who_waits_at_those_of_the_one_before(
    world: World, mesh: Mesh, ear: socket.socket
) -> None:
    sidecar = start(world, mesh, ear)
    kept: dict[str, list[socket.socket]] = {}
    while len(kept) < 3:
        text, descriptors, _, _ = socket.recv_fds(ear, 4096, 8)
        said = assignments(text)
        if "FDSTORE" in said:
            kept[said["FDNAME"]] = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    addresses = {name: sorted(sock.getsockname()[:2] for sock in found) for name, found in kept.items()}
    assert addresses == {
        "outbound": [("127.0.0.1", 15101), ("::1", 15101)],
        "inbound": [("0.0.0.0", 15106), ("::", 15106)],
        "tunnel": [("0.0.0.0", 15108), ("::", 15108)],
    }
    sidecar.wait_until_ready()
    assert sidecar.process is not None
    sidecar.capture()
    sidecar.process.kill()

    peer = world.host("peer")
    with listen(peer, 8080) as server, sidecar.host.connect(peer.address, 8080) as waits:
        waits.sendall(b"before there was anybody")
        found = [(name, sock) for name, socks in kept.items() for sock in socks]
        # As systemd starts it: descriptors from 3 on, and who they are for.
        given = "".join(f"{number}>&{sock.fileno()} " for number, (_, sock) in enumerate(found, 3))
        names = ":".join(name for name, _ in found)
        script = f'LISTEN_PID=$$ LISTEN_FDS={len(found)} LISTEN_FDNAMES={names} exec "$@" {given}'
        assert min(sock.fileno() for _, sock in found) > 3 + len(found)
        sidecar.spawn(by=("bash", "-c", script, "sh"), pass_fds=[sock.fileno() for _, sock in found])
        with accept(server) as app:
            assert read(app, 24) == b"before there was anybody"
            app.sendall(b"late")
            assert read(waits, 4) == b"late"
    for _, sock in found:
        sock.close()
