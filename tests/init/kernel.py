"""What the rule tests share: a host under test between two others, and connections that are tried again and again."""

import re
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import msgspec

from meshnet.model.address import Address
from meshnet.model.settings import CaptureSection, Settings
from meshnet.net.original import original_destination
from meshnet_init.apply import apply_plan
from meshnet_init.backends import Backend
from meshnet_init.choose import every_backend
from meshnet_init.host import host_facts
from meshnet_init.plan import make_plan
from tests.world import Host, World

APP_PORT, OTHER_PORT = 8080, 8081
INBOUND, OUTBOUND = 15106, 15101
FAMILIES = ("ipv4", "ipv6")
TIMEOUT = 3.0
SWITCHES = [f"/proc/sys/net/{it}" for it in ("ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect")]
COMMANDS = {"nft": "nft", "iptables": "iptables", "legacy": "iptables-legacy"}
"""By which a person changes what a backend has written."""


def capture(**values: object) -> Settings:
    """Settings with these values in [capture]; no port is left out unless `values` says so."""
    return Settings(capture=msgspec.convert({"exclude_inbound_ports": [], **values}, CaptureSection))


def backend_named(name: str) -> Backend:
    return next(backend for backend in every_backend() if backend.name == name)


@dataclass
class Lab:
    """`app` has the rules; `peer` is somebody else. Listeners on `app` stand for the proxy and for applications."""

    world: World
    backend: Backend
    app: Host = field(init=False)
    peer: Host = field(init=False)

    def __post_init__(self) -> None:
        self.app, self.peer = self.world.host("app"), self.world.host("peer")

    def install(self, backend: Backend | None = None, **values: object) -> None:
        with self.app.entered():
            apply_plan(make_plan(capture(**values), host_facts()), backend or self.backend)

    def flush(self, chain: str) -> None:
        """As other software does that takes a chain of ours for its own."""
        if self.backend.name == "nft":
            self.app.run("nft", "flush", "chain", "inet", "meshnet", chain)
            return
        for family in ("iptables", "ip6tables"):
            self.app.run(COMMANDS[self.backend.name].replace("iptables", family), "-t", "nat", "-F", chain)

    def rules_text(self, host: Host | None = None) -> str:
        """Everything a person can list in the kernel, handles included, without counters and time stamps."""
        host = host or self.app
        texts = [host.run("nft", "-a", "list", "ruleset").stdout, host.run("ip", "rule").stdout]
        texts += [host.run("ip", "-6", "rule").stdout]
        texts += [host.run("ip", *six, "route", "show", "table", "6700", check=False).stdout for six in ((), ("-6",))]
        texts += [host.run("cat", *SWITCHES).stdout]
        texts += [legacy_rules(host, family) for family in ("ip", "ip6")]
        return re.sub(r"counter packets \d+ bytes \d+|\[\d+:\d+\]|^#.*$", "", "\n".join(texts), flags=re.MULTILINE)


def legacy_rules(host: Host, family: str) -> str:
    """iptables-legacy's rules. Its built-in chains stay until the kernel module goes, so they do not count."""
    names = host.run("cat", f"/proc/net/{family}_tables_names", check=False).stdout.split()
    tables = [name for name in ("mangle", "nat", "filter") if name in names]
    lines = [
        line for table in tables for line in host.run(f"{family}tables-legacy-save", "-t", table).stdout.splitlines()
    ]
    return "\n".join(line for line in lines if line.startswith(("-A", ":MESHNET")))


def address_of(host: Host, family: str) -> str:
    return host.address if family == "ipv4" else host.address6


@contextmanager
def listening(host: Host, family: str, port: int, address: str = "") -> Iterator[socket.socket]:
    """A listener on every address of the host, or on one."""
    listener = host.open_socket(socket.AF_INET6 if family == "ipv6" else socket.AF_INET)
    with closing(listener):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == "ipv6":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((address or ("::" if family == "ipv6" else "0.0.0.0"), port))
        listener.listen()
        listener.settimeout(TIMEOUT)
        yield listener


@dataclass
class Open:
    """Both ends of one connection."""

    client: socket.socket
    server: socket.socket

    def works(self) -> bool:
        """A message there and another back. Raises OSError when the connection was cut."""
        for sender, receiver in ((self.client, self.server), (self.server, self.client)):
            sender.sendall(b"still there?")
            if receiver.recv(12, socket.MSG_WAITALL) != b"still there?":
                return False
        return True

    def captured_from(self) -> Address:
        """Where the client wanted to go, as the proxy learns it."""
        return original_destination(self.server)

    def close(self) -> None:
        self.client.close()
        self.server.close()


def connect(
    source: Host, target: str, port: int, *listeners: socket.socket, client: socket.socket | None = None
) -> Open:
    """A connection that came out at the first of `listeners`, and at none other."""
    if client is None:
        client = source.connect(target, port, TIMEOUT)
    else:
        client.settimeout(TIMEOUT)
        client.connect((target, port))
    server, _ = listeners[0].accept()
    server.settimeout(TIMEOUT)
    for other in listeners[1:]:
        other.setblocking(False)
        try:
            other.accept()[0].close()
        except BlockingIOError:
            pass
        else:
            raise AssertionError("two connections came out of one")
        finally:
            other.settimeout(TIMEOUT)
    return Open(client, server)
