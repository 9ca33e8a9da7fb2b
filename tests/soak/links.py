"""What befalls packets: their cable, their opening SYN, and the rules that redirect them."""

import random
from collections.abc import Iterator

from meshnet_cli.demo.world import Host, wait_for
from tests.faults.causes import rule
from tests.soak.kind import EVERYBODY, Kind, last
from tests.soak.stage import Stage


class Links:
    def __init__(self, stage: Stage, dice: random.Random) -> None:
        self._stage = stage
        self._dice = dice

    def kinds(self) -> Iterator[Kind]:
        yield Kind("cable pulled for a moment", self._pull)
        yield Kind("nobody answers a SYN for a moment", self._lose_syns)
        yield Kind("rules flushed", self._flush, EVERYBODY, uncovers=True)

    def _pull(self, host: Host) -> None:
        port = f"port{host.address.rpartition('.')[2]}"
        self._stage.world.switch.configure(f"link set {port} down")
        last(self._dice.uniform(0.1, 0.5))
        self._stage.world.switch.configure(f"link set {port} up")

    def _lose_syns(self, host: Host) -> None:
        """For less time than a SYN takes to be sent again (RFC 6298: a second)."""
        with rule(host, "input priority -300", 'iifname != "lo" tcp flags & (syn | ack) == syn drop'):
            last(self._dice.uniform(0.1, 0.3))

    def _flush(self, host: Host) -> None:
        self._stage.flush(host)
        wait_for(lambda: self._stage.is_captured(host), timeout=20.0, what=f"the rules of {host.name} again")
