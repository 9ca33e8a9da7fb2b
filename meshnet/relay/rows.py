"""Connections under an order that came and went, and ended well: a row of bytes each, as the native core writes it."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from meshnet.errors import EndedBy

ROW = struct.Struct("=16sq3IH2x2Q")
"""A Row; keep in step with native/module.h."""


class Row(NamedTuple):
    """Times in microseconds: when it was `opened` since the epoch, until it was `connected` and had `ended` since then,
    and how long it was `idle` at its end. `port` is its client's.
    """

    name: bytes
    opened: int
    connected: int
    ended: int
    idle: int
    port: int
    sent: int
    received: int

    @property
    def id(self) -> str:
        return self.name.rstrip(b"\0").decode()


_COLUMNS: dict[str, tuple[Literal["I", "Q"], int]] = {
    "connected": ("I", 6),
    "ended": ("I", 7),
    "sent": ("Q", 5),
    "received": ("Q", 6),
}


@dataclass(slots=True, frozen=True)
class Rows:
    """Some, and what they have in common; `cipher` of their tunnels, or empty."""

    data: bytes
    cipher: str
    ended_by: EndedBy

    def __len__(self) -> int:
        return len(self.data) // ROW.size

    def __iter__(self) -> Iterator[Row]:
        return map(Row._make, ROW.iter_unpack(self.data))

    def column(self, name: str) -> memoryview:
        """One figure of each; what is to be added up need not be taken apart."""
        form, place = _COLUMNS[name]
        column = memoryview(self.data).cast(form)
        return column[place :: ROW.size // column.itemsize]
