"""Whether capture works: the kernel holds the plan, it fits the sidecar that runs, and canaries come through it."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from meshnet.model.admin import Status
from meshnet.model.settings import Settings
from meshnet_init.apply import drift, in_kernel
from meshnet_init.canary import Canary, fly
from meshnet_init.foreign import Foreign, asked_first
from meshnet_init.host import host_facts
from meshnet_init.inbound_canary import fly_in
from meshnet_init.plan import make_plan
from meshnet_init.routing import installed_routing
from meshnet_init.rule import CHAIN_OUT, Plan
from meshnet_init.sidecar import misfits, turns_inbound


class Verification(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """`backend` is empty when nothing is installed. `ok`: nothing differs, all fits, and no canary went astray.

    `differences` are those of the kernel from the plan; `misfits` those of the kernel from the sidecar that runs.
    `canaries` went out, `inbound` ones came in. `asked_first` are rules of other tables that may be asked before ours,
    and of which a canary tells nothing, as they turn what they name only. `fix` is what to type, empty when all is
    well. Rules that capture for nobody are `ok`: a pod's init container puts them in before its sidecar starts.
    """

    ok: bool
    backend: str
    differences: tuple[str, ...]
    sidecar: Literal["none", "fits", "differs"] = "none"
    misfits: tuple[str, ...] = ()
    canaries: tuple[Canary, ...] = ()
    inbound: tuple[Canary, ...] = ()
    asked_first: tuple[Foreign, ...] = ()
    fix: str = ""
    api_version: str = "meshnet.dev/v1"
    kind: str = "Verification"

    def for_nobody(self) -> bool:
        """Whether new connections are refused: captured, for a sidecar that is not there."""
        return any(canary.by_us for canary in self.canaries)


def verify(settings: Settings, sidecar: Status | None = None) -> Verification:
    """Compares the rules in this network namespace with the plan of `settings`, and sends a canary in each family.

    `sidecar` is the answer of the one that runs here; without one, the canary is caught in its place. Takes a few
    seconds at most. For what comes in it makes a visitor, where it may. Raises ConfigError and CommandError.
    """
    plan = make_plan(settings, host_facts())
    found = in_kernel()
    if not found:
        lines = ["no rules are installed"]
        return Verification(ok=False, backend="", differences=tuple(lines), fix=_fix(lines, plan, sidecar))
    backend, installed = found[0]
    lines = drift(plan, backend, found)
    rules = installed.plan().rules
    unfit = misfits(rules, installed_routing(), sidecar) if sidecar else ()
    # Where the rules lead, not where they should: that they work and that they are as planned are two things.
    leads_to = {rule.redirect for rule in rules if rule.redirect and rule.chain == CHAIN_OUT}
    port = min(leads_to, default=settings.proxy.outbound_port)
    canaries = tuple(
        fly(plan, family, port, settings.capture.gid, proxy_runs=sidecar is not None) for family in ("ipv4", "ipv6")
    )
    port = min(filter(None, map(turns_inbound, rules)), default=settings.proxy.inbound_port)
    inbound = fly_in(plan, port, backend, installed, proxy_runs=sidecar is not None)
    ok = not lines and not unfit and all(canary.status != "not captured" for canary in (*canaries, *inbound))
    result = Verification(
        ok=ok,
        backend=backend.name,
        differences=tuple(lines),
        sidecar="none" if sidecar is None else "differs" if unfit else "fits",
        misfits=unfit,
        canaries=canaries,
        inbound=inbound,
        asked_first=asked_first(backend.name),
        fix="" if ok else _fix(lines, plan, sidecar),
    )
    return msgspec.structs.replace(result, fix="sudo meshnet up") if ok and result.for_nobody() else result


def _fix(lines: Sequence[str], plan: Plan, sidecar: Status | None) -> str:
    if sidecar and misfits(plan.rules, plan.routing, sidecar):  # those of the kernel are mended together with the rules
        return "start the sidecar again with these settings: sudo meshnet down && sudo meshnet up"
    if lines:
        return "sudo meshnet up" if sidecar else "sudo meshnet up, or without a sidecar: sudo meshnet init"
    return "look for other software's rules: nft list ruleset, iptables-save"
