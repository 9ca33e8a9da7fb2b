"""What goes wrong, made for real, and undone when the block is left."""

import itertools
import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tests.traffic.conftest import Hosts
from tests.world import Host, Sidecar

SECRET = b"for the endpoint alone"
"""What clients say to meshed endpoints; no frame between hosts may hold it."""


@contextmanager
def rule(host: Host, chain: str, *rules: str) -> Iterator[None]:
    """Rules of nft in a table of their own; `chain` is its hook and priority."""
    lines = "\n".join((f"type filter hook {chain}", *rules))
    host.run("nft", "-f", "-", stdin=f"table inet fault {{\nchain faulty {{\n{lines}\n}}\n}}\n")
    try:
        yield
    finally:
        host.run("nft", "delete", "table", "inet", "fault")


def drops_syns(host: Host, port: int) -> AbstractContextManager[None]:
    return rule(host, "input priority 0", f"tcp dport {port} tcp flags & (syn | ack) == syn drop")


@contextmanager
def pulled(hosts: Hosts, host: Host) -> Iterator[None]:
    """The host's cable is out of the switch."""
    port = f"port{host.address.rpartition('.')[2]}"
    hosts.world.switch.configure(f"link set {port} down")
    try:
        yield
    finally:
        hosts.world.switch.configure(f"link set {port} up")


@contextmanager
def descriptors(sidecar: Sidecar, more: int) -> Iterator[None]:
    """The sidecar may open so many more than it has."""
    assert sidecar.process is not None
    pid = sidecar.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    # The limit is on their numbers, and a new one gets the lowest that is free.
    free = (number for number in itertools.count() if number not in used)
    limit = next(itertools.islice(free, more, None))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@contextmanager
def memory(sidecar: Sidecar, more: int) -> Iterator[None]:
    """The sidecar may take so many bytes more of address space than it has."""
    assert sidecar.process is not None
    pid = sidecar.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        if sidecar.process.alive:
            resource.prlimit(pid, resource.RLIMIT_AS, before)


@contextmanager
def pouring(sock: socket.socket, data: bytes) -> Iterator[None]:
    """Sends all of it, and an end, meanwhile; an error that befalls it is the reader's to notice."""

    def pour() -> None:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    thread = threading.Thread(target=pour)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def without_tunnels(hosts: Hosts) -> None:
    """`web` forgets those that it has, as by a restart."""
    sidecar = hosts.sidecar(hosts.web)
    sidecar.stop()
    sidecar.start()
