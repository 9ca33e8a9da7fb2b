"""`meshnet set` and `meshnet get` on a host, up and not."""

import json
import stat
from pathlib import Path

import pytest

from tests.cli.machine import Machine

pytestmark = pytest.mark.netns


def change(machine: Machine, *arguments: str, code: int = 0) -> str:
    done = machine.meshnet("set", "--config", str(machine.config), *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def shown(machine: Machine, *arguments: str) -> str:
    done = machine.meshnet("get", "--config", str(machine.config), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rules_in_force_change_at_once_and_the_sidecar_stays(machine: Machine) -> None:
    pid = machine.up().pid
    assert "✓ " in change(machine, "capture.exclude_inbound_ports=22,8000-8100")
    assert "dport 8000-8100" in machine.rules()
    assert machine.meshnet("rules", "verify").returncode == 0
    change(machine, "--unset", "capture.exclude_inbound_ports")
    assert "8000-8100" not in machine.rules()
    assert machine.status().pid == pid


def test_what_a_new_sidecar_reads_is_told_with_what_to_type(machine: Machine) -> None:
    machine.up()
    rules = machine.rules()
    assert "when it starts again: sudo meshnet down && sudo meshnet up\n" in change(machine, "log.level=debug")
    said = change(machine, "proxy.outbound_port=15102")
    assert "the rules stay as they are until then" in said
    assert machine.rules() == rules
    assert machine.meshnet("down").returncode == 0
    assert machine.up().listeners["outbound"].startswith("127.0.0.1:15102")


def test_readiness_is_asked_for_at_a_port_where_a_new_sidecar_answers(machine: Machine) -> None:
    machine.up()
    rules = machine.rules()
    assert "the rules stay as they are until then" in change(machine, "capture.readiness_port=15124")
    assert machine.rules() == rules
    assert "readiness is asked for at port 15124" in machine.meshnet("up").stderr
    assert machine.meshnet("down").returncode == 0
    machine.up()
    assert "dport 15124" in machine.rules()
    assert "the sidecar reads it when it starts again" in change(machine, "--unset", "capture.readiness_port")
    assert "dport 15124" not in machine.rules()  # it is captured as any port is


def test_a_port_where_somebody_listens_is_not_taken_for_readiness(machine: Machine) -> None:
    before = machine.files()
    with machine.host.open_socket() as database:
        database.bind(("0.0.0.0", 5432))
        database.listen()
        assert "somebody listens at port 5432" in change(machine, "capture.readiness_port=5432", code=1)
        assert machine.files() == before
        machine.configure("[capture]\nreadiness_port = 5432\n")
        assert "somebody listens at port 5432" in machine.meshnet("up").stderr
        assert "somebody listens at port 5432" in machine.meshnet("init", "--config", str(machine.config)).stderr
    assert machine.up().ready


def test_nothing_is_up_and_the_next_up_has_it(machine: Machine) -> None:
    before = machine.rules()
    assert "with the next `meshnet up`" in change(machine, "capture.exclude_outbound_ports=25")
    assert machine.rules() == before
    machine.up()
    assert "dport 25" in machine.rules()


def test_the_file_keeps_its_rights_and_a_new_one_is_taken_away_by_purge(machine: Machine) -> None:
    machine.config.chmod(0o640)
    change(machine, "log.level=debug")
    assert stat.S_IMODE(machine.config.stat().st_mode) == 0o640
    fresh = machine.home / "etc" / "meshnet.toml"
    done = machine.meshnet("set", "--config", str(fresh), "log.level=debug")
    assert done.returncode == 78, "a file that was named has to be there"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("log.levle=debug",), 78, 'did you mean "log.level"?'),
        (("log.level=loud",), 78, '"loud" is not one of'),
        (("proxy.outbound_port=15106",), 78, "already"),
        (("log.level",), 2, "is not KEY=VALUE"),
        ((), 2, "nothing to change"),
    ],
)
def test_what_is_wrong_is_refused_and_the_file_is_as_it_was(
    machine: Machine, arguments: tuple[str, ...], code: int, says: str
) -> None:
    before = machine.files()
    assert says in change(machine, *arguments, code=code)
    assert machine.files() == before


def test_a_dry_run_shows_the_lines_that_change(machine: Machine) -> None:
    before = machine.files()
    assert '+level = "debug"' in change(machine, "log.level=debug", "--dry-run")
    assert machine.files() == before
    assert change(machine, "--unset", "log.level") == "nothing changed\n"


def test_a_full_disk_leaves_the_old_file(machine: Machine) -> None:
    script = (
        'mount -t tmpfs -o size=16k tmpfs "$0" && cp "$1" "$0/meshnet.toml" && { head -c 1m /dev/zero >"$0/filler"; '
        'shift 1; "$@" --config "$0/meshnet.toml"; code=$?; cat "$0/meshnet.toml"; exit $code; }'
    )
    folder = machine.home / "small"
    folder.mkdir()
    by = ("unshare", "--mount", "sh", "-c", script, str(folder), str(machine.config))
    done = machine.meshnet("set", "log.level=debug", by=by)
    assert done.returncode == 1, done.stdout
    assert f"error: cannot write {folder}/meshnet.toml; it is as it was\nwhy: No space left on device\n" in done.stderr
    assert done.stdout == machine.config.read_text()


def test_get_says_where_each_comes_from(machine: Machine) -> None:
    assert shown(machine, "capture.exclude_inbound_ports") == "22\n"
    change(machine, "capture.exclude_inbound_ports=22,80", "log.level=debug")
    assert shown(machine, "capture.exclude_inbound_ports") == "22,80\n"
    items = {item["name"]: item for item in json.loads(shown(machine, "-o", "json"))["items"]}
    line = machine.config.read_text().splitlines().index('level = "debug"') + 1
    assert items["log.level"] == {
        "name": "log.level",
        "value": "debug",
        "origin": "file",
        "place": f"{machine.config}:{line}",
    }
    assert (items["proxy.mark"]["origin"], items["proxy.mark"]["value"]) == ("default", 4096)
    assert "log.access" in shown(machine, "log")
    done = machine.meshnet("get", "--config", str(machine.config), "log.levle")
    assert done.returncode == 78
    assert 'did you mean "log.level"?' in done.stderr


def test_a_variable_that_beats_the_file_is_told(machine: Machine) -> None:
    done = machine.meshnet(
        "set", "--config", str(machine.config), "log.level=info", by=("env", "MESHNET_LOG__LEVEL=debug")
    )
    assert done.returncode == 0
    assert "log.level is also set by the variable MESHNET_LOG__LEVEL, which beats the file" in done.stderr
    assert Path(machine.config).read_text().endswith('level = "info"\n')
