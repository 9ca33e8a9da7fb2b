"""A kernel that lacks some of what it has: names are changed on their way to it, and it says that it knows none such.

So every answer is the kernel's own, in each interface that netfilter has: expressions of nf_tables, matches and targets
of x_tables by iptables-nft and in the legacy tables. Seccomp's user notification (seccomp_unotify(2)) stops who asks.
"""

import ctypes
import fcntl
import os
import platform
import re
import select
import struct
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from io import RawIOBase

from tests.seccomp import NUMBERS, put_in, stop_at

_SECCOMP, _PIDFD_GETFD = {"x86_64": 317, "aarch64": 277}[platform.machine()], 438
_SENDTO, _SENDMSG, _SETSOCKOPT, _ = (NUMBERS[call] for call in ("sendto", "sendmsg", "setsockopt", "getsockopt"))
_SET_MODE_FILTER, _NEW_LISTENER = 1, 8  # linux/seccomp.h
_USER_NOTIF = 0x7FC00000
_NOTIF_RECV, _NOTIF_SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1
_NOTIF = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif
_FAMILIES = {"ipv4": 2, "ipv6": 10}
_LEVELS = {0: "ipv4", 41: "ipv6"}  # SOL_IP, SOL_IPV6
_ABOUT_TABLES = (64, 66, 67)  # IPT_SO_SET_REPLACE; IPT_SO_GET_REVISION_MATCH, _TARGET


def lacking(names: Collection[str], work: Callable[[], str], family: str = "") -> str:
    """What `work` returns in a child, which with its children meets a kernel without what has one of these names.

    `family`: only in the tables of that one. The family inet is neither.
    """
    reading, writing = os.pipe()
    waiting, going = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, struct.pack("=i", stopped()))
            os.read(waiting, 1)
            os.write(writing, work().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        process = os.pidfd_open(child)
        (number,) = struct.unpack("=i", pipe.read(4))
        listener = ctypes.CDLL(None).syscall(_PIDFD_GETFD, process, number, 0)
        assert listener >= 0, "the child's listener is not to be had"
        os.write(going, b"!")
        waits = select.poll()
        waits.register(listener, select.POLLIN)
        waits.register(process, select.POLLIN)
        while all(found != process for found, _ in waits.poll()):
            with suppress(FileNotFoundError):  # who asked was killed meanwhile
                _serve(listener, [name.encode() for name in names], family)
        said = pipe.read().decode()
    os.waitpid(child, 0)
    for descriptor in (process, listener, waiting, going):
        os.close(descriptor)
    return said


def stopped() -> int:
    """From here on this process and its children are stopped where they ask; what is served then, or never."""
    steps = (stop_at(call, {}, _USER_NOTIF) for call in ("sendto", "sendmsg", "setsockopt", "getsockopt"))
    return put_in(steps, lambda libc, program: libc.syscall(_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER, program))


def _serve(listener: int, names: list[bytes], family: str) -> None:
    asked = bytearray(_NOTIF.size)
    fcntl.ioctl(listener, _NOTIF_RECV, asked)
    number, pid, _, call, _, _, *arguments = _NOTIF.unpack(asked)
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        for at, size in _buffers(call, arguments, family, memory):
            told = _read(memory, at, size)
            changed = _changed(told, names, family if call in (_SENDTO, _SENDMSG) else "")
            if changed != told:
                memory.seek(at)
                memory.write(changed)
    fcntl.ioctl(listener, _NOTIF_SEND, struct.pack("=QqiI", number, 0, 0, _CONTINUE))


def _buffers(call: int, arguments: list[int], family: str, memory: RawIOBase) -> Iterator[tuple[int, int]]:
    """Where what is said to the kernel is, and how long."""
    _, second, third, fourth, fifth, _ = arguments
    if call == _SENDTO:
        yield second, third
    elif call == _SENDMSG:
        vectors, count = struct.unpack_from("=16xQQ", _read(memory, second, 32))
        for place in range(count):
            at, size = struct.unpack("=QQ", _read(memory, vectors + 16 * place, 16))
            yield at, size
    elif third in _ABOUT_TABLES and _LEVELS.get(second, "") in (family or _LEVELS.values()):
        yield fourth, fifth if call == _SETSOCKOPT else 30  # struct xt_get_revision


def _changed(told: bytes, names: list[bytes], family: str) -> bytes:
    if family:  # of netlink's messages those of the family: struct nlmsghdr, struct nfgenmsg
        parts, at = [], 0
        while at + 17 <= len(told) and (size := (int.from_bytes(told[at : at + 4], sys.byteorder) + 3) & ~3):
            message = told[at : at + size]
            parts.append(_changed(message, names, "") if message[16] == _FAMILIES[family] else message)
            at += size
        return b"".join(parts) + told[at:]
    for name in names:
        told = re.sub(rb"(?<![\w?])" + name + rb"(?=\0)", b"?" + name[1:], told)
    return told


def _read(memory: RawIOBase, at: int, size: int) -> bytes:
    memory.seek(at)
    return memory.read(size) or b""
