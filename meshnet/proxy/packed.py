"""Connections that have ended, in few bytes each: some twenty of one that came and went under an order."""

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import msgspec

from meshnet.model.connection import Connection
from meshnet.proxy.passed import Passed, Told
from meshnet.proxy.record import Record
from meshnet.relay.rows import Rows

Ended = Record | Passed

_MOST = 4096  # connections of a segment
_MOST_BYTES = 1 << 18
_MOST_KINDS = 1024
_KIND_BYTES = 1024  # about what a Told takes
_RAW = -zlib.MAX_WBITS  # no header and no checksum: these bytes never leave the process

_CHUNK = struct.Struct("<HI")  # what is said of all that follow, by number; their length
_WHOLE = 0xFFFF  # nothing, of a single one: its view as MessagePack follows

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Connection).decode


class Packed(NamedTuple):
    """What a segment had at one moment; any thread may read it."""

    data: bytes
    kinds: Sequence[Passed]

    def items(self) -> Iterator[Connection | Passed]:
        """In the order in which they were added."""
        data = self._unpacked()
        return (self._item(number, data[at:end]) for number, at, end in _chunks(data))

    def views(self) -> Iterator[Connection]:
        return (view for item in self.items() for view in _views(item))

    def find(self, connection_id: str) -> list[Connection]:
        """Those with that id. Of a segment without it nothing is decoded."""
        data, wanted = self._unpacked(), connection_id.encode()
        if wanted not in data:
            return []
        chunks = ((number, data[at:end]) for number, at, end in _chunks(data))
        found = (self._item(number, chunk) for number, chunk in chunks if wanted in chunk)
        return [view for item in found for view in _views(item) if view.id == connection_id]

    def _unpacked(self) -> bytes:
        return zlib.decompressobj(_RAW).decompress(self.data)

    def _item(self, number: int, chunk: bytes) -> Connection | Passed:
        if number == _WHOLE:
            return _decode(chunk)
        kind = self.kinds[number]
        return Passed(kind.told, replace(kind.rows, data=chunk))


def _views(item: Connection | Passed) -> Iterator[Connection]:
    return item.views() if isinstance(item, Passed) else iter((item,))


class Segment:
    """Some that ended one after another. It grows until it `is_full`. `last`: when the last one ended, wall seconds.

    `size`: about how many bytes it takes; the compressor still has some of those that came last.
    """

    __slots__ = ("_compressor", "_kinds", "_numbers", "_pieces", "count", "last", "size")

    def __init__(self) -> None:
        self.count = self.size = 0
        self.last = 0.0
        self._pieces: list[bytes] = []
        self._kinds: list[Passed] = []  # without rows
        self._numbers: dict[tuple[Told, Rows], int] = {}
        # Level 1: more takes two to four times as long, for a tenth of the bytes.
        self._compressor = zlib.compressobj(1, zlib.DEFLATED, _RAW)

    @property
    def is_full(self) -> bool:
        return self.count >= _MOST or self.size >= _MOST_BYTES or len(self._kinds) >= _MOST_KINDS

    def add(self, batch: Sequence[Ended], count: int) -> None:
        """`count`: how many connections that is."""
        kinds = len(self._kinds)
        chunks = b"".join([self._passed(each) if type(each) is Passed else _whole(each) for each in batch])
        piece = self._compressor.compress(chunks)
        self.count += count
        self.last = max(self.last, *(each.ended_at for each in batch))
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

    def _passed(self, passed: Passed) -> bytes:
        kind = (passed.told, replace(passed.rows, data=b""))
        number = self._numbers.get(kind)
        if number is None:
            number = self._numbers[kind] = len(self._kinds)
            self._kinds.append(Passed(*kind))
        rows = passed.rows.data
        return _CHUNK.pack(number, len(rows)) + rows


def _whole(ended: Ended) -> bytes:
    (view,) = map(_encode, ended.views())
    return _CHUNK.pack(_WHOLE, len(view)) + view


def _chunks(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The number of each, and where it begins and ends."""
    at = 0
    while at < len(data):
        number, length = _CHUNK.unpack_from(data, at)
        at += _CHUNK.size
        yield number, at, at + length
        at += length
