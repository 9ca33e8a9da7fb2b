"""Hosts made of network namespaces: real kernels' worth of TCP, rules and routes, built in milliseconds.

    with World() as world:
        web, api = world.host("web"), world.host("api")
        api.spawn("python3", "-m", "http.server", "8080")
        web.run("curl", "-s", f"http://{api.address}:8080/")

Each host has `eth0` on one switch (10.77.0.0/24 and fd77::/64) and default routes through it for both families, so that
packets to service addresses leave too; those that no rule catches are answered with host unreachable.
"""

import ipaddress
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from meshnet.errors import CommandError
from meshnet_cli.demo import sandbox
from meshnet_cli.demo.folder import Folder

NETWORK = ipaddress.IPv4Network("10.77.0.0/24")
NETWORK6 = ipaddress.IPv6Network("fd77::/64")

T = TypeVar("T")


class World:
    """Hosts on a switch. Leaving it kills what was started in it and removes its files, unless `keep` is set.

    The process must have called `sandbox.enter_sandbox()`. Use it from the main thread: children are killed when the
    thread that started them ends.
    """

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        self.keep = False
        self.ipv6 = Path("/proc/net/if_inet6").exists()  # some kernels are started without it
        self._folder = Folder()
        self.directory = self._folder.path
        self._numbers = itertools.count(2)
        try:
            self.switch = self._switch()
        except BaseException:
            self._folder.close(keep=False)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def host(self, name: str) -> "Host":
        """A new host on the switch. Its index on the network grows with each host made."""
        number = next(self._numbers)
        host = Host(name, str(NETWORK[number]), str(NETWORK6[number]), self.directory / name)
        port = f"port{number}"
        self.switch.configure(
            f"link add {port} type veth peer name eth0 netns /proc/self/fd/{host.namespace}",
            f"link set {port} master br0 up addrgenmode none",
            share=host.namespace,
        )
        host.configure(
            "link set lo up",
            "link set eth0 up addrgenmode none",
            f"address add {host.address}/{NETWORK.prefixlen} dev eth0",
            f"route add default via {NETWORK[1]}",
        )
        if self.ipv6:
            host.configure(
                f"address add {host.address6}/{NETWORK6.prefixlen} dev eth0 nodad",
                f"route add ::/0 via {NETWORK6[1]}",
            )
        self.hosts[name] = host
        return host

    def close(self) -> None:
        for host in (*self.hosts.values(), self.switch):
            host.close()
        self._folder.close(keep=self.keep)

    def _switch(self) -> "Host":
        switch = Host("switch", str(NETWORK[1]), str(NETWORK6[1]), self.directory / "switch")
        switch.configure(
            "link set lo up",
            "link add br0 type bridge",
            "link set br0 up addrgenmode none",
            f"address add {switch.address}/{NETWORK.prefixlen} dev br0",
            "route add unreachable default",
        )
        if self.ipv6:
            switch.configure(
                f"address add {switch.address6}/{NETWORK6.prefixlen} dev br0 nodad",
                "route add unreachable ::/0",
            )
        with switch.entered():
            try:
                # Only a router answers that there is no way.
                Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
                if self.ipv6:
                    Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
            except OSError as error:
                raise CommandError(
                    "cannot set up a network here",
                    why=f"this looks like a container with a read-only /proc/sys ({error.strerror})",
                    fix="run it on a machine or a virtual machine, or in a container with --privileged",
                ) from error
        return switch


