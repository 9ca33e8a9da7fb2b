"""The way in of whoever mends this host: settings that were changed by hand do not take it from him unasked."""

from collections.abc import Collection, Iterable

from meshnet.errors import CommandError
from meshnet.model.canary import INBOUND_CANARY
from meshnet_init.backends import Installed
from meshnet_init.rule import Rule
from meshnet_init.sidecar import captured_inbound


def need_way_in(rules: Collection[Rule], in_force: Iterable[Installed], ways_in: Collection[int]) -> None:
    """Raises CommandError if `rules` capture one of these ports of this host, and what is in force does not.

    Where nothing captures yet, nothing can be compared: whoever put the rules in was asked (--accept-risk).
    """
    in_force = [installed for installed in in_force if not installed.draining()]
    if not in_force:
        return
    now = [counted.rule for installed in in_force for counted in installed.rules]
    lost = [port for port in sorted(ways_in) if _captured(rules, port) and not _captured(now, port)]
    if lost:
        raise CommandError(
            f"they would capture port {lost[0]}, by which SSH reaches this host; the rules stay as they are",
            why="a new login would depend on the sidecar",
            fix=f"add {lost[0]} to capture.exclude_inbound_ports; or if you know another way in, change the settings "
            "by: sudo meshnet set --accept-risk=lose-ssh",
        )


def _captured(rules: Collection[Rule], port: int) -> bool:
    return any(captured_inbound(rules, port, source) for source in INBOUND_CANARY.values())
