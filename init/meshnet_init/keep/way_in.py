"""The way in of whoever mends this host: settings that were changed by hand do not take it from him unasked."""

from collections.abc import Collection

from meshnet.errors import CommandError
from meshnet.model.canary import INBOUND_CANARY
from meshnet_init.rule import Rule
from meshnet_init.sidecar import captured_from_anywhere, captured_inbound, turns_inbound

Rules = Collection[Rule]


def need_way_in(wanted: Rules, before: Collection[Rules], ways_in: Collection[int]) -> None:
    """Raises CommandError if the rules that are `wanted` capture one of these ports of this host, which nothing of
    `before` did.

    Where nothing captured before, nothing can be compared: whoever put the rules in was asked (--accept-risk).
    """
    captured = [rules for rules in before if any(map(turns_inbound, rules))]
    if not captured:
        return
    for captures in (captured_from_anywhere, _captures_our_canary):
        for port in sorted(ways_in):
            if captures(wanted, port) and not any(captures(rules, port) for rules in captured):
                raise CommandError(
                    f"they would capture port {port}, by which SSH may reach this host; the rules stay as they are",
                    why="a new login would depend on the sidecar",
                    fix=f"add {port} to capture.exclude_inbound_ports; or if you know another way in: "
                    "sudo meshnet up --accept-risk=lose-ssh",
                )


def captured_ways_in(rules: Rules, ways_in: Collection[int]) -> list[int]:
    """Those of these ports that the rules capture, if only for some who call."""
    return [port for port in sorted(ways_in) if captured_from_anywhere(rules, port)]


def _captures_our_canary(rules: Rules, port: int) -> bool:
    """For the many: beside it rules of before may have captured only what comes from a few, and now do all."""
    return any(captured_inbound(rules, port, source) for source in INBOUND_CANARY.values())
