"""Whether capture works: the kernel holds the plan, and canaries come through it."""

import msgspec

from meshnet.model.settings import Settings
from meshnet_init.apply import every_backend
from meshnet_init.backends import differences
from meshnet_init.canary import Canary, fly
from meshnet_init.host import host_facts
from meshnet_init.plan import make_plan


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """`backend` is empty when nothing is installed. `ok`: nothing differs and no canary went astray."""

    ok: bool
    backend: str
    differences: tuple[str, ...]
    canaries: tuple[Canary, ...] = ()


def verify(settings: Settings) -> Verification:
    """Compares the rules in this network namespace with the plan of `settings`, and sends a canary in each family.

    Takes a few seconds at most. Inbound capture is compared only: what this host sends to itself is never captured.
    Raises ConfigError and CommandError.
    """
    plan = make_plan(settings, host_facts())
    found = [(backend, installed) for backend in every_backend() if (installed := backend.installed()) is not None]
    if not found:
        return Verification(ok=False, backend="", differences=("no rules are installed",))
    backend, installed = found[0]
    lines = differences(backend.expected(plan), installed)
    for other, leftover in found[1:]:
        if not leftover.draining():
            lines.append(f"older rules of backend {other.name} are in force beside those of {backend.name}")
    canaries = tuple(
        fly(plan, family, settings.proxy.outbound_port, settings.capture.gid) for family in ("ipv4", "ipv6")
    )
    ok = not lines and all(canary.status != "not captured" for canary in canaries)
    return Verification(ok=ok, backend=backend.name, differences=tuple(lines), canaries=canaries)
