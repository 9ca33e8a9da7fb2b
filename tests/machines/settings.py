"""`meshnet set` on a machine that is in the mesh: what it changes, and the way back where it does not reach its end."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

from tests.machines import state
from tests.machines.machine import Failed, Machine, wait_for

_MORE_PORTS = "meshnet set capture.exclude_inbound_ports=22,8000-8100"
_FILE = "/etc/meshnet/meshnet.toml"
_BY_HAND = '[capture]\nexclude_inbound_ports = ["22", "9000"]\n'
_ROLLED_BACK = 7


def change(machine: Machine) -> None:
    machine.run("meshnet set capture.exclude_inbound_ports=22,8000-8100")
    if "8000-8100" not in state.rules(machine):
        raise Failed(f"{machine.name}: the rules do not know of it:\n{state.rules(machine)}")
    rules = state.rules(machine)
    said = machine.run("meshnet set capture.exclude_inbound_ports=80", code=1)
    if "port 22" not in said or "--accept-risk=lose-ssh" not in said or state.rules(machine) != rules:
        raise Failed(f"{machine.name}: {said}")
    machine.run("meshnet set --unset capture.exclude_inbound_ports")
    if "8000-8100" in state.rules(machine):
        raise Failed(f"{machine.name}: the rules still know of it:\n{state.rules(machine)}")
    state.wait_for_capture(machine)


def two_workers(machine: Machine) -> None:
    """As `set` says: written, then `up` and a restart."""
    said = machine.run("meshnet set proxy.workers=2")
    if "sudo meshnet up && sudo systemctl restart meshnet" not in said:
        raise Failed(f"{machine.name}: {said}")
    machine.run("meshnet up && systemctl restart meshnet && meshnet wait")
    status = json.loads(machine.run("meshnet status -o json"))
    if [worker["ready"] for worker in status["workers"]] != [True, True]:
        raise Failed(f"{machine.name}: {status}")
    state.wait_for_capture(machine)


def one_worker(machine: Machine) -> None:
    machine.run("meshnet set --unset proxy.workers && systemctl restart meshnet && meshnet wait")
    state.wait_for_capture(machine)


@contextmanager
def by_legacy(machine: Machine) -> Iterator[None]:
    """The rules go over to the older tables, and back at the end."""
    before = state.rule_lines(machine)
    machine.run("meshnet set capture.backend=legacy && meshnet up")
    state.wait_for_capture(machine)
    if state.rule_lines(machine) != state.legacy_rules(machine):
        raise Failed(f"{machine.name}: rules of its own are elsewhere as well: {state.rule_lines(machine)}")
    yield
    machine.run(f"meshnet set capture.backend={machine.backend} && meshnet up")
    _need_rules(machine, before)


@contextmanager
def in_clients_names(machine: Machine) -> Iterator[None]:
    """What comes in comes by TPROXY, and goes on from the client's address; at the end by a redirect again."""
    before = state.rule_lines(machine)
    said = machine.run("meshnet set capture.inbound_mode=tproxy capture.original_source=true")
    if "they would not fit the sidecar that runs" not in said:
        raise Failed(f"{machine.name}: {said}")
    machine.run("meshnet down && meshnet up")
    state.wait_for_capture(machine)
    if not re.search(r"tproxy (ip6? )?to :15106", state.rules(machine)) or len(_routing(machine)) != 2:
        raise Failed(f"{machine.name}: no TPROXY, or no routes: {state.rules(machine)}{_routing(machine)}")
    yield
    machine.run("meshnet set --unset capture.inbound_mode --unset capture.original_source")
    machine.run("meshnet down && meshnet up")
    _need_rules(machine, before)
    if _routing(machine):
        raise Failed(f"{machine.name}: routes are left: {_routing(machine)}")


def restart_networkd(machine: Machine) -> None:
    """It takes out the routing rules of others. Ours are there again before the keeper's next look by the clock."""
    before, repairs = _routing(machine), _repairs(machine)
    machine.run("systemctl restart systemd-networkd")
    wait_for(lambda: _repairs(machine) > repairs, f"a repair on {machine.name}", timeout=10)
    if _routing(machine) != before:
        raise Failed(f"{machine.name}: {_routing(machine)}")


def _routing(machine: Machine) -> list[str]:
    return [line for line in machine.run("ip rule; ip -6 rule").splitlines() if "6700" in line]


def _repairs(machine: Machine) -> int:
    return int(json.loads(machine.run("meshnet status -o json"))["capture"]["keeper"]["repairs"])


def _need_rules(machine: Machine, before: str) -> None:
    state.wait_for_capture(machine)
    if state.rule_lines(machine) != before:
        raise Failed(f"{machine.name}: its rules are not those of before: {state.rule_lines(machine)}")


def fail_proof(machine: Machine) -> None:
    before = state.leftovers(machine)
    with _wall(machine, "type nat hook output priority -150; tcp dport 15122 redirect to :9;"):
        said = machine.run(_MORE_PORTS, code=_ROLLED_BACK)
    if "put back: rules and file are as they were" not in said:
        raise Failed(f"{machine.name}: {said}")
    state.need_same(machine, before)
    _wait_for_keeper(machine)


def fail_up(machine: Machine) -> None:
    """Beside settings changed by hand: the rules are those of before, and no keeper puts in what has failed."""
    before, kept = state.rule_lines(machine), f"{_FILE}.kept"
    machine.run(f"[ ! -e {_FILE} ] || mv {_FILE} {kept}; cat >{_FILE}", stdin=_BY_HAND)
    with _wall(machine, "type nat hook output priority -150; tcp dport 15122 redirect to :9;"):
        said = machine.run("meshnet up", code=_ROLLED_BACK)
    if "it stays: meshnet-rules.service stopped" not in said or state.rule_lines(machine) != before:
        raise Failed(f"{machine.name}: {said}")
    machine.run(f"rm {_FILE}; [ ! -e {kept} ] || mv {kept} {_FILE}; meshnet up")
    _wait_for_keeper(machine)


def kill_amid_proof(machine: Machine) -> None:
    """Its dead-man switch puts back what it has changed: rules, file, and the keeper's settings."""
    before = state.leftovers(machine)
    with _wall(machine, "type filter hook input priority 0; meta l4proto tcp ct original proto-dst 15122 drop;"):
        change = machine.start(f"exec {_MORE_PORTS}")
        wait_for(lambda: "8000-8100" in state.rules(machine), "the rules of the new settings")
        machine.run("pkill -9 -f 'bin/meshnet [s]et'")
        said, _ = change.communicate(timeout=10)
    if change.returncode == 0 or "in force" in said:
        raise Failed(f"{machine.name}: it had reached its end: {said}")
    state.need_same_soon(machine, before)
    if "is gone before its end" not in machine.run("journalctl -b -o cat -u 'meshnet-deadman-*'"):
        raise Failed(f"{machine.name}: it was not the dead-man switch:\n{state.journal(machine)}")
    machine.run("meshnet rules verify")
    _wait_for_keeper(machine)
    machine.run("nft flush ruleset")  # its settings are those of the file again
    state.need_same_soon(machine, before)


@contextmanager
def _wall(machine: Machine, chain: str) -> Iterator[None]:
    """Somebody's rules, for as long as this lasts, in the way of canaries that a person sends, and of no others."""
    machine.run(f"nft 'table inet wall {{ chain c {{ {chain} }}; }}'")
    yield
    machine.run("nft delete table inet wall")


def _wait_for_keeper(machine: Machine) -> None:
    status = "systemctl show -p StatusText --value meshnet-rules"
    wait_for(lambda: machine.run(status).startswith("keeping"), "a keeper that keeps")
