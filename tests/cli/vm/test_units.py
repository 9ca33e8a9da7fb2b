"""The units as text, and what systemd itself says of them."""

import re
import subprocess
from pathlib import Path
from typing import Literal

import pytest

from meshnet.model.settings import AdminSection, CaptureSection, MeshSection, ProxySection, Settings
from meshnet_cli.vm.systemd import removes_rules
from meshnet_cli.vm.units import RULES, SIDECAR, rules_unit, sidecar_unit

GOLDEN = Path(__file__).parent / "golden"
MESHNET = ("/opt/meshnet/bin/python", "-m", "meshnet_cli.main")


@pytest.mark.parametrize(("name", "render"), [(SIDECAR, sidecar_unit), (RULES, rules_unit)])
def test_the_units_of_the_defaults(name: str, render: object) -> None:
    assert callable(render)
    assert render(Settings(), MESHNET, None) == (GOLDEN / name).read_text()


def test_a_newer_systemd_waits_longer_each_time_that_the_sidecar_dies() -> None:
    assert "RestartSec=1\nWatchdogSec" in sidecar_unit(Settings(), MESHNET, None, 252)
    assert "RestartSec=1\nRestartSteps=8\nRestartMaxDelaySec=30\n" in sidecar_unit(Settings(), MESHNET, None, 254)


def test_settings_are_in_the_unit() -> None:
    settings = Settings(
        proxy=ProxySection(drain_timeout="5m"),
        admin=AdminSection(socket="/srv/mesh/admin.sock"),
        mesh=MeshSection(last_good="/srv/state/last-good.json"),
    )
    text = sidecar_unit(settings, MESHNET, "/srv/meshnet.toml")
    assert "TimeoutStopSec=315\n" in text
    assert "ReadWritePaths=-/srv/state -/srv/mesh\n" in text
    assert "RuntimeDirectory" not in text
    assert "meshnet_cli.main proxy --config /srv/meshnet.toml\n" in text
    keeper = "meshnet_cli.main rules keep --config /srv/meshnet.toml\n"
    assert keeper in rules_unit(settings, MESHNET, "/srv/meshnet.toml")


@pytest.mark.parametrize("switched", [False, True])
def test_the_switches_of_the_original_source_can_be_written_where_they_are_needed(switched: bool) -> None:
    text = rules_unit(Settings(capture=CaptureSection(original_source=switched)), MESHNET, None)
    assert f"ProtectKernelTunables={'no' if switched else 'yes'}\n" in text


@pytest.mark.parametrize(("backend", "made"), [("auto", False), ("nft", False), ("legacy", True)])
def test_a_lock_of_the_legacy_tables_is_made_only_where_they_are_ours(
    backend: Literal["auto", "nft", "legacy"], made: bool
) -> None:
    text = rules_unit(Settings(capture=CaptureSection(backend=backend)), MESHNET, None)
    assert (": >>/run/xtables.lock" in text) is made
    assert "chmod -f g+r /run/xtables.lock\nExecStart=" in text


@pytest.mark.parametrize(
    ("python", "protect"),
    [
        ("/opt/meshnet/bin/python", "yes"),
        ("/home/ann/meshnet/bin/python", "read-only"),
        ("/root/bin/python", "read-only"),
    ],
)
def test_a_checkout_in_a_home_is_seen(python: str, protect: str) -> None:
    for render in (sidecar_unit, rules_unit):
        assert f"ProtectHome={protect}\n" in render(Settings(), (python, *MESHNET[1:]), None)


def test_what_systemd_would_read_otherwise_is_quoted() -> None:
    text = sidecar_unit(Settings(), MESHNET, '/srv/50%/a "b" $c\\d.toml')
    assert r'proxy --config "/srv/50%%/a \"b\" $$c\\d.toml"' in text


@pytest.mark.parametrize("render", [sidecar_unit, rules_unit])
def test_systemd_takes_the_unit_and_finds_it_hardened(render: object, tmp_path: Path) -> None:
    assert callable(render)
    unit = tmp_path / "meshnet-tested.service"
    unit.write_text(render(Settings(), MESHNET, None))
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", unit],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Unknown" not in done.stderr, done.stderr
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None
    assert float(found[1]) <= 2.0, done.stdout


@pytest.mark.parametrize(
    ("job", "system", "removes"),
    [
        ("stop", "running", True),
        ("stop", "degraded", True),
        ("stop", "stopping", False),  # the machine goes down: nothing is to go out in plain text meanwhile
        ("restart", "running", False),
        ("start", "running", False),  # it could not be put in
        ("", "running", False),  # it died
    ],
)
def test_only_a_stop_for_good_takes_the_rules_out(job: str, system: str, removes: bool) -> None:
    assert removes_rules(job, system) is removes
