"""A disk is full where the sidecar keeps the last good mesh, and where its log goes."""

import mmap
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from meshnet.codec.snapshot import decode_snapshot
from meshnet.model.connection import Connection
from tests.faults.causes import SECRET, full, small_disk
from tests.faults.conftest import once
from tests.faults.strange import another_host, strange
from tests.proxy.programs import ask, echo
from tests.traffic.conftest import Hosts, Name
from tests.world import wait_for

pytestmark = pytest.mark.netns

_TO_LOG = 'log=$1 && shift && exec "$@" >>"$log"'


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as disk:
        yield disk


@once
def test_a_mesh_that_cannot_be_kept_is_in_force_and_kept_when_there_is_room_again(
    hosts: Hosts, name: Name, disk: Path
) -> None:
    api, kept = hosts.apis[0], disk / "last-good.json"
    with strange(hosts, another_host(hosts), mesh={"last_good": str(kept)}) as sidecar, echo(api, name.port):
        assert sidecar.process is not None
        before = kept.read_bytes()
        with full(disk):
            hosts.write(hosts.service(name, [api]))
            wait_for(lambda: "could not be kept for a restart: " in sidecar.process.output)  # type: ignore[union-attr] # it runs
            assert "No space left on device" in sidecar.process.output
            wait_for(lambda: sidecar.endpoints(name.name).items, what="that the mesh is in force")
            assert ask(sidecar.host, name.address, name.port, SECRET) == SECRET
            assert kept.read_bytes() == before
            assert {path.name for path in disk.iterdir()} == {"filler", kept.name}
        hosts.write(hosts.service(name, [api, hosts.apis[1]]))
        wait_for(lambda: kept.read_bytes() != before, what="that it is kept")
        services = decode_snapshot(kept.read_bytes().splitlines(), 1).services
        assert [len(service.endpoints) for service in services] == [2]


@once
def test_a_log_without_room_stops_nobody_and_tells_afterwards_how_much_it_lost(
    hosts: Hosts, name: Name, disk: Path
) -> None:
    api, log = hosts.apis[0], disk / "access.log"
    hosts.write(hosts.service(name, [api]))
    with (
        strange(hosts, another_host(hosts), by=("sh", "-c", _TO_LOG, "sh", log)) as sidecar,
        echo(api, name.port),
    ):

        def call(count: int) -> None:
            for _ in range(count):
                assert ask(sidecar.host, name.address, name.port, SECRET) == SECRET

        call(3)
        wait_for(lambda: len(lines(log)) >= 3)
        with full(disk):
            call(20)
            wait_for(lambda: log.stat().st_size % mmap.PAGESIZE == 0, what="that the log has no room left")
        call(3)
        opened = sidecar.status().opened_total

        def told() -> int:
            return sum(int(line["count"]) if line.get("kind") == "LinesLost" else 1 for line in lines(log))

        wait_for(lambda: told() == opened, what="each connection in the log, or counted as lost")
        assert any(line.get("kind") == "LinesLost" for line in lines(log))
        call(1)
        wait_for(lambda: told() == opened + 1)
        msgspec.json.decode(log.read_bytes().splitlines()[-1], type=Connection)


def lines(log: Path) -> list[dict[str, object]]:
    """Those that are whole; one that the disk had no room for is not."""
    found = []
    for line in log.read_bytes().splitlines(keepends=True):
        try:
            found.append(msgspec.json.decode(line if line.endswith(b"\n") else b"", type=dict[str, object]))
        except msgspec.DecodeError:
            pass
    return found
