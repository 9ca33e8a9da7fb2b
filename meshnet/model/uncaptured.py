"""Connections of a host that do not come through its sidecar."""

from typing import Literal

from meshnet.model.connection import Direction, Shape

Why = Literal["excluded", "opened-before", "bypassed", "unknown"]


class ProcessView(Shape, frozen=True):
    pid: int
    name: str


class UncapturedConnection(Shape, frozen=True):
    """`why`: excluded (`setting` leaves it alone), opened-before (capture was in place), bypassed (it should have come
    through the sidecar), or unknown (by `setting`, which goes by what no socket tells).

    `inode` names its socket, 0 before a program has accepted it; `process` is told by who may look. Bytes are as the
    client sent and received them, the last ones not counted yet.
    """

    direction: Direction
    client: str
    server: str
    why: Why
    setting: str = ""
    uid: int = 0
    inode: int = 0
    rtt_us: int | None = None
    rtt_var_us: int | None = None
    retransmits: int | None = None
    bytes_sent: int | None = None
    bytes_received: int | None = None
    process: ProcessView | None = None


class UncapturedList(Shape, frozen=True):
    items: tuple[UncapturedConnection, ...] = ()
    api_version: str = "meshnet.dev/v1"
    kind: str = "UncapturedList"
