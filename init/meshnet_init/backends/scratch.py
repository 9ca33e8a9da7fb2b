"""A network namespace to try things in, so that nothing of it is ever seen by anybody."""

import ctypes
import os
import select
import signal
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import msgspec

from meshnet.errors import CommandError
from meshnet_init.backends import hung

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
_PR_SET_PDEATHSIG, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 1, 47, 2  # linux/prctl.h
_CAPABILITY_VERSION_3, _CAP_NET_ADMIN, _CAP_NET_RAW = 0x20080522, 12, 13  # linux/capability.h
_NO_RIGHT = 5  # the code of a CommandError
_PATIENCE = 120.0  # seconds: more than any program gets that a probe starts

T = TypeVar("T")


class Tried(NamedTuple, Generic[T]):
    """What a probe found; `here`: why it looked in this namespace, empty where it had one of its own."""

    found: T
    here: str = ""


class _Answer(msgspec.Struct, kw_only=True):
    """Of the child: what the probe returned, as JSON, or what it raised; or why there is no namespace for it."""

    found: msgspec.Raw = msgspec.Raw(b"null")
    error: tuple[str, str, str, int] | None = None
    nowhere: str = ""


def tried_in_scratch(probe: Callable[[], T], kind: type[T], patience: float = _PATIENCE) -> Tried[T]:
    """What `probe` returns, which JSON can say, in a network namespace that ends with it.

    Without CAP_SYS_ADMIN (a container, a service with few rights) it takes a user namespace as well. Where none may be
    made either the probe runs in this network namespace, so it must never put into force what it tries. Raises
    CommandError: what `probe` raises, whatever that is; when its process has died; and with code 6 when it has not
    ended after `patience` seconds.
    """
    answer = _in_child(partial(_elsewhere, probe), patience)
    here = answer.nowhere
    if here:
        answer = _in_child(partial(_said, probe), patience)
    if answer.error is not None:
        what, why, fix, code = answer.error
        raise CommandError(what, why=why, fix=fix, code=code)
    return Tried(msgspec.json.decode(answer.found, type=kind), here)


def _in_child(work: Callable[[], _Answer], patience: float) -> _Answer:
    """A process of many threads may make no user namespace: unshare(2). Its fork has one, and may be ended."""
    reading, writing = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() == parent:
                os.write(writing, msgspec.json.encode(work()))
        finally:
            os._exit(0)
    try:
        os.close(writing)
        said = _read(reading, patience)
    except BaseException:
        _kill(child)
        raise
    finally:
        os.close(reading)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if said:
        return msgspec.json.decode(said, type=_Answer)
    raise CommandError(
        "the trial of the rules has died",
        why=f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}, and without a word",
        fix="see why, and try it again: dmesg | tail",
    )


def _read(descriptor: int, patience: float) -> bytes:
    """All that comes. Raises CommandError."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    until, said = time.monotonic() + patience, b""
    while poll.poll(max(0.0, until - time.monotonic()) * 1000):
        part = os.read(descriptor, 1 << 16)
        if not part:
            return said
        said += part
    raise hung("the trial of the rules", patience)


def _kill(child: int) -> None:
    """And what it has started, which is of its process group."""
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError):  # it has not made its group yet
            kill(child, signal.SIGKILL)


def _elsewhere(probe: Callable[[], object]) -> _Answer:
    try:
        as_somebody_else = _enter()
    except OSError as error:
        return _Answer(nowhere=error.strerror or str(error))
    answer = _said(probe)
    if as_somebody_else and answer.error is not None and answer.error[-1] == _NO_RIGHT:
        # AppArmor, say: a user namespace, and nothing to do in it.
        return _Answer(nowhere=f"in a user namespace: {answer.error[0]}")
    return answer


def _said(probe: Callable[[], object]) -> _Answer:
    try:
        return _Answer(found=msgspec.Raw(msgspec.json.encode(probe())))
    except CommandError as error:
        return _Answer(error=(error.what, error.why, error.fix, error.code))
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        return _Answer(error=("the trial of the rules has failed", why, "collect what is known: meshnet bug-report", 1))


def _enter() -> bool:
    """Moves this process into a new network namespace. Whether that took a user namespace. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(_CLONE_NEWNET) == 0:
        return False
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    # A rule may name no id that is not mapped.
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    if uid:  # root there, whose programs need not be handed anything
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    else:  # to map root's takes CAP_SETFCAP: user_namespaces(7)
        _hand_down_rights(libc)
    return True


def _hand_down_rights(libc: ctypes.CDLL) -> None:
    """To programs that are started here: whose uid is not root's they would have none, capabilities(7)."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    held = ctypes.create_string_buffer(24)  # two of struct __user_cap_data_struct
    libc.capget(header, held)
    effective, permitted, _, *high = struct.unpack("=6I", held.raw)
    libc.capset(header, struct.pack("=6I", effective, permitted, 1 << _CAP_NET_ADMIN | 1 << _CAP_NET_RAW, *high))
    for capability in (_CAP_NET_ADMIN, _CAP_NET_RAW):
        libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability, 0, 0)
