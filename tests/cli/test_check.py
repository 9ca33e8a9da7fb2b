"""`meshnet check` on hosts that are well, and on hosts where one thing is not."""

import json
import os
import re
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from meshnet.control.authority import Authority, save_issued
from meshnet.model.capture import StandDown
from meshnet.net.keeper import tell_keeper
from meshnet_cli.vm.host import kernel
from tests.cli.machine import Machine
from tests.cli.sidecar import ROOT
from tests.cli.vm.test_ssh import SSHD
from tests.lesser_kernel import lacking
from tests.world import wait_for

pytestmark = pytest.mark.netns

# Of the machine the tests run on, whatever it is.
_OF_THE_MACHINE = {"clock.synchronised", "conntrack.room", "descriptors.limit", "relay.native"}


def looked_at(machine: Machine, *arguments: str, code: int = 0) -> dict[str, dict[str, Any]]:
    done = machine.meshnet("check", "--config", str(machine.config), "-o", "json", *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["kind"], found["ok"]) == ("Findings", code != 1)
    return {item["code"]: item for item in found["items"]}


def told(machine: Machine, code: str, by: tuple[str, ...] = ()) -> dict[str, Any]:
    """One finding, of a command that was started through `by`."""
    done = machine.meshnet("check", "--config", str(machine.config), "-o", "json", by=by)
    (found,) = (item for item in json.loads(done.stdout)["items"] if item["code"] == code)
    assert done.returncode == 1 or found["level"] != "error"
    return dict(found)


def until_error(machine: Machine, code: str, timeout: float = 20.0) -> dict[str, Any]:
    return wait_for(
        lambda: found if (found := told(machine, code))["level"] == "error" else None, timeout=timeout, what=code
    )


