"""The rules once more, where nobody but the keeper can take them out: `table inet meshnet_keeper`, by capture.strict.

`nft flush ruleset` and `iptables -F` leave a table alone that has an owner. So between a flush and its repair it goes
on to translate what is open, to capture what is new, and to refuse what nothing captures, whichever backend the rules
are of. It goes with the keeper's socket, and so with the keeper: nobody has to clean up behind it.
"""

import socket

from msgspec import structs

from meshnet_init.backends import Installed, Lack, differences
from meshnet_init.backends.nft import NftBackend, netlink_socket
from meshnet_init.render import KEEPER_TABLE
from meshnet_init.rule import Plan


class Guard:
    """A context manager. Nothing is held before `hold`, nor at the end."""

    def __init__(self) -> None:
        self._owner: socket.socket | None = None

    def hold(self, plan: Plan) -> bool:
        """Whether anything had to be written for it. Raises CommandError and OSError; then what was held still is."""
        plan = _guarded(plan)
        owner = self._owner or netlink_socket()
        table = NftBackend(KEEPER_TABLE, owner)
        if self._owner is not None and not differences(table.expected(plan), table.installed()):
            return False
        try:
            table.apply(plan)
        except BaseException:
            if self._owner is None:
                owner.close()
            raise
        self._owner = owner
        return True

    def let_go(self) -> None:
        """The table goes. What is open lives on as long as the rules themselves stand."""
        if self._owner is not None:
            self._owner.close()
            self._owner = None

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.let_go()


def held() -> Installed | None:
    """The table, whoever's keeper holds it; its `backend` is `keeper`. Raises CommandError."""
    found = NftBackend(KEEPER_TABLE).installed()
    return None if found is None else structs.replace(found, backend="keeper")


def unavailable(plan: Plan) -> Lack:
    """Why no table with an owner can hold `plan` here. Raises CommandError without the right to try."""
    try:
        owner = netlink_socket()
    except OSError as error:
        return Lack(f"the kernel has no nftables: {error.strerror}", "modprobe nf_tables")
    with owner:
        return NftBackend(KEEPER_TABLE, owner).unavailable(_guarded(plan))


def _guarded(plan: Plan) -> Plan:
    """Nothing is queued here: what the rules themselves have queued would be queued again."""
    return structs.replace(plan, rules=tuple(rule for rule in plan.rules if rule.chain != "MESHNET_HOLD"))
