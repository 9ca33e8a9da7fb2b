"""Who comes in from elsewhere to ask for readiness through the rules: each of them proves that inbound is captured.

In a pod it is the kubelet, every few seconds. Where nobody comes any more the rules may be gone, or the kubelet: of the
first it knows by itself, for its question is refused then. So what is late is told, and takes no readiness away.
"""

import logging
import time
from collections.abc import Callable, Iterator

from meshnet.decide.visits import Visits
from meshnet.model.canary import IpFamily
from meshnet.model.capture import Proof, VisitsView
from meshnet.proxy.record import rfc3339

_log = logging.getLogger("meshnet.capture")


class InboundVisits:
    """Of both families; only those that somebody has come by are told of. `clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._visits: dict[IpFamily, Visits] = {}
        self._at: dict[IpFamily, float] = {}  # seconds since the epoch
        self._late: set[IpFamily] = set()  # that were told of

    def came(self, family: IpFamily) -> None:
        if family not in self._visits:
            _log.info("inbound %s is captured: readiness is asked for through the rules", _name(family))
        elif family in self._late:
            self._late.discard(family)
            _log.info("inbound %s is captured again: readiness is asked for through the rules", _name(family))
        self._visits.setdefault(family, Visits()).came(self._clock())
        self._at[family] = time.time()

    def look(self) -> None:
        """To be called every few seconds: tells once of who does not come any more."""
        for family in self._visits:
            if family not in self._late and self._is_late(family):
                self._late.add(family)
                _log.warning("inbound %s may not be captured any more: %s", _name(family), self._told(family))

    def proofs(self) -> Iterator[Proof]:
        for family in self._visits:
            yield Proof(
                direction="inbound",
                family=family,
                result="no answer" if self._is_late(family) else "captured",
                detail=self._told(family),
            )

    def views(self) -> tuple[VisitsView, ...]:
        return tuple(
            VisitsView(
                family=family,
                last=rfc3339(self._at[family]),
                every_seconds=round(visits.every, 3),
                late=self._is_late(family),
            )
            for family, visits in self._visits.items()
        )

    def times(self) -> list[tuple[IpFamily, float]]:
        """When somebody last came, in seconds since the epoch."""
        return list(self._at.items())

    def _is_late(self, family: IpFamily) -> bool:
        return self._visits[family].is_late(self._clock())

    def _told(self, family: IpFamily) -> str:
        last = f"readiness was last asked for through the rules at {rfc3339(self._at[family])}"
        return f"{last}, before that every {self._visits[family].every:.0f} s" if self._is_late(family) else last


def _name(family: IpFamily) -> str:
    return "IPv6" if family == "ipv6" else "IPv4"