def wrong(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {
        code: item["level"] for code, item in found.items() if item["level"] != "ok" and code not in _OF_THE_MACHINE
    }


def test_a_fresh_host_lacks_a_certificate_only_and_nothing_is_changed(machine: Machine) -> None:
    before = (machine.rules(), sorted(machine.home.rglob("*")))
    found = looked_at(machine)
    assert wrong(found) == {"identity.valid": "warning"}
    assert set(found) >= _OF_THE_MACHINE | {
        "rights.net_admin",
        "rules.backend",
        "ports.free",
        "group.free",
        "mesh.files",
    }
    assert (machine.rules(), sorted(machine.home.rglob("*"))) == before


def test_a_host_that_is_up_is_well(machine: Machine) -> None:
    machine.up()
    found = looked_at(machine)
    assert wrong(found) == {}
    assert {"sidecar.running", "sidecar.settings"} <= set(found)
    assert machine.meshnet("down").returncode == 0


def test_connect_is_held_once_a_sidecar_runs_that_was_told_so(machine: Machine) -> None:
    def connect() -> tuple[str, str, str]:
        found = told(machine, "connect.truthful")
        return found["level"], found["what"], found["why"]

    assert connect() == ("ok", "capture.truthful_connect is off", "")
    machine.up()
    machine.configure("[capture]\ntruthful_connect = true\n")
    # The rules are those of before as well: an error, by another code.
    assert connect()[0::2] == ("warning", "the sidecar was started without it")
    assert machine.meshnet("down").returncode == 0
    assert connect() == ("ok", "no sidecar runs that could hold connect()", "")
    machine.up()
    wait_for(lambda: (truthful := machine.status().truthful) is not None and truthful.in_force)
    assert connect()[0] == "ok"
    assert connect()[1].startswith("connect() is held")


def test_every_code_is_told(machine: Machine) -> None:
    told = set(re.findall(r"^\| `([a-z]+\.[a-z_]+)` \|", (ROOT / "docs/on-a-vm.md").read_text(), re.MULTILINE))
    codes = set(looked_at(machine))
    machine.up()
    assert codes | set(looked_at(machine)) == told


def test_another_mesh_is_an_error_and_dockers_rules_are_none(machine: Machine) -> None:
    machine.host.run("nft", "add table ip nat; add chain ip nat DOCKER")
    found = looked_at(machine)["rules.foreign"]
    assert (found["level"], "DOCKER" in found["what"]) == ("ok", True)
    machine.host.run("nft", "add chain ip nat ISTIO_OUTPUT")
    found = looked_at(machine, code=1)["rules.foreign"]
    assert (found["level"], "ISTIO_OUTPUT" in found["what"]) == ("error", True)


@pytest.mark.parametrize("backend", ["nft", "iptables", "legacy"])
def test_rules_without_a_sidecar_are_an_error_wherever_they_came_from(machine: Machine, backend: str) -> None:
    assert looked_at(machine)["rules.in_force"]["level"] == "ok"
    machine.host.run("meshnet", "init", "--config", machine.config, "--backend", backend)
    found = looked_at(machine, code=1)
    assert wrong(found) == {"rules.in_force": "error", "identity.valid": "warning"}
    assert f"rules are in force ({backend}), and no sidecar runs" == found["rules.in_force"]["what"]
    assert "sudo meshnet up; or take them out: sudo meshnet init remove" in found["rules.in_force"]["fix"]
    machine.host.run("meshnet", "init", "remove", "--drain", "0s")
    assert looked_at(machine)["rules.in_force"]["level"] == "ok"


def test_rules_that_are_not_those_of_the_sidecar_that_runs_are_an_error(machine: Machine) -> None:
    machine.configure("[capture]\nproof_interval = 'off'\n")
    machine.up()
    assert looked_at(machine)["rules.in_force"]["level"] == "ok"
    with machine.host.entered():
        assert tell_keeper(StandDown())
    machine.host.run("nft", "insert", "rule", "inet", "meshnet", "MESHNET_OUT", "tcp", "dport", "80", "return")
    found = looked_at(machine, code=1)["rules.in_force"]
    assert "tcp dport 80" in found["why"]
    machine.host.run("nft", "delete", "table", "inet", "meshnet")
    found = looked_at(machine, code=1)["rules.in_force"]
    assert (found["why"], found["fix"]) == ("nothing new is captured", "sudo meshnet up")


def test_rules_that_somebody_saved_come_back_at_boot(machine: Machine) -> None:
    """sshuttle#629: and then there is no sidecar that they would lead to."""
    machine.host.run("meshnet", "init", "--config", machine.config, "--backend", "iptables")
    saved = machine.host.run("iptables-save").stdout
    machine.host.run("meshnet", "init", "remove", "--drain", "0s")
    (machine.home / "rules.v4").write_text(saved)
    script = 'cp -a /etc "$0/etc" && mkdir -p "$0/etc/iptables" && cp "$0/rules.v4" "$0/etc/iptables/" &&'
    script += ' mount --bind "$0/etc" /etc && "$@"'
    by = ("unshare", "--mount", "sh", "-c", script, str(machine.home))
    done = machine.meshnet("check", "--config", str(machine.config), "-o", "json", by=by)
    found = {item["code"]: item for item in json.loads(done.stdout)["items"]}
    assert (done.returncode, found["rules.saved"]["level"]) == (0, "warning")
    assert found["rules.saved"]["what"] == "meshnet's rules are saved in /etc/iptables/rules.v4"
    assert found["rules.in_force"]["level"] == "ok"
    machine.host.run("iptables-restore", stdin=saved)  # what the next boot does
    assert looked_at(machine, code=1)["rules.in_force"]["level"] == "error"


def by_shell(script: str, *arguments: str) -> tuple[str, ...]:
    """What starts a command on a host whose files `script` has changed, for that command alone."""
    return ("unshare", "--mount", "sh", "-ec", f'{script}; shift {len(arguments)}; exec "$@"', "sh", *arguments)


FULL = "/proc/sys/net/netfilter/nf_conntrack_"


@pytest.mark.parametrize(
    ("by", "code", "what", "fix"),
    [
        (
            ("prlimit", "--nofile=4096:4096"),
            "descriptors.limit",
            "a process may have 4096 descriptors",
            "raise it: ulimit -Hn 65536, or /etc/security/limits.conf",
        ),
        (
            by_shell(
                f'echo 900 >"$1/n"; echo 1000 >"$1/m"; mount -B "$1/n" {FULL}count; mount -B "$1/m" {FULL}max', "."
            ),
            "conntrack.room",
            "900 of 1000 connections are tracked: the table is nearly full",
            "sysctl -w net.netfilter.nf_conntrack_max=2000",
        ),
    ],
)
def test_too_little_room_is_a_warning(machine: Machine, by: tuple[str, ...], code: str, what: str, fix: str) -> None:
    machine.host.run("nft", "add table inet t; add chain inet t c; add rule inet t c ct state new")  # they are tracked
    by = tuple(str(machine.home) if word == "." else word for word in by)
    found = told(machine, code, by)
    assert (found["level"], found["what"], found["fix"]) == ("warning", what, fix)


def test_an_older_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    this = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((this.sysname, this.nodename, "5.3.18-lp152", "", "")))
    found = kernel()
    assert (found.level, found.what) == ("error", "Linux 5.3.18-lp152 is older than 5.4")