@dataclass(eq=False)
class Host:
    """One network namespace, with an address of each family, a directory of its own, and the programs running there."""

    name: str
    address: str
    address6: str
    directory: Path
    namespace: int = field(default_factory=sandbox.new_namespace)
    processes: list["Process"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory.mkdir()

    def entered(self) -> AbstractContextManager[None]:
        """This thread inside the host; see `sandbox.entered`."""
        return sandbox.entered(self.namespace)

    def run(
        self, *command: str | Path, stdin: str = "", timeout: float = 30.0, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end. Raises ProgramFailed when it ends with an error, unless `check` is off."""
        with self.entered():
            done = subprocess.run(
                _tied(command),
                input=stdin,
                capture_output=True,
                text=True,
                timeout=timeout,
                start_new_session=True,
                env=_environment() | environment,
            )
        if check and done.returncode:
            raise ProgramFailed(self.name, command, done.returncode, done.stdout + done.stderr)
        return done

    def spawn(
        self, *command: str | Path, name: str = "", pass_fds: Sequence[int] = (), **environment: str
    ) -> "Process":
        """Start a program; what it prints goes to `name`.log in the host's directory. It ends with the world."""
        name = name or Path(command[0]).name
        log = self.directory / f"{name}.log"
        with self.entered(), log.open("ab") as output:
            popen = subprocess.Popen(
                _tied(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=pass_fds,
                env=_environment() | environment,
            )
        process = Process(name, popen, log)
        self.processes.append(process)
        return process

    def python(self, code: str, *arguments: str, timeout: float = 30.0) -> str:
        """What a piece of Python prints when it runs here."""
        return self.run(sys.executable, "-I", "-c", code, *arguments, timeout=timeout).stdout

    def open_socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0
    ) -> socket.socket:
        """A socket of this host, whatever thread or task uses it later."""
        with self.entered():
            return socket.socket(family, kind, protocol)

    def connect(self, address: str, port: int, timeout: float = 5.0) -> socket.socket:
        """A blocking connection from here to an IP address."""
        client = self.open_socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        client.settimeout(timeout)
        try:
            client.connect((address, port))
        except BaseException:
            client.close()
            raise
        return client

    def listens(self, port: int) -> bool:
        """Whether a TCP socket of this host listens on the port, in either family."""
        with self.entered():
            sockets = Path("/proc/thread-self/net/tcp").read_text() + Path("/proc/thread-self/net/tcp6").read_text()
        return any(f":{port:04X} " in line and " 0A " in line for line in sockets.splitlines())

    def configure(self, *lines: str, share: int | None = None) -> None:
        """Give lines to `ip -batch`, all or an error; `share` is a namespace descriptor that the lines name."""
        with self.entered():
            done = subprocess.run(
                ["ip", "-batch", "-"],
                input="\n".join(lines),
                capture_output=True,
                text=True,
                env=_environment(),
                pass_fds=() if share is None else (share,),
            )
        if done.returncode:
            raise ProgramFailed(self.name, ("ip", "-batch", "-"), done.returncode, done.stderr)

    def close(self) -> None:
        for process in reversed(self.processes):
            process.kill()
        os.close(self.namespace)


@dataclass(eq=False)
class Process:
    """A program running on a host, in a process group of its own."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def terminate(self, timeout: float = 10.0) -> int:
        """SIGTERM and the exit status. Raises TimeoutExpired when it does not end."""
        self.popen.terminate()
        return self.popen.wait(timeout)

    def kill(self) -> None:
        """SIGKILL to it and its children; nothing if it has ended."""
        if self.alive:
            os.killpg(self.pid, signal.SIGKILL)
            self.popen.wait()


class ProgramFailed(Exception):
    """A program on a host ended with an error: which, where, and what it printed."""

    def __init__(self, host: str, command: tuple[str | Path, ...], status: int, output: str) -> None:
        super().__init__(f"{host}: {' '.join(map(str, command))} ended with {status}\n{output.strip()}")
        self.status = status
        self.output = output


def wait_for(condition: Callable[[], T], *, timeout: float = 10.0, what: str = "") -> T:
    """The first true value of `condition`, asked every few milliseconds. An OSError counts as not yet.

    Raises TimeoutError with `what` and the last error or value.
    """
    deadline = time.monotonic() + timeout
    while True:
        seen: object
        try:
            value = condition()
            if value:
                return value
            seen = value
        except OSError as error:
            seen = error
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{what or getattr(condition, '__name__', 'condition')}: not in {timeout} s; saw {seen!r}"
            )
        time.sleep(0.01)  # noqa: TID251 - this is the place that waits for a condition


def _tied(command: tuple[str | Path, ...]) -> list[str]:
    """The command, made to die with us even when we are killed."""
    # By the time of the shell's look at its parent the death signal is set: no moment is left to outlive us in.
    born = f'[ $PPID = {os.getpid()} ] && exec "$@"'
    return ["setpriv", "--pdeathsig", "KILL", "--", "sh", "-c", born, "sh", *map(str, command)]


def _environment() -> dict[str, str]:
    return os.environ | {"PATH": sandbox.search_path(), "PYTHONUNBUFFERED": "1"}
