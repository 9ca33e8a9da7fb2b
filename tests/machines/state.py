"""What a machine is like as far as meshnet goes: its units, its rules, and all that may be left of it."""

import re
import time
from pathlib import Path

from tests.machines.machine import Failed, Machine, wait_for

_LEFTOVERS = Path(__file__).with_name("leftovers.sh").read_text()
# Built-in chains of the older tables stay until the kernel goes, with their counters.
_LEGACY = (
    "for it in iptables ip6tables; do ! command -v $it-legacy-save >/dev/null ||"
    " $it-legacy-save | grep -e ^-A -e ^:MESHNET; done; true"
)


_VISITOR = "mnproof"  # the link that a keeper's proof lays and takes away, with routes and settings of its own
_VISIT = 30  # seconds that a proof takes at the most


def leftovers(machine: Machine) -> str:
    """As it is between two proofs of the keeper, of which one may be under way at any moment."""
    deadline = time.monotonic() + _VISIT
    while _VISITOR in (found := machine.run("sh -s", stdin=_LEFTOVERS)) and time.monotonic() < deadline:
        continue
    return found


def need_same(machine: Machine, before: str) -> None:
    if differences := _differences(machine, before):
        raise Failed(f"{machine.name} is not as it was:\n{differences}")


def need_same_soon(machine: Machine, before: str) -> None:
    try:
        wait_for(lambda: _differences(machine, before) == "", "as before", timeout=30)
    except Failed:
        need_same(machine, before)


def journal(machine: Machine) -> str:
    try:
        return machine.run("journalctl -n 60 --no-pager -o short-monotonic -u 'meshnet*'", code=None)
    except OSError as error:
        return str(error)


def wait_for_capture(machine: Machine) -> None:
    wait_for(lambda: units(machine) == "active active" and captures(machine), f"capture on {machine.name}")
    machine.run("meshnet wait && meshnet rules verify")


def _differences(machine: Machine, before: str) -> str:
    was, now = set(before.splitlines()), set(leftovers(machine).splitlines())
    return "\n".join([f"- {line}" for line in sorted(was - now)] + [f"+ {line}" for line in sorted(now - was)])


def sidecar(machine: Machine) -> int:
    return int(machine.run("systemctl show -p MainPID --value meshnet"))


def units(machine: Machine) -> str:
    return " ".join(machine.run("systemctl is-active meshnet meshnet-rules", code=None).split())


def rules(machine: Machine) -> str:
    """With handles, and without counters: the same text is the same rules, untouched."""
    return machine.run(f"nft -a -s list ruleset 2>/dev/null; {_LEGACY}")


def rule_lines(machine: Machine) -> str:
    """The same text is the same rules, be they put in anew."""
    return machine.run(f"nft -s list ruleset 2>/dev/null; {_LEGACY}")


def legacy_rules(machine: Machine) -> str:
    return machine.run(_LEGACY)


def captures(machine: Machine) -> bool:
    text = rules(machine)
    return "redirect to :15101" in text or "--to-ports 15101" in text


def opened(machine: Machine) -> int:
    found = re.search(r"(\d+) opened", machine.run("meshnet status"))
    assert found is not None
    return int(found[1])