def test_a_backend_whose_programs_are_missing_is_an_error_with_what_to_install(machine: Machine) -> None:
    machine.configure("[capture]\nbackend = 'iptables'\n")
    hidden = by_shell('for it in /sbin /usr/sbin; do mount -t tmpfs none "$(readlink -f $it)"; done')
    found = told(machine, "rules.backend", hidden)
    assert found["level"] == "error"
    assert "iptables" in found["what"] + found["why"]
    assert found["fix"]


def test_a_kind_of_rule_that_the_kernel_lacks_is_told_with_what_to_type(machine: Machine) -> None:
    def backend() -> str:
        return json.dumps(told(machine, "rules.backend"))

    machine.configure("[capture]\ninbound_mode = 'tproxy'\n")
    found = json.loads(lacking(["tproxy"], backend))
    assert (found["level"], found["what"].partition(":")[0]) == ("ok", "the kernel takes them by iptables")
    assert "nft was passed over: the kernel's nftables has no tproxy" in found["what"]
    machine.configure("[capture]\ninbound_mode = 'tproxy'\nbackend = 'nft'\n")
    found = json.loads(lacking(["tproxy"], backend))
    assert (found["level"], found["what"]) == ("error", "backend nft cannot be used here")
    assert found["fix"].startswith("modprobe nft_tproxy; or do without capture.inbound_mode; or ")


def test_another_program_with_the_sidecars_group_is_an_error(machine: Machine) -> None:
    other = machine.host.spawn("setpriv", "--regid=15137", "--clear-groups", "sleep", "60", name="other")
    found = until_error(machine, "group.free")
    assert str(other.pid) in found["what"] + found["why"]


def test_settings_that_do_not_fit_the_sidecar_and_a_way_in_that_would_be_lost_are_errors(machine: Machine) -> None:
    machine.up()
    machine.configure("[capture]\nexclude_inbound_ports = []\n[proxy]\nmark = 8192\n")
    machine.host.spawn(sys.executable, "-c", SSHD, name="sshd")
    assert "port 2222" in until_error(machine, "ssh.reachable")["what"]
    assert "do not fit the sidecar that runs here" in until_error(machine, "sidecar.settings")["what"]


def test_a_way_in_that_readiness_is_asked_for_by_is_an_error(machine: Machine) -> None:
    machine.configure("[capture]\nexclude_inbound_ports = ['2222']\nreadiness_port = 2222\n")
    machine.host.spawn(sys.executable, "-c", SSHD, name="sshd")
    found = until_error(machine, "ssh.reachable")
    assert "port 2222" in found["what"]
    assert found["fix"].startswith("sudo meshnet set capture.readiness_port=15124; or ")


def test_without_proofs_nobody_is_said_to_have_never_come(machine: Machine) -> None:
    machine.configure("[capture]\nreadiness_port = 15124\nproof_interval = 'off'\n")
    found = looked_at(machine)["capture.readiness"]
    assert found["what"] == "when readiness was last asked for is not kept: capture.proof_interval is off"


@pytest.mark.parametrize("is_up", [False, True])
def test_somebody_at_the_port_where_readiness_is_asked_for_is_an_error(machine: Machine, is_up: bool) -> None:
    if is_up:
        machine.up()
    machine.configure("[capture]\nreadiness_port = 5432\n")
    with machine.host.open_socket() as database:
        database.bind(("127.0.0.1", 5432))
        database.listen()
        assert looked_at(machine, code=int(is_up))["capture.readiness"]["level"] == "ok"
    with machine.host.open_socket() as database:
        database.bind(("0.0.0.0", 5432))
        database.listen()
        found = looked_at(machine, code=1)["capture.readiness"]
    assert found["what"] == "somebody listens at port 5432, which is capture.readiness_port"
    assert found["fix"].endswith("sudo meshnet set capture.readiness_port=15124")


