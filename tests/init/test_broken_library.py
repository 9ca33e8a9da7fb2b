"""python-iptables that is installed and does not work: nobody needs it, and who asks for it hears why."""

import importlib.util
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from meshnet.errors import CommandError
from meshnet_init.backends import iptables_binaries
from meshnet_init.backends.python_iptables import why_it_does_not_work
from meshnet_init.choose import choose
from meshnet_init.rule import Plan
from tests.init.kernel import legacy_rules
from tests.world import Host, World

pytestmark = pytest.mark.netns

_DOES_NOT_WORK = "python-iptables does not work: iptc.errors.XTablesError: can't find directory with extensions"


def without_libraries(host: Host, *command: str, programs: bool = True) -> CompletedProcess[str]:
    """Where ldconfig names no folder python-iptables finds no extensions. `programs`: there is an iptables-legacy."""
    hidden = {"/bin/true": "/sbin/ldconfig"}
    if not programs:
        legacy = shutil.which("iptables-legacy", path="/usr/sbin:/sbin")
        assert legacy is not None
        (nothing := host.directory / "nothing").touch()
        hidden[str(nothing)] = str(Path(legacy).resolve())
    binds = " && ".join(f"mount --bind {source} {target}" for source, target in hidden.items())
    return host.run("unshare", "--mount", "sh", "-c", f'{binds} && exec "$@"', "sh", *command, check=False)


@pytest.fixture
def host(world: World) -> Host:
    """One with an empty legacy table."""
    host = world.host("app")
    host.run("iptables-legacy", "-t", "nat", "-S")
    return host


def test_its_programs_take_its_place(host: Host) -> None:
    for backend in ("nft", "legacy"):
        done = without_libraries(host, "meshnet", "init", "--backend", backend, "--verify")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"in force ({backend})" in done.stdout
        done = without_libraries(host, "meshnet", "rules", "verify")
        assert (done.returncode, done.stderr) == (0, "")
    assert "MESHNET_OUT" in legacy_rules(host, "ip")
    done = without_libraries(host, "meshnet", "init", "remove")
    assert (done.stdout, done.stderr) == ("rules removed (legacy)\n", "")


def test_where_there_are_none_its_tables_are_left_aside_and_it_is_told(host: Host) -> None:
    def run(*command: str) -> tuple[int, str]:
        done = without_libraries(host, *command, programs=False)
        return done.returncode, done.stdout + done.stderr

    told = f"no iptables-legacy is installed, and {_DOES_NOT_WORK}"
    code, said = run("meshnet", "init", "--backend", "legacy")
    assert code == 1
    assert said.startswith(f"error: backend legacy cannot be used here\nwhy: {told}")
    assert "\nfix: apt-get install iptables; or leave the choice" in said
    for backend in ("nft", "auto"):
        code, said = run("meshnet", "init", "--backend", backend)
        assert (code, said.count("in force"), said.count(told)) == (0, 1, 1), said
        assert "warning: rules in the legacy tables (ip nat) may stand ahead of these: no iptables-legacy" in said
        assert "(apt-get install iptables)" in said
    code, said = run("meshnet", "init", "remove")
    assert (code, "rules removed (nft)" in said) == (0, True), said
    assert "warning: rules may be left in the legacy tables (ip nat): no iptables-legacy" in said


def test_one_that_loads_and_knows_no_options_does_not_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As python-iptables 1.2.0 beside iptables 1.8.11, of Debian 13; here beside a libxtables without extensions."""
    ask = why_it_does_not_work.__wrapped__
    assert ask() == ""
    monkeypatch.setenv("XTABLES_LIBDIR", str(tmp_path))
    assert "addrtype" in ask()


def test_where_it_is_not_installed_the_line_to_type_is_for_the_python_that_runs_meshnet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed = importlib.util.find_spec("iptc")
    assert installed is not None
    assert installed.origin is not None
    monkeypatch.setitem(sys.modules, "iptc", None)
    monkeypatch.setattr(iptables_binaries, "_PATH", str(tmp_path))
    with pytest.raises(CommandError) as caught:
        choose("legacy", Plan(rules=()))
    assert caught.value.why == "neither iptables-legacy nor python-iptables is installed"
    debian, line, _ = caught.value.fix.split("; or ")
    assert debian == "apt-get install iptables"
    words = shlex.split(line.rpartition(": ")[2])
    done = subprocess.run([*words, "--dry-run", "--no-index"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert f"already satisfied: python-iptables in {Path(installed.origin).parents[1]}" in done.stdout
