"""The sidecar's TCP listeners: which there are, and what to say when a port cannot be had."""

import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import chain

from meshnet.errors import CommandError
from meshnet.model.settings import Settings
from meshnet.net import sockets
from meshnet.net.handover import handed_over

_LOOPBACK = ("127.0.0.1", "::1")  # redirected output arrives there (man iptables-extensions, REDIRECT)
_ANY = ("0.0.0.0", "::")  # redirected input arrives at the address of the interface it came in by

Listeners = Mapping[str, Sequence[socket.socket]]
"""By what they take: outbound, inbound, tunnel, health, probes where there are any to relay, and readiness where it is
asked for in a family that no rule captures.
"""

OWN = frozenset({"health", "probes", "readiness"})
"""Those whose connections are for the sidecar itself."""


def open_listeners(settings: Settings, stack: ExitStack) -> dict[str, list[socket.socket]]:
    """All of them; `stack` closes them. Raises CommandError.

    Those of an earlier process that an init system has kept are taken over, with whoever waits there meanwhile.
    """
    kept = handed_over()
    proxy, admin = settings.proxy, settings.admin
    # What is rerouted from behind a bridge arrives at that interface's address, too.
    outbound = _ANY if settings.capture.reroute_interfaces else _LOOPBACK
    wanted = {
        "outbound": (proxy.outbound_port, outbound),
        "inbound": (proxy.inbound_port, _ANY),
        "tunnel": (proxy.tunnel_port, _ANY),
        "health": (admin.health_port, _ANY if admin.health_address == "*" else (admin.health_address,)),
    }
    if settings.probes.checks:
        wanted["probes"] = (settings.probes.port, _ANY)
    if settings.capture.readiness_port and settings.capture.ipv6 in ("off", "reject"):
        wanted["readiness"] = (settings.capture.readiness_port, ("::",))
    transparent = {"inbound"} if settings.capture.inbound_mode == "tproxy" else set()
    every = {
        name: _listen(name, port, hosts, stack, name in transparent, kept.get(name, ()))
        for name, (port, hosts) in wanted.items()
    }
    listeners = {name: found for name, found in every.items() if found}
    taken_over = set(chain(*listeners.values()))
    for sock in chain(*kept.values()):
        if sock not in taken_over:
            sock.close()  # settings have changed: nobody would ever take who waits there
    return listeners


def addresses_of(listeners: Listeners) -> dict[str, str]:
    """As `meshnet status` shows them: `127.0.0.1:15101, [::1]:15101`."""
    return {
        name: ", ".join(str(sockets.peer_address(sock.getsockname())) for sock in found)
        for name, found in listeners.items()
    }


def _listen(
    name: str,
    port: int,
    hosts: tuple[str, ...],
    stack: ExitStack,
    transparent: bool,
    kept: Sequence[socket.socket],
) -> list[socket.socket]:
    found = []
    by_address = {sock.getsockname()[:2]: sock for sock in kept}
    for host in hosts:
        before = by_address.get((host, port))
        if before is not None and sockets.is_transparent(before) == transparent:
            found.append(stack.enter_context(before))
            continue
        if before is not None:
            before.close()
        try:
            sock = sockets.listen(host, port, transparent=transparent)
        except PermissionError as error:
            raise CommandError(
                f"cannot listen on port {port} ({name}) as a transparent proxy: {error.strerror}",
                why='capture.inbound_mode = "tproxy" needs the capability NET_ADMIN or NET_RAW',
                fix='give it, or set capture.inbound_mode = "redirect"',
                code=5,
            ) from error
        except OSError as error:
            raise CommandError(
                f"cannot listen on port {port} ({name}): {error.strerror}",
                why="another program, perhaps another sidecar, has the port",
                fix=f"ss -ltnp 'sport = :{port}'",
            ) from error
        if sock is not None:
            found.append(stack.enter_context(sock))
    if not found and name != "readiness":  # without IPv6 nobody asks there
        raise CommandError(f"no address to listen on for {name}", fix="ip addr")
    return found
