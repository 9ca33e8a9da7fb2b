"""What `meshnet check` says of the units, where the host's first process has booted by systemd and its files are here.

systemctl is the real one and works on those files, as it does for a host that it cannot ask (SYSTEMD_OFFLINE).
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.machine import Machine

pytestmark = pytest.mark.netns

_BOOTED = """
mkdir -p /run/systemd/system
[ -d "$1.etc" ] || cp -a /etc "$1.etc"
mount --bind "$1.etc" /etc
getent group meshnet >/dev/null || groupadd --system meshnet
mount --bind "$1" /etc/systemd/system
shift
exec "$@"
"""
_INSTALL = """
import sys
from pathlib import Path
from meshnet_cli.configuration import read_settings
from meshnet_cli.vm.ledger import Ledger
from meshnet_cli.vm.systemd import Service
print(*Service(read_settings(sys.argv[1]), sys.argv[1]).install(Ledger(Path(sys.argv[2]))))
"""


class Booted:
    """A machine of which systemd is the first process, as far as files can show it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.units = machine.home / "units"
        self.units.mkdir()
        self._by = (
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--mount-proc",
            "sh",
            "-ec",
            _BOOTED,
            "sh",
            str(self.units),
        )

    def install(self) -> list[str]:
        """The units that were written."""
        return self.run(sys.executable, "-c", _INSTALL, self.machine.config, self.machine.home / "state").split()

    def run(self, *command: str | Path) -> str:
        return self.machine.host.run(*self._by, *command, SYSTEMD_OFFLINE="1", **self.machine.environment).stdout

    def found(self) -> dict[str, Any]:
        environment = self.machine.environment | {"SYSTEMD_OFFLINE": "1"}
        line = (sys.executable, "-m", "meshnet_cli.main", "check", "--config", self.machine.config, "-o", "json")
        done = self.machine.host.run(*self._by, *line, check=False, **environment)
        (found,) = (it for it in json.loads(done.stdout)["items"] if it["code"] == "service.units")
        return dict(found)


@pytest.fixture
def booted(machine: Machine) -> Booted:
    return Booted(machine)


def test_without_systemd_and_without_units_all_is_well(machine: Machine, booted: Booted) -> None:
    done = machine.meshnet("check", "--config", str(machine.config), "-o", "json")
    (found,) = (it for it in json.loads(done.stdout)["items"] if it["code"] == "service.units")
    assert (found["level"], "no systemd runs this host" in found["what"]) == ("ok", True)
    assert (booted.found()["level"], booted.found()["what"]) == ("ok", "not installed yet")


def test_units_as_they_were_written_are_well(booted: Booted) -> None:
    assert booted.install() == ["meshnet.service", "meshnet-rules.service"]
    found = booted.found()
    assert (found["level"], found["what"]) == ("ok", "the units are as these settings want them")


def of_other_settings(booted: Booted) -> None:
    booted.machine.configure("[proxy]\ndrain_timeout = '77s'\n")


def of_settings_for_the_rules(booted: Booted) -> None:
    booted.machine.configure("[capture]\noriginal_source = true\n")


def of_an_older_version(booted: Booted) -> None:
    for unit in booted.units.glob("*.service"):
        unit.write_text(unit.read_text().replace("RestartSec=1", "RestartSec=5"))


def without_one(booted: Booted) -> None:
    (booted.units / "meshnet-rules.service").unlink()


@pytest.mark.parametrize(
    ("change", "which"),
    [
        (of_other_settings, "meshnet.service"),
        (of_settings_for_the_rules, "meshnet-rules.service"),
        (of_an_older_version, "meshnet.service, meshnet-rules.service"),
        (without_one, "meshnet-rules.service"),
    ],
)
def test_units_that_are_not_of_these_settings_are_named_and_what_mends_it(
    booted: Booted, change: Callable[[Booted], None], which: str
) -> None:
    booted.install()
    change(booted)
    found = booted.found()
    assert (found["level"], found["what"].partition(" is not as ")[0]) == ("warning", which)
    assert found["fix"] == "sudo meshnet up && sudo systemctl restart meshnet"
    assert booted.install() == which.split(", ")
    assert booted.found()["level"] == "ok"


def test_what_runs_and_would_not_be_there_after_a_reboot_is_a_warning(machine: Machine, booted: Booted) -> None:
    booted.install()
    machine.up()
    found = booted.found()
    assert (found["level"], found["what"]) == ("warning", "it is up, but will not be after a reboot")
    assert (found["why"], found["fix"]) == ("its units are not enabled", "sudo meshnet up")
    booted.run("systemctl", "enable", "meshnet.service")
    assert booted.found()["level"] == "warning", "the rules would not be there"
    booted.run("systemctl", "enable", "meshnet-rules.service")
    assert booted.found()["level"] == "ok"
    booted.run("systemctl", "disable", "meshnet.service")
    assert booted.found()["level"] == "warning"
