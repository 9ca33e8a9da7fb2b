"""One more host for a test alone, whose sidecar is not as the others are."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meshnet.control.authority import Issued, save_issued
from meshnet.errors import CommandError
from meshnet_init.apply import apply
from tests.traffic.conftest import Hosts
from tests.world import Host, Sidecar, wait_for

_numbers = itertools.count(1)


def another_host(hosts: Hosts) -> Host:
    return hosts.world.host(f"strange-{next(_numbers)}")


@contextmanager
def strange(
    hosts: Hosts,
    host: Host,
    *,
    issued: Issued | None = None,
    by: tuple[str | Path, ...] = (),
    environment: dict[str, str] | None = None,
    **sections: dict[str, Any],
) -> Iterator[Sidecar]:
    """A sidecar on `host`, with that certificate, started by that command; it has read the mesh, and captures."""
    relay = hosts.sidecar(hosts.web).settings.proxy.relay
    sidecar = hosts.mesh.sidecar(host, start=False, proxy={"relay": relay}, **sections)
    del hosts.mesh.sidecars[host.name]  # those are looked after by all tests
    if issued is not None:
        save_issued(issued, sidecar.config.parent)
    sidecar.spawn(by=tuple(map(str, by)), **environment or {})
    assert sidecar.process is not None
    try:
        wait_for(lambda: _knows_the_mesh(sidecar), timeout=20.0, what="the sidecar has read the mesh")
        with host.entered():
            apply(sidecar.settings)
        yield sidecar
    finally:
        sidecar.process.kill()


def _knows_the_mesh(sidecar: Sidecar) -> bool:
    """Ready it may not be."""
    try:
        return sidecar.status().config.version > 0
    except CommandError:
        return False
