"""The visitor: a process in a network namespace of its own, which gives sockets of that to who started it, and ends.

One message a packet, in JSON. It says {} and sends a descriptor of its namespace; hears which addresses it is to have
once its end of the cable is there, {"interface": NAME, "addresses": {FAMILY: [ADDRESS, PREFIX]}}; and says
{"families": [...]}, with a TCP socket of each. It may say {"error": WHY} instead.
"""

import ctypes
import errno
import json
import os
import signal
import socket
from typing import Any

from pyroute2.iproute.linux import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from meshnet.model.canary import IpFamily

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_FAMILIES = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
_IFA_F_NODAD = 0x02  # linux/if_addr.h: usable at once, as nobody else is on the cable
_MOST = 1 << 12  # bytes of a message


def start(line: socket.socket) -> int:
    """Its process id; it ends when we do.

    A fork and no program of its own: to import what it needs would take many times as long as all that it does.
    """
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() == parent:
                _keep_only(line.fileno())
                _visit(line)
        finally:
            os._exit(0)
    return child


def _keep_only(descriptor: int) -> None:
    """What else we have been born with is to end with who started us: listeners, locks, a table that it owns."""
    os.closerange(3, descriptor)
    os.closerange(descriptor + 1, os.sysconf("SC_OPEN_MAX"))


def _visit(line: socket.socket) -> None:
    try:
        place = _new_namespace()
    except OSError as error:
        line.send(json.dumps({"error": f"no network namespace for a visitor: {error.strerror}"}).encode())
        return
    socket.send_fds(line, [b"{}"], [place])
    if not (asked := line.recv(_MOST)):
        return
    sockets, why = _settle(json.loads(asked))
    told = {"error": why} if why else {"families": list(sockets)}
    socket.send_fds(line, [json.dumps(told).encode()], [sock.fileno() for sock in sockets.values()])


def _new_namespace() -> int:
    """A descriptor of it. Raises OSError.

    Without CAP_SYS_ADMIN (a container, a service with few rights) it takes a user namespace as well, where the host
    lets everybody make one; who has started us owns that, and may bring a cable.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) and libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _settle(asked: dict[str, Any]) -> tuple[dict[str, socket.socket], str]:
    """Addresses for our end of the cable, and a socket for each family that has one; or why not."""
    sockets: dict[str, socket.socket] = {}
    try:
        with IPRoute() as here:  # type: ignore[no-untyped-call]  # pyroute2 has types in part
            index = here.link_lookup(ifname=asked["interface"])[0]
            for family, (address, prefix) in asked["addresses"].items():
                if add_address(here, index, family, address, prefix):
                    sockets[family] = socket.socket(_FAMILIES[family], socket.SOCK_STREAM)
            here.link("set", index=index, state="up")
    except (NetlinkError, OSError) as error:
        code = error.code if isinstance(error, NetlinkError) else error.errno
        return {}, f"no cable for a visitor: {os.strerror(code or errno.EIO)}"
    return sockets, ""


def add_address(netlink: IPRoute, index: int, family: IpFamily, address: str, prefix: int) -> bool:
    """False where the namespace does without the family. Raises NetlinkError."""
    try:
        netlink.addr("add", index=index, address=address, prefixlen=prefix, flags=_IFA_F_NODAD)
    except NetlinkError as error:
        if family == "ipv6" and error.code in (errno.EACCES, errno.EPERM, errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
            return False
        raise
    return True
