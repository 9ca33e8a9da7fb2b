"""What goes wrong, made for real, and undone when the block is left."""

import ctypes
import fcntl
import itertools
import os
import resource
import socket
import stat
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from meshnet.errors import CommandError
from tests.proxy.peer import TUNNEL_PORT
from tests.traffic.conftest import Hosts
from tests.world import Host, Sidecar, wait_for

HOUR = 3600  # seconds

SECRET = b"for the endpoint alone"
"""What clients say to meshed endpoints; no frame between hosts may hold it."""

_PIDFD_GETFD = 438  # syscalls(2), on every architecture
_IMPATIENT = {socket.TCP_KEEPIDLE: 1, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: 3}


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
def ports(host: Host, first: int, last: int) -> Iterator[None]:
    """What the host may take for connections of its own."""
    with host.entered():
        file = Path("/proc/sys/net/ipv4/ip_local_port_range")
        before = file.read_text()
        file.write_text(f"{first} {last}")
    try:
        yield
    finally:
        with host.entered():
            file.write_text(before)


@contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """The directory, which is made, is one of its own."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)  # somebody may just write to it


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Not a byte more goes onto the disk."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass  # now it is
    try:
        yield
    finally:
        filler.unlink()


def wrong_clock(directory: Path) -> Path:
    """A library there that makes a program's clock wrong: see `off_by`."""
    library, source = directory / "clock.so", Path(__file__).with_name("clock.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-o", library, source], check=True)
    return library


def off_by(clock: Path, seconds: int) -> dict[str, str]:
    """The environment of such a program."""
    return {"LD_PRELOAD": str(clock), "CLOCK_OFF_BY": str(seconds)}


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


def is_over(sidecar: Sidecar) -> bool:
    return sidecar.process is not None and not sidecar.process.alive


def answers(sidecar: Sidecar) -> bool:
    """It listens for applications, and for operators."""
    try:
        return sidecar.status().pid > 0 and sidecar.host.listens(sidecar.settings.proxy.outbound_port)
    except CommandError:
        return False


def impatient(sidecar: Sidecar) -> None:
    """Its tunnels of now learn within four seconds that the other host is gone, and not after a minute.

    That is of tunnels for which no bytes are on their way.
    """
    for it in _connections(sidecar):
        if TUNNEL_PORT in (it.getsockname()[1], it.getpeername()[1]):
            _probe_soon(it)


def impatient_with(sidecar: Sidecar, client: socket.socket) -> None:
    """Its leg of this client probes each second, and not after half a minute."""
    port = client.getsockname()[1]
    assert [_probe_soon(it) for it in _connections(sidecar) if it.getpeername()[1] == port]


def _connections(sidecar: Sidecar) -> Iterator[socket.socket]:
    """Every TCP connection that it has, each by a descriptor of ours until the next is asked for."""
    assert sidecar.process is not None
    pid = sidecar.process.pid
    process = os.pidfd_open(pid)
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            found = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, int(number), 0)
            if found < 0:
                continue  # it was closed just now
            if not stat.S_ISSOCK(os.fstat(found).st_mode):
                os.close(found)
                continue
            with socket.socket(fileno=found) as it:
                if it.family in (socket.AF_INET, socket.AF_INET6) and _is_connected(it):
                    yield it
    finally:
        os.close(process)


def _probe_soon(sock: socket.socket) -> None:
    wait_for(lambda: not _unanswered(sock), what="the last acknowledgment")
    for option, value in _IMPATIENT.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _unanswered(sock: socket.socket) -> int:
    """Bytes (tcp(7), SIOCOUTQ)."""
    return int(struct.unpack("=i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0])


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False  # it listens
    return True


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
