"""Somebody from elsewhere: a network namespace with a cable into this one, that lasts as long as it is used.

What this host sends to itself is never captured, so only a visitor can prove that what comes in is. Nothing is left
behind by whoever is killed meanwhile: the kernel takes the namespace, and with it the cable, when its last holder ends.
"""

import errno
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from pyroute2.iproute.linux import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from meshnet.model.canary import FAMILIES, INBOUND_CANARY, IpFamily
from meshnet.net.sockets import reset
from meshnet_init.visitor_child import add_address, start

_OUR_END, _THEIR_END = "mnproof0", "mnproof1"
_VISITOR: dict[IpFamily, str] = {"ipv4": "192.0.2.10", "ipv6": "2001:db8::a"}
_PREFIX: dict[IpFamily, int] = {"ipv4": 30, "ipv6": 126}
_PATIENCE = 10.0  # seconds, for a program that begins
_OTHERS_PROOF = 5.0  # seconds that somebody else's proof may take: most take a tenth of one
_LOOK_AGAIN = 0.02
_MOST = 1 << 12  # bytes of a message


class NoVisitor(Exception):
    """Why there can be none here, in words."""


@contextmanager
def a_visitor() -> Iterator[dict[IpFamily, socket.socket]]:
    """A socket of the visitor's for each family that this host has; the cable's end here is INBOUND_CANARY.

    Takes CAP_NET_ADMIN, and CAP_SYS_ADMIN or a host on which anybody may make a user namespace. Raises NoVisitor.
    """
    with ExitStack() as stack:
        line, child = stack.enter_context(_started())
        _, (place,) = _heard(line)
        try:
            here = stack.enter_context(IPRoute())  # type: ignore[no-untyped-call]  # pyroute2 has types in part
            _lay_cable(here, place)
        except (NetlinkError, OSError) as error:
            raise NoVisitor(_why(error)) from error
        finally:
            os.close(place)
        index = here.link_lookup(ifname=_OUR_END)[0]
        sockets: dict[IpFamily, socket.socket] = {}
        try:
            families = [
                family
                for family in FAMILIES
                if add_address(here, index, family, INBOUND_CANARY[family], _PREFIX[family])
            ]
            here.link("set", index=index, state="up")
            addresses = {family: (_VISITOR[family], _PREFIX[family]) for family in families}
            with suppress(OSError):  # it has ended: then it says nothing either
                line.send(json.dumps({"interface": _THEIR_END, "addresses": addresses}).encode())
            told, descriptors = _heard(line)
            # Until its end it holds them, too, and to close them here would end nothing.
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
            sockets = {
                family: socket.socket(fileno=number)
                for family, number in zip(told["families"], descriptors, strict=True)
            }
            yield sockets
        except NetlinkError as error:
            raise NoVisitor(_why(error)) from error
        finally:
            # The cable is cut at once, and with it an end that has to be acknowledged would never arrive.
            for sock in sockets.values():
                reset(sock)
            with suppress(NetlinkError):  # it goes with the namespace, too
                here.link("del", index=index)


def _lay_cable(netlink: IPRoute, place: int) -> None:
    """Once nobody else has one: a keeper proves anew whenever rules are changed, just as who has changed them does.

    Raises NetlinkError.
    """
    deadline = time.monotonic() + _OTHERS_PROOF
    while True:
        try:
            netlink.link("add", ifname=_OUR_END, kind="veth", peer={"ifname": _THEIR_END, "net_ns_fd": place})
            return
        except NetlinkError as error:
            if error.code != errno.EEXIST or time.monotonic() > deadline:
                raise
        time.sleep(_LOOK_AGAIN)  # noqa: TID251 - another program's proof ends without telling us


@contextmanager
def _started() -> Iterator[tuple[socket.socket, int]]:
    """The line to a visitor, who ends with the block at the latest, and its process id."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.settimeout(_PATIENCE)
        with theirs:
            child = start(theirs)
        try:
            yield ours, child
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _heard(line: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What the visitor says, and the descriptors that come with it. Raises NoVisitor."""
    try:
        data, descriptors, _, _ = socket.recv_fds(line, _MOST, len(FAMILIES))
    except OSError as error:
        raise NoVisitor(f"the visitor says nothing: {error.strerror or error}") from error
    told = json.loads(data) if data else {"error": "the visitor has ended"}
    if "error" in told:
        raise NoVisitor(told["error"])
    return told, descriptors


def _why(error: NetlinkError | OSError) -> str:
    code = error.code if isinstance(error, NetlinkError) else error.errno
    if code == errno.EEXIST:
        return "somebody else is proving it at this moment"
    return f"no cable for a visitor: {os.strerror(code or 0)}"
