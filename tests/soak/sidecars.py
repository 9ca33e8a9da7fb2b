"""What befalls sidecars: their processes, certificates and clocks."""

import os
import random
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from meshnet.control.authority import CERTIFICATE, save_issued
from meshnet_cli.demo.world import Host, wait_for
from tests.faults.causes import HOUR, off_by
from tests.soak.kind import EVERYBODY, Kind, last
from tests.soak.stage import Stage


class Sidecars:
    """`started` says when the sidecar of a host, by name, was last started again, and was ready."""

    def __init__(self, stage: Stage, dice: random.Random) -> None:
        self.started: dict[str, tuple[float, float]] = {}
        self._stage = stage
        self._dice = dice

    def kinds(self) -> Iterator[Kind]:
        yield Kind("sidecar killed", self._kill, EVERYBODY)
        yield Kind("sidecar restarted in order", self._restart, EVERYBODY)
        yield Kind("sidecar stands still", self._stop)
        yield Kind("certificate renewed", self._renew)
        yield Kind("certificate replaced by nonsense, and renewed", self._garble)
        yield Kind("certificate of another id for a moment", self._misname, EVERYBODY)
        yield Kind("sidecar restarted with its clock an hour behind, and set right", self._turn_back, EVERYBODY)

    def start(self, host: Host) -> None:
        self._wait_for_ports(host)
        began = time.monotonic()
        self._stage.sidecar(host).start()
        self.started[host.name] = began, time.monotonic()

    def _kill(self, host: Host) -> None:
        sidecar = self._stage.sidecar(host)
        os.kill(self._stage.pid(host), signal.SIGKILL)
        assert sidecar.process is not None
        sidecar.process.popen.wait()
        last(self._dice.uniform(0.0, 1.0))
        self.start(host)

    def _restart(self, host: Host) -> None:
        self._stage.sidecar(host).stop()
        self.start(host)

    def _wait_for_ports(self, host: Host) -> None:
        """They may be taken for a moment longer than the process is there."""
        wait_for(lambda: not host.listens(self._stage.sidecar(host).settings.proxy.outbound_port))

    def _stop(self, host: Host) -> None:
        os.kill(self._stage.pid(host), signal.SIGSTOP)
        last(self._dice.uniform(0.1, 0.8))
        os.kill(self._stage.pid(host), signal.SIGCONT)

    def _renew(self, host: Host) -> None:
        self._certify(host, host.name)

    def _certify(self, host: Host, name: str) -> None:
        """Its sidecar gets a new certificate, as the sidecar of `name`."""
        mesh, sidecar = self._stage.mesh, self._stage.sidecar(host)
        before = sidecar.status().certificate.serial
        save_issued(mesh.authority.issue(mesh.identity(name), now=datetime.now(UTC)), sidecar.config.parent)
        wait_for(lambda: sidecar.status().certificate.serial != before, what="the new certificate")

    def _garble(self, host: Host) -> None:
        sidecar = self._stage.sidecar(host)
        before = sidecar.status().certificate.serial
        (sidecar.config.parent / CERTIFICATE).write_bytes(self._dice.randbytes(500))
        last(self._dice.uniform(0.1, 1.0))
        assert sidecar.status().certificate.serial == before
        self._renew(host)

    def _misname(self, host: Host) -> None:
        """Its peers take it for somebody else, and do not speak to it."""
        self._certify(host, "somebody-else")
        last(self._dice.uniform(0.1, 1.0))
        self._renew(host)

    def _turn_back(self, host: Host) -> None:
        """For it no certificate is valid yet, so it is not ready."""
        sidecar = self._stage.sidecar(host)
        sidecar.stop()
        self._wait_for_ports(host)
        sidecar.spawn(**off_by(self._stage.clock, -HOUR))
        wait_for(lambda: host.listens(sidecar.settings.proxy.outbound_port), timeout=20.0, what="the sidecar of then")
        last(self._dice.uniform(0.1, 1.0))
        self._restart(host)
