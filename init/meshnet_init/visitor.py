"""Somebody from elsewhere: a network namespace with a cable into this one, that lasts as long as it is used.

What this host sends to itself is never captured, so only a visitor can prove that what comes in is. Nothing is left
behind by whoever is killed meanwhile: the kernel takes the namespace, and with it the cable, when its last holder ends.
"""

import ctypes
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyroute2.iproute.linux import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from meshnet.model.canary import FAMILIES, INBOUND_CANARY, IpFamily
from meshnet.net.sockets import reset

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_IFA_F_NODAD = 0x02  # linux/if_addr.h: usable at once, as nobody else is on the cable
_OUR_END, _THEIR_END = "mnproof0", "mnproof1"
_VISITOR: dict[IpFamily, str] = {"ipv4": "192.0.2.10", "ipv6": "2001:db8::a"}
_PREFIX: dict[IpFamily, int] = {"ipv4": 30, "ipv6": 126}
_ADDRESS_FAMILY: dict[IpFamily, int] = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}


class NoVisitor(Exception):
    """Why there can be none here, in words."""


@contextmanager
def a_visitor() -> Iterator[dict[IpFamily, socket.socket]]:
    """A socket of the visitor's for each family that this host has; the cable's end here is INBOUND_CANARY.

    Takes CAP_SYS_ADMIN beside CAP_NET_ADMIN. Raises NoVisitor.
    """
    place = _new_namespace()
    try:
        with IPRoute() as here:  # type: ignore[no-untyped-call]  # pyroute2 has types in part
            try:
                here.link("add", ifname=_OUR_END, kind="veth", peer={"ifname": _THEIR_END, "net_ns_fd": place})
            except (NetlinkError, OSError) as error:
                raise NoVisitor(_why(error)) from error
            index = here.link_lookup(ifname=_OUR_END)[0]
            sockets: dict[IpFamily, socket.socket] = {}
            try:
                families = [family for family in FAMILIES if _add_address(here, index, family, INBOUND_CANARY[family])]
                here.link("set", index=index, state="up")
                sockets = _in(place, families)
                yield sockets
            finally:
                # The cable is cut at once, and with it an end that has to be acknowledged would never arrive.
                for sock in sockets.values():
                    reset(sock)
                here.link("del", index=index)
    finally:
        os.close(place)


def _new_namespace() -> int:
    """A descriptor of one. A thread makes it, and ends: a namespace is a thread's (unshare(2))."""
    made: list[int] = []
    failed: list[int] = []

    def make() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
            failed.append(ctypes.get_errno())
        else:
            made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    _run(make)
    if failed:
        raise NoVisitor(f"no network namespace for a visitor: {os.strerror(failed[0])} (it takes CAP_SYS_ADMIN)")
    return made[0]


def _in(place: int, families: list[IpFamily]) -> dict[IpFamily, socket.socket]:
    """Sockets of that namespace, after its end of the cable is up."""
    sockets: dict[IpFamily, socket.socket] = {}
    failed: list[str] = []

    def enter() -> None:
        if ctypes.CDLL(None, use_errno=True).setns(place, _CLONE_NEWNET):
            failed.append(os.strerror(ctypes.get_errno()))
            return
        try:
            with IPRoute() as there:  # type: ignore[no-untyped-call]  # as above
                index = there.link_lookup(ifname=_THEIR_END)[0]
                for family in families:
                    if _add_address(there, index, family, _VISITOR[family]):
                        sockets[family] = socket.socket(_ADDRESS_FAMILY[family], socket.SOCK_STREAM)
                there.link("set", index=index, state="up")
        except (NetlinkError, OSError) as error:
            failed.append(_why(error))

    _run(enter)
    if failed:
        for sock in sockets.values():
            sock.close()
        raise NoVisitor(failed[0])
    return sockets


def _add_address(netlink: IPRoute, index: int, family: IpFamily, address: str) -> bool:
    """False where the namespace does without the family."""
    try:
        netlink.addr("add", index=index, address=address, prefixlen=_PREFIX[family], flags=_IFA_F_NODAD)
    except NetlinkError as error:
        if family == "ipv6" and error.code in (errno.EACCES, errno.EPERM, errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
            return False
        raise NoVisitor(_why(error)) from error
    return True


def _run(what: Callable[[], None]) -> None:
    thread = threading.Thread(target=what, name="visitor")
    thread.start()
    thread.join()


def _why(error: NetlinkError | OSError) -> str:
    code = error.code if isinstance(error, NetlinkError) else error.errno
    if code == errno.EEXIST:
        return "somebody else is proving it at this moment"
    return f"no cable for a visitor: {os.strerror(code or 0)}"
