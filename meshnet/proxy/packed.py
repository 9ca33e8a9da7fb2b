"""Connections that have ended, in few bytes each: some twenty of one that came and went under an order."""

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from meshnet.errors import EndedBy, Reason
from meshnet.model.connection import Connection
from meshnet.proxy.passed import Passed, Told
from meshnet.proxy.record import Record
from meshnet.relay import Facts, Outcome

Ended = Record | Passed

_MOST = 4096  # connections of a segment
_MOST_BYTES = 1 << 18
_MOST_KINDS = 1024
_KIND_BYTES = 1024  # about what a Told takes
_RAW = -zlib.MAX_WBITS  # no header and no checksum: these bytes never leave the process

# Of one that came and went: what it has in common with others, port, microseconds since the epoch, until it was
# connected and until it had ended, bytes sent and received, microseconds since they moved (-1: they did not), who
# ended it, and the length of its id, which follows.
_CAME_AND_WENT = struct.Struct("<HHqqqqqqBB")
_WHOLE = struct.Struct("<HI")  # of every other: this kind, and the length of its view as MessagePack
_WHOLE_KIND = 0xFFFF

_ENDED_BY = tuple(EndedBy)
_ENDS = tuple(Outcome(Reason.OK, who) for who in EndedBy)

_pack = _CAME_AND_WENT.pack
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Connection).decode


Kind = tuple[Told, str]
"""What some connections have in common; the text is the cipher."""


class Packed(NamedTuple):
    """What a segment had at one moment; any thread may read it."""

    data: bytes
    kinds: Sequence[Kind]

    def items(self) -> Iterator[Connection | Passed]:
        """In the order in which they were added."""
        data = self._unpacked()
        return (self._item(data, at, end) for at, end in _rows(data))

    def views(self) -> Iterator[Connection]:
        return map(_view, self.items())

    def find(self, connection_id: str) -> list[Connection]:
        """Those with that id. Of a segment without it nothing is decoded."""
        data, wanted = self._unpacked(), connection_id.encode()
        if wanted not in data:
            return []
        found = (_view(self._item(data, at, end)) for at, end in _rows(data) if wanted in data[at:end])
        return [view for view in found if view.id == connection_id]

    def _unpacked(self) -> bytes:
        return zlib.decompressobj(_RAW).decompress(self.data)

    def _item(self, data: bytes, at: int, end: int) -> Connection | Passed:
        if int.from_bytes(data[at : at + 2], "little") == _WHOLE_KIND:
            return _decode(data[at + _WHOLE.size : end])
        number, port, opened, connect, lasted, sent, received, idle, by, _ = _CAME_AND_WENT.unpack_from(data, at)
        told, cipher = self.kinds[number]
        began, over = 1.0, 1.0 + lasted / 1e6  # not at 0, which says that a moment has not been
        connected, moved_at = began + connect / 1e6, over - idle / 1e6 if idle >= 0 else 0.0
        seen = (port, began, connected, over, sent, received, moved_at)
        facts = Facts(*seen, True, True, 0, 0, 0, False, -1, "", cipher)
        connection_id = data[at + _CAME_AND_WENT.size : end].decode()
        return Passed(told, facts, _ENDS[by], opened / 1e6, connection_id)


def _view(item: Connection | Passed) -> Connection:
    return item.view() if isinstance(item, Passed) else item


class Segment:
    """Some that ended one after another. It grows until it `is_full`. `last`: when the last one ended, wall seconds.

    `size`: about how many bytes it takes; the compressor still has some of those that came last.
    """

    __slots__ = ("_compressor", "_kinds", "_numbers", "_pieces", "count", "last", "size")

    def __init__(self) -> None:
        self.count = self.size = 0
        self.last = 0.0
        self._pieces: list[bytes] = []
        self._kinds: list[Kind] = []
        self._numbers: dict[Kind, int] = {}
        # Level 1: more takes two to four times as long, for a tenth of the bytes.
        self._compressor = zlib.compressobj(1, zlib.DEFLATED, _RAW)

    @property
    def is_full(self) -> bool:
        return self.count >= _MOST or self.size >= _MOST_BYTES or len(self._kinds) >= _MOST_KINDS

    def add(self, batch: Sequence[Ended]) -> None:
        kinds = len(self._kinds)
        rows = b"".join([self._came_and_went(each) if type(each) is Passed else _whole(each) for each in batch])
        piece = self._compressor.compress(rows)
        self.count += len(batch)
        self.last = batch[-1].ended_at
        self.size += len(piece) + _KIND_BYTES * (len(self._kinds) - kinds)
        self._pieces.append(piece)
        if self.is_full:
            last = self._compressor.flush()
            self.size += len(last)
            self._pieces = [b"".join((*self._pieces, last))]
            del self._compressor, self._numbers  # a quarter of a megabyte

    def packed(self) -> Packed:
        pieces = self._pieces if self.is_full else [*self._pieces, self._compressor.copy().flush()]
        return Packed(b"".join(pieces), self._kinds)

    def _came_and_went(self, passed: Passed) -> bytes:
        facts, name = passed.facts, passed.id.encode()
        port, opened, connected, ended, sent, received, moved_at = facts[:7]
        kind = (passed.told, facts.cipher)
        number = self._numbers.get(kind)
        if number is None:
            number = self._numbers[kind] = len(self._kinds)
            self._kinds.append(kind)
        idle = int((ended - moved_at) * 1e6 + 0.5) if moved_at else -1
        by = _ENDED_BY.index(passed.ended_by)
        opened, connect, lasted = int(passed.opened_at * 1e6), connected - opened, ended - opened
        connect, lasted = int(connect * 1e6 + 0.5), int(lasted * 1e6 + 0.5)
        return _pack(number, port, opened, connect, lasted, sent, received, idle, by, len(name)) + name


def _whole(ended: Ended) -> bytes:
    view = _encode(ended.view())
    return _WHOLE.pack(_WHOLE_KIND, len(view)) + view


def _rows(data: bytes) -> Iterator[tuple[int, int]]:
    """Where each begins and ends."""
    at = 0
    while at < len(data):
        if int.from_bytes(data[at : at + 2], "little") == _WHOLE_KIND:
            _, length = _WHOLE.unpack_from(data, at)
            end = at + _WHOLE.size + length
        else:
            end = at + _CAME_AND_WENT.size + data[at + _CAME_AND_WENT.size - 1]
        yield at, end
        at = end
