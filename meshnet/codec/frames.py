"""The frames of meshnet/1, both ways. `meshnet.tunnel.protocol` says who may send which, and when.

A frame is a kind (1 byte), the length of the payload (3 bytes, big endian) and the payload:

    kind         payload
    0 DATA       1 to 16380 bytes of the application's; with its header it fills at most one TLS record (RFC 8446, 5.1)
    1 OPEN       JSON object `Open`
    2 OPENED     none
    3 REFUSED    JSON object `Refused`
    4 FIN        none
    5 RESET      JSON object `Reset`
    6 PING       none
    7 PONG       none
    8 GOAWAY     none

A JSON object is UTF-8 (RFC 8259), at most 4096 bytes; a field at its default may be left out, and an unknown one is
passed over, so that a field can be added without a new version. Everything else that is not as written here (kind,
length, a value out of range) is an error, after which the connection is of no further use.
"""

import enum
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from meshnet.errors import TunnelError
from meshnet.model.address import canonical_host
from meshnet.model.service import MOST_CHECKED

HEADER_SIZE = 4
MAX_RECORD = 16384
MAX_DATA = MAX_RECORD - HEADER_SIZE
MAX_CONTROL = 4096  # more than any OPEN we write; a peer that says more is hostile
MAX_DETAIL = 512  # even as four bytes a character it fits a control frame

# What a peer says ends up in a terminal and in the log, so no text may carry a control character or turn its direction.
_UNPRINTABLE = r"\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_UNPRINTABLE_TEXT = re.compile(f"[{_UNPRINTABLE}]+")
_ASCII = re.compile(r"[!-~]*")
# OPEN is read for every connection: one look over its JSON finds that there is nothing in it to look for.
_UNUSUAL = re.compile(rb"[^!-\[\]-~]")

_Address = Annotated[str, Meta(max_length=64)]
_Port = Annotated[int, Meta(ge=1, le=65535)]
_Id = Annotated[str, Meta(max_length=64)]
_Traceparent = Annotated[str, Meta(max_length=128)]
_Service = Annotated[str, Meta(max_length=330)]
_Name = Annotated[str, Meta(max_length=330, pattern=rf"^[^{_UNPRINTABLE}]*\Z")]  # namespace/name in Kubernetes is 317
_Reason = Annotated[str, Meta(max_length=64, pattern=r"^[a-z][a-z0-9_.]*\Z")]
_Detail = Annotated[str, Meta(max_length=MAX_DETAIL, pattern=rf"^[^{_UNPRINTABLE}]*\Z")]
_Words = Annotated[str, Meta(max_length=MOST_CHECKED)]
_Milliseconds = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class Kind(enum.IntEnum):
    DATA = 0
    OPEN = 1
    OPENED = 2
    REFUSED = 3
    FIN = 4
    RESET = 5
    PING = 6
    PONG = 7
    GOAWAY = 8


