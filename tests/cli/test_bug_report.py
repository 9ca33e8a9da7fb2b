"""A bug report of a host in the mesh: what is in it, and what is not."""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Meshnet
from tests.cli.machine import Machine, talk
from tests.cli.sidecar import Sidecar
from tests.proxy.programs import accept, listen
from tests.world import Host

ALL = {
    "contents.json",
    "status.json",
    "connections.json",
    "endpoints.json",
    "metrics.json",
    "log-levels.json",
    "settings.json",
    "check.json",
    "rules.json",
    "log.txt",
    "versions.json",
    "kernel.json",
}


def files(report: Path) -> dict[str, str]:
    with tarfile.open(report) as archive:
        found = {}
        for entry in archive.getmembers():
            folder, _, name = entry.name.partition("/")
            assert folder == "meshnet-bug-report"
            content = archive.extractfile(entry)
            assert content is not None
            found[name] = content.read().decode()
        return found


@pytest.mark.netns
def test_everything_is_in_it_but_keys(machine: Machine, peer: Host) -> None:
    machine.up()
    with listen(peer, 8080) as server, machine.host.connect(peer.address, 8080) as client, accept(server) as app:
        assert talk(client, app)
        with machine.log.open("a") as log:
            log.write(f"somebody logs a key: {(machine.identity / 'key.pem').read_text()}")
        report, redacted = machine.home / "report.tar.gz", machine.home / "redacted.tar.gz"
        for file, flags in ((report, ()), (redacted, ("--redact",))):
            done = machine.meshnet("bug-report", "-o", str(file), "--config", str(machine.config), *flags)
            assert done.returncode == 0, done.stderr
    assert report.stat().st_mode & 0o777 == 0o600
    found = files(report)
    assert set(found) == ALL
    about = json.loads(found["contents.json"])
    assert about["redacted"] is False
    assert set(about["files"].values()) == {""}  # nothing is missing
    assert json.loads(found["status.json"])["ready"]
    target = f"{peer.address}:8080"
    assert target in [it["originalDestination"] for it in json.loads(found["connections.json"])["items"]]
    assert json.loads(found["rules.json"])["items"][0]["rules"]
    assert json.loads(found["kernel.json"])["sysctls"]["net.ipv4.ip_forward"] in ("0", "1")
    assert "trio" in json.loads(found["versions.json"])["libraries"]
    assert "listening: " in found["log.txt"]
    key = (machine.identity / "key.pem").read_text().splitlines()[1]
    assert not any(key in text for text in found.values())
    _nothing_of_the_host(files(redacted), machine, peer)


def _nothing_of_the_host(found: dict[str, str], machine: Machine, peer: Host) -> None:
    assert set(found) == ALL
    identity = machine.status().certificate.identity
    domain = "/".join(identity.split("/")[:3])
    for name, text in found.items():
        for secret in (peer.address, machine.host.address, peer.address6, identity, domain, machine.status().node):
            assert not re.search(rf"(?<![\w-]){re.escape(secret)}(?![\w-])", text), f"{secret} is in {name}"
    about = json.loads(found["contents.json"])
    assert about["redacted"] is True
    connections = json.loads(found["connections.json"])["items"]
    (target,) = {it["originalDestination"] for it in connections if it["originalDestination"].endswith(":8080")}
    assert "listening: " in found["log.txt"]
    host = target.rpartition(":")[0]
    assert host.startswith("198.18.")
    status: dict[str, Any] = json.loads(found["status.json"])
    assert status["certificate"]["identity"].startswith("spiffe://domain-1/")
    assert status["node"] == "host-1"


def test_without_a_sidecar_it_has_what_there_is(meshnet: Meshnet, sidecar: Sidecar, tmp_path: Path) -> None:
    sidecar.answers = []
    config = tmp_path / "meshnet.toml"
    config.write_text(f"[admin]\nsocket = '{tmp_path}/none.sock'\n[log]\nlevel = 'debug'\n")
    report = tmp_path / "report.tar.gz"
    nobody = ("--socket", f"{tmp_path}/none.sock", "--config", str(config))
    result = meshnet("bug-report", *nobody, "-o", str(report))
    assert result.exit_code == 0
    assert "status.json        missing: no sidecar answers at " in result.stdout
    found = files(report)
    assert "status.json" not in found
    assert {"settings.json", "versions.json", "kernel.json"} <= set(found)
    about = json.loads(found["contents.json"])
    assert about["files"]["status.json"].startswith("no sidecar answers") or "missing" in about["files"]["status.json"]
    levels = [it for it in json.loads(found["settings.json"])["items"] if it["name"] == "log.level"]
    assert levels == [{"name": "log.level", "value": "debug", "origin": "file", "place": f"{config}:4"}]


def test_where_it_cannot_be_written_nothing_is_left(meshnet: Meshnet, tmp_path: Path) -> None:
    result = meshnet("bug-report", "-o", str(tmp_path / "none" / "report.tar.gz"))
    assert result.exit_code == 1
    assert "fix: name another file: -o FILE" in result.stderr
    assert list(tmp_path.glob("*report*")) == []
