"""System calls that a process is refused from here on: a filter as a container's runtime has it, seccomp(2)."""

import ctypes
import os
import platform
import struct
from typing import NamedTuple

_NUMBERS = {
    "x86_64": {"socket": 41, "getsockopt": 55, "accept4": 288, "unshare": 272},
    "aarch64": {"socket": 198, "getsockopt": 209, "accept4": 242, "unshare": 97},
}[platform.machine()]
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # linux/seccomp.h
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h: LD|W|ABS, JMP|JEQ|K, RET|K
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _MODE_FILTER = 22, 38, 2


class Refusal(NamedTuple):
    """Of a system call, where all of these arguments, by their places, have these values."""

    call: str
    arguments: dict[int, int]
    code: int  # the errno it gets


def refuse(*refusals: Refusal) -> None:
    """For this thread, what it starts, and their children; there is no way back."""
    program = b"".join(map(_steps, refusals)) + _step(_RETURN, _ALLOW)
    buffer = ctypes.create_string_buffer(program)
    filters = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(program) // 8, ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, filters) == 0, os.strerror(ctypes.get_errno())


def _steps(refusal: Refusal) -> bytes:
    arguments = ((16 + 8 * place, value) for place, value in refusal.arguments.items())  # struct seccomp_data
    tests = [(0, _NUMBERS[refusal.call]), *arguments]
    steps = b""
    for at, (offset, value) in enumerate(tests):
        behind = 2 * (len(tests) - at - 1) + 1
        steps += _step(_LOAD, offset) + _step(_EQUAL, value, otherwise=behind)
    return steps + _step(_RETURN, _ERRNO | refusal.code)


def _step(code: int, value: int, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, 0, otherwise, value)
