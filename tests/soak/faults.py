"""What goes wrong in a soak, one after the other, as a seed says. Each returns when it is over."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from meshnet.control.authority import CERTIFICATE, save_issued
from meshnet_cli.demo.wire import Capture
from meshnet_cli.demo.world import Host, wait_for
from tests.faults.causes import HOUR, descriptors, full, off_by, rule
from tests.soak.judge import GRACE, Fault
from tests.soak.stage import ADDRESSES, DEAD, Stage

_PAUSES = (0.5, 4.0)  # seconds without any fault, beyond the time for which the last one still excuses
_STORM = 200  # connections
_RESET_BY = 20.0  # seconds
_ON_ITS_WAY = 0.3  # seconds in which what has passed between hosts is counted


@dataclass(frozen=True, slots=True)
class Kind:
    what: str
    do: Callable[[Host], None]
    excuses: bool
    """Whether a client may notice."""
    uncovers: bool = False
    """Whether what is open leaves as its client sends it: without rules the kernel no longer turns it."""


class Faults:
    """`so_far` grows; `started` says when the sidecar of a host, by name, was last started again, and was ready.

    `uncovered`: of the frames with the marker of `wire`, those that passed while there were no rules.
    """

    def __init__(self, stage: Stage, wire: Capture, dice: random.Random, tell: Callable[[str], None]) -> None:
        self.so_far: list[Fault] = []
        self.started: dict[str, tuple[float, float]] = {}
        self.uncovered = 0
        self._stage = stage
        self._wire = wire
        self._dice = dice
        self._tell = tell
        self._wait = threading.Event().wait
        self._kinds = [
            Kind("sidecar killed", self._kill, True),
            Kind("sidecar restarted in order", self._restart, True),
            Kind("sidecar stands still", self._stop, False),
            Kind("cable pulled for a moment", self._pull, False),
            Kind("certificate renewed", self._renew, False),
            Kind("mesh files changed", self._change, False),
            Kind("cache killed", self._kill_cache, True),
            Kind("rules flushed", self._flush, True, uncovers=True),
            Kind("nobody answers a SYN for a moment", self._lose_syns, False),
            Kind("no descriptor left for a moment", self._lack_descriptors, True),
            Kind("certificate replaced by nonsense, and renewed", self._garble, False),
            Kind("certificate of another id for a moment", self._misname, True),
            Kind("sidecar restarted with its clock an hour behind, and set right", self._turn_back, True),
            Kind("disk full while the mesh changes", self._fill, False),
            Kind("garbage on every port", self._garbage, False),
            Kind("storm of connections to a dead service", self._storm, False),
        ]
        self._order: list[Kind] = []

    def go_on_until(self, end: float) -> None:
        """One fault after the other; each kind comes once before any comes again."""
        while True:
            if not self._order:
                self._order = self._dice.sample(self._kinds, len(self._kinds))
            kind, host = self._order.pop(), self._dice.choice(self._stage.hosts)
            pause = self._dice.uniform(*_PAUSES) + (GRACE if self.so_far and self.so_far[-1].excuses else 0.0)
            if time.monotonic() + pause + 2 * GRACE > end:
                self._wait(max(0.0, end - time.monotonic()))
                return
            self._wait(pause)
            began = time.monotonic()
            self._tell(f"{kind.what} ({host.name})")
            seen = self._wire.with_marker
            kind.do(host)
            if kind.uncovers:
                self._wait(_ON_ITS_WAY)
                self.uncovered += self._wire.with_marker - seen
            self.so_far.append(Fault(kind.what, began, time.monotonic(), kind.excuses))

    def _kill(self, host: Host) -> None:
        sidecar = self._stage.sidecar(host)
        os.kill(self._stage.pid(host), signal.SIGKILL)
        assert sidecar.process is not None
        sidecar.process.popen.wait()
        self._wait(self._dice.uniform(0.0, 1.0))
        self._start(host)

    def _restart(self, host: Host) -> None:
        self._stage.sidecar(host).stop()
        self._start(host)

    def _start(self, host: Host) -> None:
        self._wait_for_ports(host)
        began = time.monotonic()
        self._stage.sidecar(host).start()
        self.started[host.name] = began, time.monotonic()

    def _wait_for_ports(self, host: Host) -> None:
        """They may be taken for a moment longer than the process is there."""
        wait_for(lambda: not host.listens(self._stage.sidecar(host).settings.proxy.outbound_port))

    def _stop(self, host: Host) -> None:
        os.kill(self._stage.pid(host), signal.SIGSTOP)
        self._wait(self._dice.uniform(0.1, 0.8))
        os.kill(self._stage.pid(host), signal.SIGCONT)

    def _pull(self, host: Host) -> None:
        port = f"port{host.address.rpartition('.')[2]}"
        self._stage.world.switch.configure(f"link set {port} down")
        self._wait(self._dice.uniform(0.1, 0.5))
        self._stage.world.switch.configure(f"link set {port} up")

    def _renew(self, host: Host) -> None:
        self._certify(host, host.name)

    def _certify(self, host: Host, name: str) -> None:
        """Its sidecar gets a new certificate, as the sidecar of `name`."""
        mesh, sidecar = self._stage.mesh, self._stage.sidecar(host)
        before = sidecar.status().certificate.serial
        save_issued(mesh.authority.issue(mesh.identity(name), now=datetime.now(UTC)), sidecar.config.parent)
        wait_for(lambda: sidecar.status().certificate.serial != before, what="the new certificate")

    def _change(self, host: Host) -> None:
        before = self._stage.sidecar(host).status().config.version
        for _ in range(self._dice.randrange(1, 30)):
            self._stage.write()
        wait_for(lambda: self._stage.sidecar(host).status().config.version > before, what="the new mesh")

    def _kill_cache(self, host: Host) -> None:
        self._stage.restart_cache()

    def _flush(self, host: Host) -> None:
        self._stage.flush(host)
        wait_for(lambda: self._stage.is_captured(host), timeout=20.0, what=f"the rules of {host.name} again")

    def _lose_syns(self, host: Host) -> None:
        """For less time than a SYN takes to be sent again (RFC 6298: a second)."""
        with rule(host, "input priority -300", 'iifname != "lo" tcp flags & (syn | ack) == syn drop'):
            self._wait(self._dice.uniform(0.1, 0.3))

    def _lack_descriptors(self, host: Host) -> None:
        with descriptors(self._stage.sidecar(host), 0):
            self._wait(self._dice.uniform(0.2, 1.0))

    def _garble(self, host: Host) -> None:
        sidecar = self._stage.sidecar(host)
        before = sidecar.status().certificate.serial
        (sidecar.config.parent / CERTIFICATE).write_bytes(self._dice.randbytes(500))
        self._wait(self._dice.uniform(0.1, 1.0))
        assert sidecar.status().certificate.serial == before
        self._renew(host)

    def _misname(self, host: Host) -> None:
        """Its peers take it for somebody else, and do not speak to it."""
        self._certify(host, "somebody-else")
        self._wait(self._dice.uniform(0.1, 1.0))
        self._renew(host)

    def _turn_back(self, host: Host) -> None:
        """For it no certificate is valid yet, so it is not ready."""
        sidecar = self._stage.sidecar(host)
        sidecar.stop()
        self._wait_for_ports(host)
        sidecar.spawn(**off_by(self._stage.clock, -HOUR))
        wait_for(lambda: host.listens(sidecar.settings.proxy.outbound_port), timeout=20.0, what="the sidecar of then")
        self._wait(self._dice.uniform(0.1, 1.0))
        self._restart(host)

    def _fill(self, host: Host) -> None:
        with full(self._stage.disk):
            self._change(host)
            self._wait(self._dice.uniform(0.1, 1.0))
        self._change(host)

    def _garbage(self, host: Host) -> None:
        """From a host that is in no mesh: what comes back does not matter, nor whether anything does."""
        settings = self._stage.sidecar(host).settings
        proxy = settings.proxy
        for port in (proxy.outbound_port, proxy.inbound_port, proxy.tunnel_port, settings.admin.health_port):
            for _ in range(self._dice.randrange(1, 10)):
                with suppress(OSError), self._stage.stranger.connect(host.address, port, timeout=1.0) as client:
                    client.sendall(self._dice.randbytes(self._dice.randrange(0, 4000)))

    def _storm(self, host: Host) -> None:
        """From where clients call: each is reset, and nobody else is the worse for it."""
        with ExitStack() as stack:
            calls = []
            for _ in range(_STORM):
                client = stack.enter_context(self._stage.web.open_socket())
                client.setblocking(False)
                client.connect_ex((ADDRESSES[DEAD], DEAD))
                calls.append(client)
            for client in calls:
                client.settimeout(_RESET_BY)
                try:
                    client.recv(1)
                except ConnectionResetError:
                    continue
                raise ValueError("a connection to a dead service was not reset")