def test_a_certificate_that_has_expired_is_an_error(machine: Machine) -> None:
    machine.up()
    held = machine.status().certificate
    authority = Authority.create("local", now=datetime.now(UTC))
    save_issued(authority.issue(held.identity, now=datetime.now(UTC), ttl=timedelta(seconds=10)), machine.identity)
    wait_for(lambda: machine.status().certificate.serial != held.serial, what="the short one")
    assert until_error(machine, "identity.expiry", timeout=40.0)["what"] == "it has expired"


def test_a_certificate_whose_time_is_still_to_come_is_an_error(machine: Machine) -> None:
    machine.up()
    held = machine.status().certificate
    authority = Authority.create("local", now=datetime.now(UTC))
    save_issued(authority.issue(held.identity, now=datetime.now(UTC) + timedelta(hours=1)), machine.identity)
    assert until_error(machine, "identity.expiry")["what"].startswith("the sidecar's certificate begins at 20")


def test_a_certificate_that_nobody_has_renewed(machine: Machine) -> None:
    then = datetime.now(UTC) - timedelta(minutes=50)
    authority = Authority.create("local", now=then)
    save_issued(authority.issue("spiffe://local/ns/default/sa/web", now=then, ttl=timedelta(hours=1)), machine.identity)
    machine.up()
    found = looked_at(machine)["identity.expiry"]
    assert found["level"] == "warning"
    assert "meshnet ca issue --identity spiffe://local/ns/default/sa/web" in found["fix"]


def test_a_disk_that_is_nearly_full(machine: Machine) -> None:
    small = machine.home / "small"
    small.mkdir()
    machine.config.write_text(machine.config.read_text().replace(f"{machine.home}/last-good", f"{small}/last-good"))
    script = 'mount -t tmpfs -o size=1m tmpfs "$0" && { head -c 2m /dev/zero >"$0/filler"; "$@"; }'
    by = ("unshare", "--mount", "sh", "-c", script, str(small))
    found = told(machine, "disk.room", by)
    assert (found["level"], found["fix"]) == ("warning", f"df -h {small}")


def test_warnings_count_where_it_was_asked_for(machine: Machine) -> None:
    looked_at(machine, "--fail-on", "warning", code=3)


def test_people_read_mark_code_cause_and_fix(machine: Machine) -> None:
    said = machine.meshnet("check", "--config", str(machine.config)).stdout
    assert "✓ ports.free" in said
    assert "! identity.valid" in said
    assert "fix: sudo meshnet up makes one" in said


def test_each_thing_that_stands_in_the_way_is_told_at_once(machine: Machine) -> None:
    machine.mesh.mkdir()
    (machine.mesh / "bad.yaml").write_text("kind: Nothing\n")
    then = datetime.now(UTC) - timedelta(days=2)
    authority = Authority.create("local", now=then)
    issued = authority.issue("spiffe://local/ns/default/sa/web", now=then, ttl=timedelta(hours=1))
    save_issued(issued, machine.identity)
    with machine.host.open_socket() as taken:
        taken.bind(("0.0.0.0", 15101))
        taken.listen()
        found = looked_at(machine, code=1)
    assert wrong(found) == {"ports.free": "error", "identity.valid": "error", "mesh.files": "error"}
    assert "15101" in found["ports.free"]["what"]
    assert found["ports.free"]["fix"].startswith("see who has it")
    assert "expired" in found["identity.valid"]["what"]
    assert "bad.yaml" in found["mesh.files"]["why"]


def test_without_rights_it_says_so(machine: Machine) -> None:
    done = machine.meshnet(
        "check", "--config", str(machine.config), "-o", "json", by=("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    )
    found = {item["code"]: item for item in json.loads(done.stdout)["items"]}
    assert done.returncode == 1
    assert found["rights.net_admin"]["fix"].startswith("sudo meshnet check --config ")
    for code in ("rules.foreign", "rules.guard", "rules.in_force"):
        assert (found[code]["level"], found[code]["fix"]) == ("warning", "sudo meshnet check")
