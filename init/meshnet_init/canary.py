"""A connection that reaches its goal only if the kernel's rules capture it, one for each family.

Where a proxy runs, it answers for the canary address. Where none does (a pod's init container), we listen in its place
and look at what arrives: the original destination must be the canary's, and a random token must come through.
"""

import errno
import ipaddress
import os
import secrets
import select
import socket
import time
from collections.abc import Iterator
from typing import Literal

import msgspec
from pyroute2.iproute.linux import IPRoute

from meshnet.errors import ConnectionFailed
from meshnet.model.address import Address
from meshnet.model.canary import CANARY, CANARY_PORT, IpFamily, greeting
from meshnet.net.canary import begin_connect
from meshnet.net.original import original_destination
from meshnet.net.sockets import make_transparent
from meshnet_init.rule import Plan, captures, is_for_canary
from meshnet_init.values import Ports

Status = Literal["captured", "not captured", "no route", "not in the plan", "not tried"]

PATIENCE = 3.0  # for one family
_ADDRESS_FAMILY = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
_LOOPBACK = {"ipv4": "127.0.0.1", "ipv6": "::1"}
_ANY = {"ipv4": "0.0.0.0", "ipv6": "::"}


class Canary(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What became of one family's canary. Only `not captured` is a failure: without a route nothing can leak.

    `by_us`: captured, and we were there in the place of a proxy that is not.
    """

    direction: Literal["outbound", "inbound"] = "outbound"
    family: IpFamily
    status: Status
    destination: str = ""
    detail: str = ""
    by_us: bool = False


class _NoRoute(Exception):
    """The kernel has no way to the destination, so there was no packet for a rule to match."""


def fly(plan: Plan, family: IpFamily, outbound_port: int, gid: int, *, proxy_runs: bool = False) -> Canary:
    """Sends one family's canary through the rules in this namespace. `proxy_runs`: then nobody may take its place."""
    if family == "ipv6" and not plan.ipv6:
        return Canary(family=family, status="not in the plan", detail="IPv6 is not captured here")
    if os.getegid() == gid and any(rule.gid == gid for rule in plan.rules):
        return Canary(family=family, status="not tried", detail=f"this process runs as the proxy's group {gid}")
    try:
        listener = listen(family, outbound_port)
    except OSError as error:
        return Canary(family=family, status="no route", detail=f"no loopback address: {error.strerror}")
    if listener is None:
        return ask_the_proxy(plan, family)
    with listener:
        if proxy_runs and any(_targets(plan, family)):
            detail = f"nobody listens on port {outbound_port}, where the rules lead"
            return Canary(family=family, status="not captured", detail=detail)
        return _ask_the_kernel(plan, family, listener)


def ask_the_proxy(plan: Plan, family: IpFamily, port: int = CANARY_PORT, patience: float = PATIENCE) -> Canary:
    """One family's canary to the proxy that runs here, for `patience` seconds: at PROOF_PORT it leaves no record."""
    if family == "ipv6" and not plan.ipv6:
        return Canary(family=family, status="not in the plan", detail="IPv6 is not captured here")
    target = Address(CANARY[family], port)
    if not captures(plan.rules, target.host, target.port):
        return Canary(family=family, status="not in the plan", detail=f"the plan leaves {target} alone")
    expected = greeting(target)
    deadline = time.monotonic() + patience
    try:
        with _connect(target, deadline) as client:
            finish_connect(client, deadline)
            answer = read_all(client, len(expected), deadline)
    except _NoRoute:
        return Canary(family=family, status="no route", destination=str(target), detail="nothing can leave")
    except OSError as error:
        return Canary(family=family, status="not captured", destination=str(target), detail=_why(error, patience))
    if answer != expected:
        detail = "whoever answered is not the outbound proxy"
        return Canary(family=family, status="not captured", destination=str(target), detail=detail)
    return Canary(family=family, status="captured", destination=str(target), detail="the proxy answered")


def _ask_the_kernel(plan: Plan, family: IpFamily, listener: socket.socket) -> Canary:
    targets = list(dict.fromkeys(_targets(plan, family)))
    if not targets:
        return Canary(family=family, status="not in the plan", detail="the plan captures nothing of this family")
    for target in targets:
        deadline = time.monotonic() + PATIENCE
        try:
            with _connect(target, deadline) as client:
                receive_own(listener, client, target, deadline)
        except _NoRoute:
            continue
        except OSError as error:
            return Canary(family=family, status="not captured", destination=str(target), detail=_why(error))
        return Canary(
            family=family, status="captured", destination=str(target), detail="it came back to us", by_us=True
        )
    return Canary(family=family, status="no route", destination=str(targets[0]), detail="nothing can leave")


def receive_own(listener: socket.socket, client: socket.socket, target: Address, deadline: float) -> None:
    """Waits until the client's own connection, and no other's, comes out at the listener. Raises OSError."""
    token = secrets.token_bytes(16)
    while True:
        _wait(listener, client, deadline)
        accepted, _ = listener.accept()
        with accepted:
            try:
                mine = original_destination(accepted) == target
            except ConnectionFailed:
                continue
            if not mine:
                continue
            finish_connect(client, deadline)
            client.sendall(token)
            accepted.settimeout(_left(deadline))
            if accepted.recv(len(token), socket.MSG_WAITALL) == token:
                return


def _wait(listener: socket.socket, client: socket.socket, deadline: float) -> None:
    """Until the listener has a connection. Raises OSError as soon as the client's has failed elsewhere."""
    connecting = [client]
    while not select.select([listener], connecting, [], _left(deadline))[0]:
        # Writable: refused, or connected to somebody; then only the listener can tell whether that is us.
        if code := client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(code, os.strerror(code))
        connecting = []


def _connect(target: Address, deadline: float) -> socket.socket:
    """A socket that has begun to connect. Raises _NoRoute."""
    client = begin_connect(target)
    if client is None:
        raise _NoRoute
    client.settimeout(_left(deadline))
    return client


def finish_connect(client: socket.socket, deadline: float) -> None:
    """Waits until the handshake is over. Raises OSError with what ended it."""
    client.settimeout(_left(deadline))
    try:
        client.send(b"")  # blocks until the connection is writable or failed
    except BlockingIOError:
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
    if code := client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(code, os.strerror(code))


def read_all(client: socket.socket, size: int, deadline: float) -> bytes:
    """So many bytes, or what there was until the end. Raises OSError."""
    answer = b""
    while len(answer) < size:
        client.settimeout(_left(deadline))
        chunk = client.recv(size - len(answer))
        if not chunk:
            break
        answer += chunk
    return answer


def listen(family: IpFamily, port: int, *, everywhere: bool = False, transparent: bool = False) -> socket.socket | None:
    """A listener in the proxy's place, or None where the proxy has it. Raises OSError without a loopback address."""
    listener = socket.socket(_ADDRESS_FAMILY[family], socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == "ipv6":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if transparent:
            make_transparent(listener)
        listener.bind(((_ANY if everywhere else _LOOPBACK)[family], port))
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    return listener


def _targets(plan: Plan, family: IpFamily) -> Iterator[Address]:
    """Destinations the plan captures, best first: nobody's address, what lies on a link, what is included."""
    included = [
        rule for rule in plan.rules if rule.redirect and rule.chain == "MESHNET_OUT" and not is_for_canary(rule)
    ]
    ports = [CANARY_PORT, *(rule.ports.first for rule in included if isinstance(rule.ports, Ports))]
    inside = (ipaddress.ip_network(rule.destination) for rule in included if rule.destination)
    named = [str(network[min(1, network.num_addresses - 1)]) for network in inside if f"ipv{network.version}" == family]
    for host in (CANARY[family], *_on_link(family), *named):
        for port in ports:
            if captures(plan.rules, host, port):
                yield Address(host, port)


def _on_link(family: IpFamily) -> Iterator[str]:
    """One address that is not ours in each interface's prefix: those have a route where there is no default route."""
    with IPRoute() as netlink:  # type: ignore[no-untyped-call]  # pyroute2 has types in part
        messages = list(netlink.get_addr(family=_ADDRESS_FAMILY[family]))
    own = {message.get_attr("IFA_ADDRESS") for message in messages}
    for message in messages:
        interface = ipaddress.ip_interface(f"{message.get_attr('IFA_ADDRESS')}/{message['prefixlen']}")
        if interface.is_loopback or interface.is_link_local:
            continue
        hosts = interface.network.hosts()
        other = next((str(host) for host in hosts if str(host) not in own), None)
        if other is not None:
            yield other


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    return left


def _why(error: OSError, patience: float = PATIENCE) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing came back within {patience:g} s"
    return f"{error.strerror or error}: the connection left by its own way"
