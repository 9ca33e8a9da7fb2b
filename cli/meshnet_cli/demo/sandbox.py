"""Namespaces of our own, with or without root. Nothing done in here reaches the host, and it all ends with us."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meshnet.errors import CommandError

# <linux/sched.h>, <linux/mount.h>
_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_MS_REC_PRIVATE = 0x4000 | 0x40000

_libc = ctypes.CDLL(None, use_errno=True)
_inside = False


def enter_sandbox() -> None:
    """Move this process into a network and a mount namespace of its own, with an empty /run; once is enough.

    Without root it becomes root of a user namespace first, which Linux allows while there is one thread.
    Raises CommandError when the kernel refuses.
    """
    global _inside
    if _inside:
        return
    try:
        _unshare()
        _call("mount", None, b"/", None, ctypes.c_ulong(_MS_REC_PRIVATE), None)
        # iptables locks /run/xtables.lock, which belongs to the host's root.
        _call("mount", b"tmpfs", b"/run", b"tmpfs", ctypes.c_ulong(0), None)
    except OSError as error:
        raise _refused(error) from error
    done = subprocess.run(
        ["ip", "link", "set", "lo", "up"], capture_output=True, text=True, env=os.environ | {"PATH": search_path()}
    )
    if done.returncode:
        raise _no_rights(done.stderr.strip())
    _inside = True


def new_namespace() -> int:
    """A new network namespace, held by the file descriptor returned; it ends when nothing holds it any more."""
    home = _this_namespace()
    try:
        _call("unshare", _CLONE_NEWNET)
        try:
            return _this_namespace()
        finally:
            _call("setns", home, _CLONE_NEWNET)
    finally:
        os.close(home)


@contextmanager
def entered(namespace: int) -> Iterator[None]:
    """This thread inside a network namespace: sockets made and programs started in the block stay there.

    Never await in the block: other tasks of the thread would be in there too.
    """
    home = _this_namespace()
    try:
        _call("setns", namespace, _CLONE_NEWNET)
        try:
            yield
        finally:
            _call("setns", home, _CLONE_NEWNET)
    finally:
        os.close(home)


def search_path() -> str:
    """Where programs are looked for: beside this Python first, and where Debian keeps nft, too."""
    places = (str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")
    return os.pathsep.join(places)


def _unshare() -> None:
    try:
        _call("unshare", _CLONE_NEWNET | _CLONE_NEWNS)
    except PermissionError:
        uid, gid = os.geteuid(), os.getegid()
        _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWNS)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


# What commonly stands in the way, and its value then.
_OBSTACLES = {
    "kernel/apparmor_restrict_unprivileged_userns": "1",  # Ubuntu since 23.10
    "kernel/unprivileged_userns_clone": "0",
    "user/max_user_namespaces": "0",
}


def _refused(error: OSError) -> CommandError:
    obstacles = [
        f"{switch.replace('/', '.')} = {value}"
        for switch, value in _OBSTACLES.items()
        if (file := Path("/proc/sys", switch)).exists() and file.read_text().strip() == value
    ]
    return CommandError(
        "cannot make network namespaces without root",
        why=f"this machine refuses unprivileged user namespaces ({', '.join(obstacles) or error})",
        fix="run the same command with sudo: it still stays inside namespaces of its own",
    )


def _no_rights(said: str) -> CommandError:
    return CommandError(
        "cannot set up a network here",
        why=f"this looks like a container without the capability NET_ADMIN ({said})",
        fix="run it on a machine or a virtual machine, or in a container with --privileged",
    )


def _this_namespace() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
