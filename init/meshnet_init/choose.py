"""WHICH BACKEND WRITES THE RULES: the one that was named, or the best whose kernel takes each kind that a plan has."""

import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import msgspec

from meshnet.errors import CommandError, ConfigError
from meshnet.model.settings import CaptureSection, Settings
from meshnet_init.backends import Backend, Lack, need_right_to_change
from meshnet_init.backends.cgroups import without_missing
from meshnet_init.backends.iptables import IptablesBackend
from meshnet_init.backends.iptables_binaries import by_binaries
from meshnet_init.backends.nft import NftBackend
from meshnet_init.backends.python_iptables import by_python_iptables, why_it_does_not_work
from meshnet_init.backends.scratch import tried_in_scratch
from meshnet_init.host import host_facts, legacy_tables, may_see_legacy_rules
from meshnet_init.kind import Kind, kinds
from meshnet_init.plan import make_plan
from meshnet_init.render import parts_of
from meshnet_init.rule import Plan

BACKENDS = ("auto", "nft", "iptables", "legacy")

_NO_IPTABLES = Lack("no iptables that writes nf_tables is installed", "apt-get install iptables")


class Choice(NamedTuple):
    """Which better backends were `passed_over`, and why; which were `tried_here`, for want of a namespace for it."""

    backend: Backend
    passed_over: tuple[str, ...] = ()
    tried_here: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """All that is to be said of it."""
        return (*self.tried_here, *self.passed_over)


def choose_for(settings: Settings, plan: Plan, name: str = "") -> Choice:
    """The backend of that name, or the one the settings name, for `plan`, which is theirs. Raises as `choose` does."""
    return choose(name or settings.capture.backend, plan, partial(_in_the_way, settings))


def choose(name: str, plan: Plan, in_the_way: Callable[[Backend], Sequence[str]] = lambda _: ()) -> Choice:
    """The backend of that name; `auto` is legacy where others have rules in those tables, for of two tables that
    redirect the one made last wins; else the first whose kernel takes `plan`: nft, iptables, legacy.

    `in_the_way` names the settings without which a backend could be used. Raises CommandError.
    """
    if name not in BACKENDS:
        raise CommandError(f"no backend {name!r}", fix=f"use one of {', '.join(BACKENDS)}", code=2)
    need_right_to_change()
    lacks: list[tuple[Backend, Lack]] = []
    tried_here: list[str] = []
    for backend in _in_order(name):
        lack, here = tried_in_scratch(partial(backend.unavailable, plan), Lack)
        if here:
            tried_here.append(
                f"{backend.name} was tried in this network namespace, by rules that nothing came to:"
                f" none of its own may be made here ({here})"
            )
        if not lack:
            return Choice(backend, tuple(_passed_over(*each) for each in lacks), tuple(tried_here))
        lacks.append((backend, lack))
    if not lacks:
        raise _nobody(name)
    fixes = dict.fromkeys(lack.fix for _, lack in lacks if lack.fix)
    settings = in_the_way(lacks[0][0])
    without = f"do without {', '.join(f'capture.{setting}' for setting in settings)}" if settings else ""
    others = "leave the choice to meshnet: --backend auto" if name != "auto" else ""
    if name == "auto" and all(backend.name != "iptables" for backend, _ in lacks):
        others = "apt-get install iptables"
    raise CommandError(
        "no way to put rules into this kernel" if name == "auto" else f"backend {name} cannot be used here",
        why="; ".join([*(f"{backend.name}: {lack.why}" for backend, lack in lacks), *tried_here]),
        fix="; or ".join(filter(None, (*fixes, without, others))),
    )


def kinds_of(plan: Plan) -> frozenset[Kind]:
    """What a backend is tried for. A plan of other kinds, as when IPv6 or a cgroup has come, may need another one."""
    return kinds(without_missing(plan).rules, parts_of)


def _passed_over(backend: Backend, lack: Lack) -> str:
    return f"{backend.name} was passed over: {lack.in_words()}"


def _nobody(name: str) -> CommandError:
    if name == "legacy" and not may_see_legacy_rules():
        return CommandError(
            "not allowed to change the legacy tables",
            why="this needs the capability NET_RAW beside NET_ADMIN",
            fix="run it with sudo; in a pod, meshnet inject --backend legacy asks for both; or use --backend nft",
            code=5,
        )
    lack = legacy_lack() if name == "legacy" else _NO_IPTABLES
    return CommandError(
        f"backend {name} cannot be used here",
        why=lack.why,
        fix=f'{lack.fix}; or leave the choice to meshnet: capture.backend = "auto"',
    )


def _in_the_way(settings: Settings, backend: Backend) -> Sequence[str]:
    """The settings of [capture] that ask for what `backend` cannot do here; none where it can do nothing at all."""
    host, plain = host_facts(), CaptureSection()
    changed = [key for key in plain.__struct_fields__ if getattr(plain, key) != getattr(settings.capture, key)]

    def can_without(keys: Sequence[str]) -> bool:
        capture = msgspec.structs.replace(settings.capture, **{key: getattr(plain, key) for key in keys})
        try:
            return not backend.unavailable(make_plan(msgspec.structs.replace(settings, capture=capture), host))
        except ConfigError:  # one that another one needs
            return False

    def least() -> list[str]:
        if not can_without(changed):
            return []
        kept = list(changed)
        for key in changed:
            if can_without(rest := [each for each in kept if each != key]):
                kept = rest
        return kept

    try:
        return tried_in_scratch(least, list[str]).found if changed else ()
    except CommandError:  # it is asked for the text of an error, which it must not take the place of
        return ()


def every_backend() -> list[Backend]:
    """One for each kind of tables the kernel may have rules of ours in that this process may see; best first."""
    iptables = by_binaries("iptables", "nft")
    return [backend for backend in (NftBackend(), iptables, _legacy()) if backend is not None]


def _legacy() -> IptablesBackend | None:
    return (by_python_iptables() or by_binaries("legacy", "legacy")) if may_see_legacy_rules() else None


def unseen_legacy() -> tuple[tuple[str, ...], str]:
    """The legacy tables of the kernel that this process cannot look into, and why, where there are some."""
    lack = legacy_lack()
    unseen = tuple(legacy_tables()) if lack else ()
    return unseen, lack.in_words() if unseen else ""


def legacy_lack() -> Lack:
    """Why this process cannot look into the legacy tables; none where it can."""
    if not may_see_legacy_rules():
        return Lack("to look there takes NET_RAW, too")
    if _legacy() is not None:
        return Lack()
    if why := why_it_does_not_work():
        return Lack(
            f"no iptables-legacy is installed, and python-iptables does not work: {why}", "apt-get install iptables"
        )
    line = f"{shlex.quote(sys.executable)} -m pip install python-iptables"
    return Lack(
        "neither iptables-legacy nor python-iptables is installed",
        f"apt-get install iptables; or where that has no iptables-legacy: {line}",
    )


def _in_order(name: str) -> list[Backend]:
    backends = every_backend()
    if name != "auto":
        return [backend for backend in backends if backend.name == name]

    def is_needed(backend: Backend) -> bool:
        return backend.name == "legacy" and isinstance(backend, IptablesBackend) and backend.is_used_by_others()

    return sorted(backends, key=is_needed, reverse=True)
