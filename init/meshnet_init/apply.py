"""Puts the rules that settings ask for into the kernel. Twice is the same as once."""

from collections.abc import Iterator, Sequence

import msgspec

from meshnet.errors import CommandError
from meshnet.model.capture import StandDown, TakeUp
from meshnet.model.settings import Settings
from meshnet.net.keeper import tell_keeper
from meshnet_init.backends import Backend, Installed, differences
from meshnet_init.backends.cgroups import missing
from meshnet_init.choose import Choice, choose_for, every_backend, unseen_legacy
from meshnet_init.host import host_facts, open_connections
from meshnet_init.plan import make_plan
from meshnet_init.routing import connections_in_clients_names, installed_routing, route, routing_differences
from meshnet_init.rule import Plan


class Applied(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """`replaced` are the backends whose older rules were taken out; `kept`, those whose drain set still stands.

    `unseen` are legacy tables that could not be looked at, for the reason `blind`. `passed_over` and `tried_here` say
    how `backend` was chosen.
    """

    backend: str
    changed: bool
    rules: int
    ipv6: bool
    replaced: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    missing_cgroups: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    blind: str = ""
    passed_over: tuple[str, ...] = ()
    tried_here: tuple[str, ...] = ()

    def warnings(self) -> Iterator[str]:
        yield from self.passed_over
        for path in self.missing_cgroups:
            yield f"there is no cgroup {path}: nobody is in it (systemd-cgls shows which there are)"
        if self.unseen:
            tables = ", ".join(self.unseen)
            yield f"rules in the legacy tables ({tables}) may stand ahead of these: {self.blind}"


def apply(settings: Settings, backend: str = "", choice: Choice | None = None) -> Applied:
    """Applies the plan of `settings` in this network namespace, with `backend` or the one the settings name.

    Open connections live on. Raises ConfigError for settings that make no plan and CommandError when the kernel
    refuses; then what was in force still is. A keeper waits meanwhile, and reads its settings again. `choice`: what
    `choose_for` has found for these settings a moment ago.
    """
    plan = make_plan(settings, host_facts())
    choice = choice or choose_for(settings, plan, backend)
    keeper = tell_keeper(StandDown())
    try:
        return msgspec.structs.replace(
            apply_plan(plan, choice.backend), passed_over=choice.passed_over, tried_here=choice.tried_here
        )
    finally:
        if keeper is not None:
            tell_keeper(TakeUp())


def would_change(settings: Settings, choice: Choice | None = None) -> bool:
    """Whether `apply` would write anything. Raises as that does."""
    plan = make_plan(settings, host_facts())
    chosen = (choice or choose_for(settings, plan)).backend
    found = in_kernel()
    return bool(drift(plan, chosen, found)) or any(backend.name != chosen.name for backend, _ in found)


def apply_plan(plan: Plan, chosen: Backend) -> Applied:
    """Makes `plan` the only rules of ours, then takes older ones of other backends out."""
    if plan.routing is None and (speaking := connections_in_clients_names()):
        raise CommandError(
            f"{speaking} connections are open in their clients' names, and would not hear the answers any more",
            why="the rules that are to be put in do not carry them: capture.original_source",
            fix="sudo meshnet down && sudo meshnet up; or wait until they have ended",
        )
    expected = chosen.expected(plan)
    before = installed_routing()
    routed = plan.routing is not None and route(plan.routing)
    changed = bool(differences(expected, chosen.installed()))
    if changed:
        try:
            chosen.apply(plan)
        except CommandError:
            route(before)
            raise
    if plan.routing is None:
        routed = route(None)

    replaced, kept = [], []
    for other in every_backend():
        if other.name == chosen.name:
            continue
        older = other.installed()
        if older is None:
            continue
        # The new rules keep NAT alive for what the older ones redirected, except in a family they leave alone.
        if older.ipv6 and not plan.ipv6 and chosen.name != "nft" and open_connections(older.redirect_ports()):
            other.apply(older.drain_set())
            kept.append(other.name)
        else:
            other.delete()
            replaced.append(other.name)
    unseen, blind = unseen_legacy()
    return Applied(
        backend=chosen.name,
        changed=changed or routed or bool(replaced),
        rules=len(expected),
        ipv6=plan.ipv6,
        replaced=tuple(replaced),
        missing_cgroups=missing(plan),
        kept=tuple(kept),
        unseen=unseen,
        blind=blind,
    )


def drift(plan: Plan, chosen: Backend, found: Sequence[tuple[Backend, Installed]]) -> list[str]:
    """How what was `found` in the kernel differs from `plan` by `chosen` alone, in words; empty when it does not."""
    ours = next((installed for backend, installed in found if backend.name == chosen.name), None)
    lines = [*differences(chosen.expected(plan), ours), *routing_differences(plan.routing)]
    for other, installed in found:
        if other.name != chosen.name and not installed.draining():
            lines.append(f"older rules of backend {other.name} are in force beside those of {chosen.name}")
    return lines


def in_kernel() -> list[tuple[Backend, Installed]]:
    """What is there of ours, backend by backend; more than one only after a crash. Raises CommandError."""
    return [(backend, installed) for backend in every_backend() if (installed := backend.installed()) is not None]


def installed_rules() -> tuple[Installed, ...]:
    """What is in the kernel of ours, with the routes that belong to it. Raises CommandError."""
    found, routing = in_kernel(), installed_routing()
    return tuple(msgspec.structs.replace(installed, routing=routing) for _, installed in found)
