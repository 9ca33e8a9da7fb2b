"""What goes wrong in a soak, one after the other, as a seed says. Each returns when it is over."""

import random
import time
from collections.abc import Callable

from meshnet.errors import CommandError
from meshnet_cli.demo.wire import Capture
from tests.soak.endpoints import Endpoints
from tests.soak.judge import GRACE, Fault
from tests.soak.kind import Kind, last
from tests.soak.links import Links
from tests.soak.shortages import Shortages
from tests.soak.sidecars import Sidecars
from tests.soak.stage import Stage
from tests.soak.storms import Storms

_PAUSES = (0.5, 4.0)  # seconds without any fault, beyond the time for which the last one still excuses
_ON_ITS_WAY = 0.3  # seconds in which what has passed between hosts is counted


class Faults:
    """`so_far` grows; only those come that have `only` in their name.

    `uncovered`: of the frames with the marker of `wire`, those that passed while there were no rules.
    """

    def __init__(
        self, stage: Stage, wire: Capture, dice: random.Random, tell: Callable[[str], None], only: str = ""
    ) -> None:
        self.so_far: list[Fault] = []
        self.uncovered = 0
        self.sidecars = Sidecars(stage, dice)
        self._stage = stage
        self._wire = wire
        self._dice = dice
        self._tell = tell
        shortages = Shortages(stage, dice, self.sidecars)
        rooms = (self.sidecars, Links(stage, dice), shortages, Endpoints(stage, dice), Storms(stage, dice))
        every = [kind for room in rooms for kind in room.kinds()]
        self._kinds = [kind for kind in every if only in kind.what]
        if not self._kinds:
            names = "\n".join(kind.what for kind in every)
            raise CommandError(f"no fault has {only!r} in its name", why=f"these are all:\n{names}", fix="name one")
        self._order: list[Kind] = []

    def go_on_until(self, end: float) -> None:
        """One fault after the other; each kind comes once before any comes again."""
        while True:
            if not self._order:
                self._order = self._dice.sample(self._kinds, len(self._kinds))
            kind = self._order.pop()
            host = self._stage.world.hosts[self._dice.choice(kind.where)]
            pause = self._dice.uniform(*_PAUSES) + (GRACE if self.so_far and self.so_far[-1].excuses else 0.0)
            if time.monotonic() + pause + 2 * GRACE > end:
                last(max(0.0, end - time.monotonic()))
                return
            last(pause)
            began = time.monotonic()
            self._tell(f"{kind.what} ({host.name})")
            seen = self._wire.with_marker
            kind.do(host)
            if kind.uncovers:
                last(_ON_ITS_WAY)
                self.uncovered += self._wire.with_marker - seen
            self.so_far.append(Fault(kind.what, began, time.monotonic(), kind.excuses(host)))
