"""Three ways into the kernel behind one interface; tests/init/test_backends.py holds all to one contract.

A backend writes plans and reads rules. It knows nothing of settings, and never has to know what it wrote before.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Literal, Protocol

import msgspec

from meshnet.errors import CommandError
from meshnet_init.host import may_change_rules
from meshnet_init.render import nft_rule
from meshnet_init.rule import Plan, Routing, Rule, drain_set


class Counted(msgspec.Struct, frozen=True):
    """A rule in the kernel and how many connections it matched since it was written."""

    rule: Rule
    packets: int = 0
    bytes: int = 0


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel holds of ours. `problems` are what no plan of ours would put there, in words."""

    backend: str
    rules: tuple[Counted, ...]
    ipv6: bool
    problems: tuple[str, ...] = ()
    routing: Routing | None = None  # the same for all backends: see routing.py

    def redirect_ports(self) -> frozenset[int]:
        """Where connections were redirected to: by these rules, or by those whose place a drain set took."""
        ports: set[int] = set()
        for counted in self.rules:
            rule = counted.rule
            ports.update({rule.redirect, rule.tproxy} - {0})
            if rule.established and rule.ports is not None and rule.ports.first == rule.ports.last:
                ports.add(rule.ports.first)
        return frozenset(ports)

    def draining(self) -> bool:
        """A drain set is in force: nothing new is captured."""
        return bool(self.rules) and all(counted.rule.keeps() for counted in self.rules)

    def plan(self) -> Plan:
        """The one that asks for just these rules."""
        return Plan(rules=tuple(counted.rule for counted in self.rules), ipv6=self.ipv6, routing=self.routing)

    def drain_set(self) -> Plan:
        """The one to take these rules' place."""
        return drain_set(self.redirect_ports(), self.plan().rules, ipv6=self.ipv6)


class Lack(msgspec.Struct, frozen=True):
    """Why a backend cannot be used, empty when it can; and what to type."""

    why: str = ""
    fix: str = ""

    def __bool__(self) -> bool:
        return bool(self.why)

    def in_words(self) -> str:
        return f"{self.why} ({self.fix})" if self.fix else self.why


class Backend(Protocol):
    """Raises CommandError from every method: code 5 without the right to, else 1 with what the kernel said."""

    @property
    def name(self) -> str: ...

    def unavailable(self, plan: Plan) -> Lack:
        """What the kernel lacks that `plan` asks for. Tried for real, by a rule of each kind; none is ever in force."""

    def installed(self) -> Installed | None:
        """What is in the kernel, or None when nothing of ours is."""

    def expected(self, plan: Plan) -> tuple[Rule, ...]:
        """The rules `installed` lists while `plan` is in force."""

    def apply(self, plan: Plan) -> None:
        """Puts `plan` in the place of what is there. Old or new at any moment, open connections live on."""

    def delete(self) -> None:
        """Takes everything of ours out. Cuts connections that are still redirected: put a drain set first."""

    def sweep(self) -> None:
        """Takes out what a trial has left here that was killed."""


def differences(expected: Iterable[Rule], installed: Installed | None) -> list[str]:
    """How the kernel differs from the plan, in words; empty when it does not."""
    if installed is None:
        return ["no rules are installed"]
    wanted = [plain(rule) for rule in expected]
    found = [plain(counted.rule) for counted in installed.rules]
    lines = list(installed.problems)
    missing, extra = Counter(wanted) - Counter(found), Counter(found) - Counter(wanted)
    lines += [f"missing in {rule.chain}: {nft_rule(rule)}" for rule in missing.elements()]
    lines += [f"not in the plan, in {rule.chain}: {nft_rule(rule)}" for rule in extra.elements()]
    if not lines and found != wanted:
        at = next(at for at, pair in enumerate(zip(wanted, found, strict=True)) if pair[0] != pair[1])
        lines.append(f"out of order from here, in {wanted[at].chain}: {nft_rule(wanted[at])}")
    return lines


def plain(rule: Rule) -> Rule:
    """A rule without its reason: what the kernel acts on."""
    return msgspec.structs.replace(rule, why="")


def need_right_to_change() -> None:
    """For what reads rules in order to change them. Raises CommandError."""
    if not may_change_rules():
        raise not_permitted("change")


def not_permitted(to: Literal["read", "change"]) -> CommandError:
    return CommandError(
        f"not allowed to {to} the kernel's rules",
        why="this needs the capability NET_ADMIN in the network namespace",
        fix="run it with sudo; in a container, add the capability NET_ADMIN",
        code=5,
    )


def modprobe(modules: Iterable[str]) -> str:
    """What to type to have all of them; nothing for none."""
    named = tuple(dict.fromkeys(modules))
    return " ".join(("modprobe", *(["-a"] if len(named) > 1 else []), *named)) if named else ""


def hung(program: str, seconds: float) -> CommandError:
    """For what was stopped, as it had not ended after so long."""
    return CommandError(
        f"{program} had not ended after {seconds:g} s, and was stopped",
        why="the kernel may be loading a module, or another program may hold a lock",
        fix="see who it is, and try it again: ps -e | grep -e modprobe -e tables",
        code=6,
    )
