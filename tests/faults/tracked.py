"""The kernel's table of tracked connections, full for real.

How many entries there may be is the machine's (nf_conntrack_max), and only the first network namespace may change it.
But each namespace is held to it by its own count, so one can be filled and no other knows of it. The entries are
written by netlink (linux/netfilter/nfnetlink_conntrack.h), as of connections that both ends have confirmed: only others
give way.
"""

import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.world import Host

_NETLINK_NETFILTER = 12
_NEW, _DELETE = 0x100, 0x102
_REQUEST, _CREATE = 0x1, 0x400
_ERROR = 2
_ORIGINAL, _REPLY, _STATUS, _TIMEOUT = 1, 2, 3, 7
_SEEN_REPLY, _ASSURED, _CONFIRMED = 2, 4, 8
_UDP = 17
_LONG = 3600  # seconds
_AT_ONCE = 256  # entries in a datagram

# 198.18.0.0/15 is for such things (RFC 2544). The client's address and port are put in for each entry.
_CLIENT, _CLIENT_PORT = b"\xff\xfe\xfd\xfc", b"\xfb\xfa"
_SERVER, _SERVER_PORT = socket.inet_aton("198.19.0.1"), struct.pack("!H", 9)
_FIRST_CLIENT = struct.unpack("!I", socket.inet_aton("198.18.0.0"))[0]


class Table:
    """A host's. `fill` may be called again: what it had before goes as its connections end."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._netlink = host.open_socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._netlink.bind((0, 0))
        self._netlink.setblocking(False)
        self._filled = 0

    def fill(self) -> None:
        """Returns when the kernel takes no more. Raises OSError when it does not take them for another reason."""
        while (error := self._write(_NEW_ENTRY, range(self._filled, self._filled + _AT_ONCE))) == 0:
            self._filled += _AT_ONCE
        self._filled += _AT_ONCE  # some of the last ones are there
        if error != errno.ENOMEM:
            raise OSError(error, "the entry is not taken")

    def count(self) -> int:
        with self._host.entered():
            return int(Path("/proc/sys/net/netfilter/nf_conntrack_count").read_text())

    def close(self) -> None:
        for begin in range(0, self._filled, _AT_ONCE):
            self._write(_OLD_ENTRY, range(begin, begin + _AT_ONCE))
        self._netlink.close()

    def _write(self, entry: bytes, numbers: range) -> int:
        """0, or the first error that the kernel answers."""
        self._netlink.send(b"".join(_numbered(entry, number) for number in numbers))
        first = 0
        while True:
            try:
                answer = self._netlink.recv(65536)
            except BlockingIOError:
                return first
            _, kind, _, _, _, error = struct.unpack_from("=IHHIIi", answer)
            assert kind == _ERROR
            first = first or -error


@contextmanager
def full_table(host: Host) -> Iterator[Table]:
    """Full until the block is left; then it has its places back."""
    table = Table(host)
    try:
        table.fill()
        yield table
    finally:
        table.close()


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _nested(kind: int, *attributes: bytes) -> bytes:
    return _attribute(kind | 0x8000, b"".join(attributes))


def _tuple(kind: int, source: bytes, source_port: bytes, to: bytes, port: bytes) -> bytes:
    protocol = (_attribute(1, bytes([_UDP])), _attribute(2, source_port), _attribute(3, port))
    return _nested(kind, _nested(1, _attribute(1, source), _attribute(2, to)), _nested(2, *protocol))


def _message(kind: int, flags: int, *attributes: bytes) -> bytes:
    body = struct.pack("=BBH", socket.AF_INET, 0, 0) + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body


def _numbered(entry: bytes, number: int) -> bytes:
    client = struct.pack("!I", _FIRST_CLIENT + (number >> 16))
    return entry.replace(_CLIENT, client).replace(_CLIENT_PORT, struct.pack("!H", number & 0xFFFF))


_THERE = _tuple(_ORIGINAL, _CLIENT, _CLIENT_PORT, _SERVER, _SERVER_PORT)
_NEW_ENTRY = _message(
    _NEW,
    _REQUEST | _CREATE,
    _THERE,
    _tuple(_REPLY, _SERVER, _SERVER_PORT, _CLIENT, _CLIENT_PORT),
    _attribute(_STATUS, struct.pack("!I", _SEEN_REPLY | _ASSURED | _CONFIRMED)),
    _attribute(_TIMEOUT, struct.pack("!I", _LONG)),
)
_OLD_ENTRY = _message(_DELETE, _REQUEST, _THERE)
