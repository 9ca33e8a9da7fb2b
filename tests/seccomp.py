"""System calls that a process is refused from here on: a filter as a container's runtime has it, seccomp(2)."""

import ctypes
import os
import platform
import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

NUMBERS = {
    "x86_64": {
        "socket": 41, "sendto": 44, "sendmsg": 46, "setsockopt": 54, "getsockopt": 55, "unshare": 272, "accept4": 288,
        "capset": 126,
    },
    "aarch64": {
        "socket": 198, "sendto": 206, "sendmsg": 211, "setsockopt": 208, "getsockopt": 209, "unshare": 97,
        "accept4": 242, "capset": 91,
    },
}[platform.machine()]  # fmt: skip
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
    steps = (stop_at(refusal.call, refusal.arguments, _ERRNO | refusal.code) for refusal in refusals)
    put_in(steps, lambda libc, filters: libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, filters))


def put_in(steps: Iterable[bytes], how: Callable[[Any, Any], int]) -> int:
    """A filter of these steps that lets pass what none of them stops. What `how` returns, given libc and the filter."""
    program = b"".join(steps) + _step(_RETURN, _ALLOW)
    buffer = ctypes.create_string_buffer(program)
    filters = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(program) // 8, ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    done = how(libc, filters)
    assert done >= 0, os.strerror(ctypes.get_errno())
    return done


def stop_at(call: str, arguments: dict[int, int], verdict: int) -> bytes:
    """The steps that return `verdict` for a system call where all of these arguments have these values."""
    places = ((16 + 8 * place, value) for place, value in arguments.items())  # struct seccomp_data
    tests = [(0, NUMBERS[call]), *places]
    steps = b""
    for at, (offset, value) in enumerate(tests):
        behind = 2 * (len(tests) - at - 1) + 1
        steps += _step(_LOAD, offset) + _step(_EQUAL, value, otherwise=behind)
    return steps + _step(_RETURN, verdict)


def _step(code: int, value: int, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, 0, otherwise, value)
