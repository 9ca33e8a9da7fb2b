"""What is known of capture: whether it works, who keeps it, and what got past it."""

from typing import Literal

from meshnet.model.canary import IpFamily
from meshnet.model.connection import Shape

KEEPER = "\0meshnet/keeper"
"""Where the keeper of a network namespace's rules answers: an abstract UNIX socket, which is of that namespace."""
KEEPER_USER = "meshnet-rules"  # where a host's init system starts it; elsewhere it is root

ProofResult = Literal["captured", "not captured", "no answer", "no route", "not in the plan", "not tried"]


class Proof(Shape, frozen=True):
    """What became of the last canary of one direction and family.

    `no answer`: it was captured or lost on the way, and who should have answered was silent. `no route`: nothing could
    leave, so nothing can get past. `not in the plan`: the settings leave the family alone.
    """

    direction: Literal["outbound", "inbound"]
    family: IpFamily
    result: ProofResult
    detail: str = ""


class VisitsView(Shape, frozen=True):
    """Who comes to this host from elsewhere, in one family, to ask for readiness through the rules.

    `every_seconds` is learned from the visits, 0 while not known. `late`: nobody has come for several times as long.
    """

    family: IpFamily
    last: str
    every_seconds: float = 0.0
    late: bool = False


class Repair(Shape, frozen=True):
    """`by`: whoever changed the rules, as far as the kernel tells; `differences`: what it had changed."""

    at: str
    differences: tuple[str, ...]
    by: str = ""


class KeeperReport(Shape, frozen=True):
    """What the keeper says of itself.

    `state`: keeping; open (the sidecar is gone, and by capture.fail = "open" connections go direct); stood down
    (somebody took the rules out); failing (the kernel refuses, see `problem`); fighting (another program changes the
    rules again and again). `unguarded`: why capture.strict cannot outlast a flush of all rules; empty when it does, or
    is off.
    """

    pid: int
    since: str
    state: Literal["keeping", "open", "stood down", "failing", "fighting"]
    looked_at: str
    interval_seconds: float
    backend: str
    fail: Literal["closed", "open"]
    sidecar: Literal["alive", "gone"]
    in_place: bool = False
    proofs: tuple[Proof, ...] = ()
    repairs: int = 0
    last_repair: Repair | None = None
    problem: str = ""
    unguarded: str = ""
    kind: str = "KeeperReport"


class StandDown(Shape, frozen=True, tag="stand-down"):
    """The keeper leaves the rules alone from now on: somebody is about to take them out, or to change them."""


class TakeUp(Shape, frozen=True, tag="take-up"):
    """The keeper reads its settings again, and keeps the rules that they ask for."""


KeeperRequest = StandDown | TakeUp


class CaptureStatus(Shape, frozen=True):
    """The sidecar's view. `in_place` is None while nothing could be proved.

    `uncaptured` counts, by direction, the open connections that should have come through the sidecar, and did not;
    `not_judged` says why a direction is not counted. `examples` are some of them.
    """

    in_place: bool | None
    required: bool
    proofs: tuple[Proof, ...] = ()
    visits: tuple[VisitsView, ...] = ()
    proved_at: str = ""
    interval_seconds: float = 0.0
    uncaptured: dict[str, int] = {}
    not_judged: dict[str, str] = {}
    examples: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()  # those that make the sidecar not ready
    keeper: KeeperReport | None = None
