"""Netlink's messages and their attributes (RFC 3549, linux/netlink.h), in this machine's byte order."""

import struct
from collections.abc import Iterator

ERROR, DONE = 2, 3  # NLMSG_*
REQUEST, ACK, DUMP = 1, 4, 0x300  # NLM_F_*

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_LENGTH_AND_KIND = struct.Struct("=IH")  # its beginning
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_ERRNO = struct.Struct("=i")  # the beginning of struct nlmsgerr
_TYPE = 0x3FFF  # NLA_TYPE_MASK


def message(kind: int, flags: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, 0, 0) + body


def messages(data: bytes) -> Iterator[tuple[int, memoryview]]:
    """Kind and body of each in one datagram, up to one that is not whole."""
    view, at, size, header = memoryview(data), 0, len(data), _HEADER.size
    while at + header <= size:  # once per socket of this host
        length, kind = _LENGTH_AND_KIND.unpack_from(view, at)
        if length < header or at + length > size:
            return
        yield kind, view[at + header : at + length]
        at += _aligned(length)


def attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return (_ATTRIBUTE.pack(length, kind) + value).ljust(_aligned(length), b"\0")


def attributes(body: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Kind and value of each, up to one that is none; the last may be cut short."""
    at = 0
    while at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE, body[at + _ATTRIBUTE.size : at + length]
        at += _aligned(length)


def errno_in(body: memoryview) -> int:
    """Of an ERROR; 0 where all is well. Raises ValueError if it is too short for one."""
    if len(body) < _ERRNO.size:
        raise ValueError("no errno")
    return -int(_ERRNO.unpack_from(body)[0])


def _aligned(length: int) -> int:
    return length + 3 & ~3
