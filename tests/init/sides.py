"""Listeners that stand for a proxy, an application and a server, and calls that come out at one of them."""

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from pyroute2.iproute.linux import IPRoute

from meshnet.net.sockets import listen
from meshnet_init.backends import cgroups
from tests.init.kernel import APP_PORT, INBOUND, OUTBOUND, TIMEOUT, Lab, Open, address_of, connect, listening
from tests.world import Host

SO_MARK = 36


class Sides:
    """Listeners: the two of the proxy and an application on `app`, a server on `peer`."""

    def __init__(self, lab: Lab, family: str, stack: ExitStack) -> None:
        loopback = "127.0.0.1" if family == "ipv4" else "::1"
        self.lab, self.family = lab, family
        self.app, self.peer = address_of(lab.app, family), address_of(lab.peer, family)
        self.inbound = stack.enter_context(listening(lab.app, family, INBOUND))
        self.outbound = stack.enter_context(listening(lab.app, family, OUTBOUND, loopback))
        self.application = stack.enter_context(listening(lab.app, family, APP_PORT))
        self.server = stack.enter_context(listening(lab.peer, family, APP_PORT))
        self.stack = stack

    def call_in(self, expected: socket.socket, port: int = APP_PORT, source: Host | None = None) -> Open:
        others = [listener for listener in (self.inbound, self.application) if listener is not expected]
        return self._kept(connect(source or self.lab.peer, self.app, port, expected, *others))

    def call_out(self, expected: socket.socket, port: int = APP_PORT, client: socket.socket | None = None) -> Open:
        others = [listener for listener in (self.outbound, self.server) if listener is not expected]
        return self._kept(connect(self.lab.app, self.peer, port, expected, *others, client=client))

    def _kept(self, opened: Open) -> Open:
        self.stack.callback(opened.close)
        assert opened.works()
        return opened


def prefix(host: Host, family: str, bits: int) -> str:
    return str(ipaddress.ip_network((address_of(host, family), bits), strict=False))


def marked(host: Host, family: str, mark: int) -> socket.socket:
    client = host.open_socket(socket.AF_INET6 if family == "ipv6" else socket.AF_INET)
    client.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
    return client


def made_by(host: Host, family: str, kind: str, who: int | str | tuple[int, int]) -> socket.socket:
    """A socket keeps the user, group and cgroup of the process that made it: a child makes it and hands it over.

    `kind` is uid, gid, cgroup, or ids: the first two at once, and the group 15137 as a supplementary one.
    """
    ours, childs = socket.socketpair()
    with ours, childs:
        child = os.fork()
        if child == 0:
            try:
                with host.entered():  # which a user who is not root may not
                    _become(kind, who)
                    made = socket.socket(socket.AF_INET6 if family == "ipv6" else socket.AF_INET)
                    socket.send_fds(childs, [b"x"], [made.fileno()])
                    os._exit(0)  # nor may such a user go back
            finally:
                os._exit(0)
        ours.settimeout(TIMEOUT)
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
        os.waitpid(child, 0)
    return socket.socket(fileno=descriptors[0])


def _become(kind: str, who: int | str | tuple[int, int]) -> None:
    if isinstance(who, tuple):
        os.setgroups([15137])
        os.setgid(who[1])
        os.setuid(who[0])
    elif isinstance(who, str):
        root = cgroups.root()
        assert root is not None
        if who.startswith("meshnet-test"):
            (root / who / "cgroup.procs").write_text(str(os.getpid()))
    elif kind == "uid":
        os.setuid(who)
    else:
        os.setgid(who)


def route_through(lab: Lab, family: str) -> tuple[Host, str]:
    """A host behind `app`, which forwards to it, and its address there; `peer` knows the way."""
    far = lab.world.host("far")
    behind = "10.99.0.1" if family == "ipv4" else "fd99::1"
    far.configure(f"address add {behind}/{32 if family == 'ipv4' else 128} dev lo")
    for number, host in enumerate((lab.app, far), start=1):  # they ask for their neighbours from link-local addresses
        host.configure(f"address add fe80::{number}/64 dev eth0 nodad")
    for host, gateway in ((lab.peer, lab.app), (lab.app, far)):
        host.configure(f"route add {behind} via {address_of(gateway, family)}")
    _forward(lab.app)
    return far, behind


def behind_a_bridge(lab: Lab, bridge: str, network: int) -> Host:
    """A host behind a bridge of `app`, which forwards, and nowhere else: 172.N.0.2 and fd00:N::2. All know the way."""
    made = lab.world.host(f"behind-{bridge}")
    made.address, made.address6 = f"172.{network}.0.2", f"fd00:{network}::2"
    gateway, gateway6 = f"172.{network}.0.1", f"fd00:{network}::1"
    made.configure("link set eth0 down")
    lab.app.configure(
        f"link add {bridge} type bridge",
        f"link set {bridge} up addrgenmode none",
        f"address add {gateway}/16 dev {bridge}",
        f"address add {gateway6}/64 dev {bridge} nodad",
    )
    with lab.app.entered(), IPRoute() as netlink:  # type: ignore[no-untyped-call] # pyroute2 has types in part
        peer = {"ifname": "eth1", "net_ns_fd": made.namespace}
        netlink.link("add", ifname=f"veth{network}", kind="veth", peer=peer)
    lab.app.configure(f"link set veth{network} master {bridge}", f"link set veth{network} up addrgenmode none")
    switch = lab.world.switch
    # A router asks for its neighbours from link-local addresses.
    for number, (router, interface) in enumerate(((lab.app, bridge), (lab.app, "eth0"), (switch, "br0")), start=1):
        router.configure(f"address replace fe80::{number}/64 dev {interface} nodad")
    for net, via in ((f"172.{network}.0.0/16", lab.app.address), (f"fd00:{network}::/64", lab.app.address6)):
        switch.configure(f"route add {net} via {via}")
    made.configure(
        "link set eth1 up addrgenmode none",
        f"address add {made.address}/16 dev eth1",
        f"address add {made.address6}/64 dev eth1 nodad",
        f"route add default via {gateway}",
        f"route replace ::/0 via {gateway6}",
    )
    _forward(lab.app)
    return made


def _forward(host: Host) -> None:
    with host.entered():
        for file in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            Path(f"/proc/sys/net/{file}").write_text("1")


@contextmanager
def transparent(host: Host, family: str) -> Iterator[socket.socket]:
    """The inbound proxy's listener, as TPROXY needs it."""
    with host.entered():
        listener = listen("::" if family == "ipv6" else "0.0.0.0", INBOUND, transparent=True)
    assert listener is not None
    with closing(listener):
        listener.settimeout(TIMEOUT)
        yield listener