class Check(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is sent to the application, and has to be in its answer; without both, a connect is enough."""

    send: _Words = ""
    expect: _Words = ""


class Open(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Asks for a connection to `host`:`port`, the application's address behind the peer sidecar.

    `host` is an IP address without a zone. `id` names the connection on both sides; `deadline` is the milliseconds
    the asker will wait, 0: not said. `traceparent` is as in W3C Trace Context. With `check` it asks for no connection,
    but whether there could be one: it is answered by REFUSED, with the reason `ok` if so.
    """

    host: _Address
    port: _Port
    service: _Service = ""
    source: _Address = ""
    id: _Id = ""
    traceparent: _Traceparent = ""
    deadline: _Milliseconds = 0
    check: Check | None = None


class Refused(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`reason` is a code of `meshnet.errors.Reason`, or one that a newer peer knows."""

    reason: _Reason
    policy: _Name = ""
    detail: _Detail = ""


class Reset(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    reason: _Reason


@dataclass(slots=True)  # not frozen: making one is on the way of every message, and that would double its cost
class Data:
    payload: memoryview


@dataclass(frozen=True, slots=True)
class Opened:
    pass


@dataclass(frozen=True, slots=True)
class Fin:
    pass


@dataclass(frozen=True, slots=True)
class Ping:
    pass


@dataclass(frozen=True, slots=True)
class Pong:
    pass


@dataclass(frozen=True, slots=True)
class GoAway:
    pass


Frame = Open | Opened | Refused | Data | Fin | Reset | Ping | Pong | GoAway

KINDS: dict[type[Frame], Kind] = {
    Data: Kind.DATA,
    Open: Kind.OPEN,
    Opened: Kind.OPENED,
    Refused: Kind.REFUSED,
    Fin: Kind.FIN,
    Reset: Kind.RESET,
    Ping: Kind.PING,
    Pong: Kind.PONG,
    GoAway: Kind.GOAWAY,
}


def data_header(size: int) -> bytes:
    """What goes before `size` bytes of the application's. Raises ValueError unless 1 <= size <= MAX_DATA."""
    if not 0 < size <= MAX_DATA:
        raise ValueError(f"a DATA frame carries 1 to {MAX_DATA} bytes, not {size}")
    return size.to_bytes(HEADER_SIZE, "big")  # DATA is kind 0


def encode(frame: Frame) -> bytes:
    """The whole frame. `detail` is cut and cleaned to fit; any other value that a peer would refuse: ValueError."""
    match frame:
        case Data():
            return data_header(len(frame.payload)) + frame.payload
        case Open() | Reset():
            payload = msgspec.json.encode(frame)
        case Refused():
            payload = msgspec.json.encode(msgspec.structs.replace(frame, detail=_printable(frame.detail)))
        case Opened() | Fin() | Ping() | Pong() | GoAway():
            payload = b""
    shape = _SHAPES[KINDS[type(frame)]]
    if not shape.least <= len(payload) <= shape.most:
        raise _wrong_size(shape, len(payload))
    shape.decode(memoryview(payload))  # what we would not take, we do not send
    return _HEADER.pack(shape.kind << 24 | len(payload)) + payload


class Reader:
    """Turns what a peer sent, in any pieces, into frames. Holds at most one incomplete frame."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """The frames that `data` completes; payloads may be views into `data`. Raises TunnelError.

        After an error the reader is of no further use; frames that came in the same piece are lost with it.
        """
        # On a busy tunnel one read is one TLS record is one DATA frame. DATA is kind 0, so its header is its length.
        if not self._held and HEADER_SIZE < (size := len(data)) <= MAX_RECORD:
            (header,) = _HEADER.unpack_from(data)
            if header == size - HEADER_SIZE:
                return [Data(memoryview(data)[HEADER_SIZE:])]
        try:
            return self._take_apart(memoryview(data))
        except (ValueError, RecursionError) as error:  # JSON nested too deep is a RecursionError
            raise TunnelError(f"malformed frame: {error}") from error

    @property
    def is_between(self) -> bool:
        """Nothing has come of the next frame."""
        return not self._held

    def give_away(self) -> bytes:
        """The bytes of the incomplete frame, which it then holds no more."""
        held, self._held = bytes(self._held), bytearray()
        return held

    def _take_apart(self, view: memoryview) -> list[Frame]:
        frames: list[Frame] = []
        while view:
            if self._held or len(view) < HEADER_SIZE:
                view = self._hold(view, HEADER_SIZE)
                if len(self._held) < HEADER_SIZE:
                    break
            shape, size = _parse_header(self._held or view)
            whole = HEADER_SIZE + size
            if self._held or len(view) < whole:
                view = self._hold(view, whole)
                if len(self._held) < whole:
                    break
                frame, self._held = memoryview(self._held), bytearray()
            else:
                frame, view = view[:whole], view[whole:]
            frames.append(shape.decode(frame[HEADER_SIZE:]))
        return frames

    def _hold(self, view: memoryview, size: int) -> memoryview:
        """Moves bytes from `view` until `size` are held; returns the rest."""
        missing = max(0, size - len(self._held))
        self._held += view[:missing]
        return view[missing:]


_HEADER = struct.Struct(">I")


def _parse_header(data: bytearray | memoryview) -> tuple["_Shape", int]:
    (header,) = _HEADER.unpack_from(data)
    size = header & 0xFFFFFF
    try:
        shape = _SHAPES[header >> 24]
    except IndexError:
        raise ValueError(f"{header >> 24} is not a valid Kind") from None
    if not shape.least <= size <= shape.most:
        raise _wrong_size(shape, size)
    return shape, size


def _decode_open(payload: memoryview) -> Open:
    asked = _open_from_json(payload)
    if _UNUSUAL.search(payload):
        _check_open(asked)
    if "%" in asked.host:
        raise ValueError(f"{asked.host!r}: a zone means nothing on another host")
    host = canonical_host(asked.host)
    return asked if host == asked.host else msgspec.structs.replace(asked, host=host)


def _check_open(asked: Open) -> None:
    for text in (asked.host, asked.source, asked.id, asked.traceparent):
        if not _ASCII.fullmatch(text):
            raise ValueError(f"{text!r} is not printable ASCII")
    if _UNPRINTABLE_TEXT.search(asked.service):
        raise ValueError(f"{asked.service!r} has unprintable characters")


def _wrong_size(shape: "_Shape", size: int) -> ValueError:
    return ValueError(f"a payload of {size} bytes in a {shape.kind.name} frame")


def _printable(text: str) -> str:
    return _UNPRINTABLE_TEXT.sub(" ", text)[:MAX_DETAIL]


decode_reset = msgspec.json.Decoder(Reset).decode
decode_refused = msgspec.json.Decoder(Refused).decode
_open_from_json = msgspec.json.Decoder(Open).decode


class _Shape(NamedTuple):
    """What a kind's payload may be: its size, and what it decodes to (raises ValueError)."""

    kind: Kind
    least: int
    most: int
    decode: Callable[[memoryview], Frame]


def _always(frame: Frame) -> Callable[[memoryview], Frame]:
    return lambda payload: frame


_SHAPES = (
    _Shape(Kind.DATA, 1, MAX_DATA, Data),
    _Shape(Kind.OPEN, 0, MAX_CONTROL, _decode_open),
    _Shape(Kind.OPENED, 0, 0, _always(Opened())),
    _Shape(Kind.REFUSED, 0, MAX_CONTROL, decode_refused),
    _Shape(Kind.FIN, 0, 0, _always(Fin())),
    _Shape(Kind.RESET, 0, MAX_CONTROL, decode_reset),
    _Shape(Kind.PING, 0, 0, _always(Ping())),
    _Shape(Kind.PONG, 0, 0, _always(Pong())),
    _Shape(Kind.GOAWAY, 0, 0, _always(GoAway())),
)
