"""`meshnet rules verify` and `meshnet init --verify` where a sidecar runs, whose settings are changed under it."""

import json
import re

import click
import pytest

from meshnet_cli.main import ENTRIES
from meshnet_cli.rules import command
from tests.cli.machine import OWN_RULES, Machine
from tests.world import wait_for

pytestmark = pytest.mark.netns


def test_the_list_of_commands_names_each_part_of_this_one() -> None:
    assert isinstance(command, click.Group)
    assert set(command.commands) == {"plan", "show", "verify", "keep"}
    for name in command.commands:
        assert name in ENTRIES["rules"].help


def test_a_sidecar_that_fits_is_told(machine: Machine) -> None:
    status = machine.up()
    assert (status.mark, status.gid is None) == (0x1000, False)
    done = machine.meshnet("rules", "verify")
    assert done.returncode == 0, done.stdout
    assert f"sidecar: pid {status.pid}, which the rules fit\n" in done.stdout
    assert "the proxy answered" in done.stdout
    assert "fix" not in done.stdout
    told = json.loads(machine.meshnet("rules", "verify", "-o", "json").stdout)
    assert (told["apiVersion"], told["kind"], told["sidecar"]) == ("meshnet.dev/v1", "Verification", "fits")
    assert [canary["byUs"] for canary in told["canaries"]] == [False, False]


def test_where_there_are_no_rules_there_is_no_table_of_what_they_caught(machine: Machine) -> None:
    done = machine.meshnet("rules", "verify")
    assert done.returncode == 1
    assert "! no rules are installed\n" in done.stdout
    assert "CANARY" not in done.stdout


@pytest.mark.parametrize("words", ["init", "init remove"])
def test_init_without_the_right_to_says_what_to_type(machine: Machine, words: str) -> None:
    done = machine.meshnet(*words.split(), by=("setpriv", "--bounding-set=-net_admin", "--"))
    assert done.returncode == 5
    assert done.stderr.endswith(f"fix: sudo meshnet {words}\n")


@pytest.mark.parametrize(
    ("arguments", "table"),
    [
        (["--backend", "iptables"], "*nat"),
        (["--backend", "iptables", "--format", "nft"], "table inet"),
        (["--backend", "nft"], "table inet"),
        ([], "table inet"),
    ],
)
def test_a_dry_run_prints_for_the_backend_that_was_asked_for(
    machine: Machine, arguments: list[str], table: str
) -> None:
    done = machine.meshnet("init", "--dry-run", *arguments)
    assert [each for each in ("*nat", "table inet") if each in done.stdout] == [table]
    told = "as nft would take them; sudo meshnet check tells which backend auto takes here\n"
    assert done.stderr == ("" if arguments else told)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("outbound_port = 16101", "! the rules turn outbound connections to port 16101, the sidecar takes them at 127"),
        ("inbound_port = 16106", "! the rules turn inbound connections to port 16106, the sidecar takes them at 0.0.0"),
        (
            "tunnel_port = 16108",
            "! the rules capture what comes in for port 15108, which is the sidecar's own (tunnel)",
        ),
        (
            "mark = 0x2000",
            "! the rules let connections with mark 0x2000 pass, but the sidecar marks its own connections",
        ),
    ],
)
def test_rules_that_do_not_fit_the_sidecar_are_no_capture(machine: Machine, setting: str, told: str) -> None:
    pid = machine.up().pid
    machine.configure(f"[proxy]\n{setting}\n")
    assert machine.meshnet("init", "--config", str(machine.config)).returncode == 0
    done = machine.meshnet("rules", "verify")
    assert done.returncode == 1
    assert "rules (nft): as planned\n" in done.stdout
    assert f"sidecar: pid {pid}, which the rules do not fit\n" in done.stdout
    assert told in done.stdout
    assert done.stdout.endswith(
        "fix: start the sidecar again with these settings: sudo meshnet down && sudo meshnet up\n"
    )
    result = json.loads(machine.meshnet("rules", "verify", "-o", "json").stdout)
    assert (result["ok"], result["sidecar"], len(result["misfits"])) == (False, "differs", 1)


def test_what_is_to_be_typed_mends_it(machine: Machine) -> None:
    pid = machine.up().pid
    machine.configure("[proxy]\noutbound_port = 16101\nmark = 0x2000\n")
    assert machine.meshnet("rules", "verify").returncode == 1
    assert machine.meshnet("down").returncode == 0
    assert machine.up().pid != pid
    done = machine.meshnet("rules", "verify")
    assert done.returncode == 0, done.stdout


def test_init_verify_does_not_put_in_rules_that_the_running_sidecar_does_not_fit(machine: Machine) -> None:
    machine.up()
    rules = machine.rules()
    done = machine.meshnet("init", "--config", str(machine.config), "--verify", "--outbound-port", "16101")
    assert done.returncode == 1
    assert "none was changed" in done.stderr
    assert "port 16101" in done.stderr
    assert "fix: start it again with these settings: sudo meshnet down && sudo meshnet up\n" in done.stderr
    assert machine.rules() == rules
    assert machine.meshnet("init", "--config", str(machine.config), "--verify").returncode == 0


def test_down_and_up_and_the_keeper_that_up_has_started(machine: Machine) -> None:
    machine.configure("[capture]\nproof_interval = '500ms'\nrequired = true\n")
    machine.up()  # which does not wait for what it is about to bring
    wait_for(machine.ready)

    def state() -> str:
        capture = machine.status().capture
        return capture.keeper.state if capture is not None and capture.keeper is not None else ""

    wait_for(lambda: state() == "keeping")
    other = machine.start("rules", "keep")
    wait_for(lambda: not other.alive)
    assert "another keeper looks after the rules" in other.output
    assert machine.meshnet("down").returncode == 0
    log = machine.log
    assert "told to stand down" in log.read_text()
    assert "table inet meshnet" not in machine.rules()
    assert machine.keepers() == []
    machine.up()
    wait_for(lambda: state() == "keeping")
    machine.host.run("nft", "delete", "table", "inet", "meshnet")
    wait_for(lambda: "rules repaired, nft (pid " in log.read_text())
    assert "table inet meshnet" in machine.rules()
    assert machine.meshnet("rules", "verify").returncode == 0


def test_up_with_strict_has_a_guard_that_no_flush_reaches_and_down_leaves_nothing(machine: Machine) -> None:
    machine.configure("[capture]\nstrict = true\n")
    before = machine.rules()
    for _ in range(2):
        machine.up()
        wait_for(lambda: "table inet meshnet_keeper" in machine.rules())
    machine.host.run("nft", "flush", "ruleset")
    machine.host.run("nft", "-f", "-", stdin=OWN_RULES)
    wait_for(lambda: "table inet meshnet {" in machine.rules(), what="a repair")
    shown = machine.meshnet("rules", "show").stdout
    assert "backend nft\n" in shown
    assert "backend keeper: the same once more, where no flush reaches them\n" in shown
    verified = machine.meshnet("rules", "verify")
    assert verified.returncode == 0, verified.stdout
    assert machine.meshnet("down").returncode == 0
    assert listed(machine.rules()) == listed(before)


def listed(rules: str) -> str:
    """Without the handles: somebody has made the tables anew."""
    return re.sub(r" # handle \d+", "", rules)
