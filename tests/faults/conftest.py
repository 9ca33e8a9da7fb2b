"""Two meshes for every file here, one for each relay: `web` calls, `api` and `twin` answer, `outside` has no sidecar.

When a test is over, what it did to sidecars is mended, and the books of all of them must balance: each connection was
told once, nothing is left open, no thread, and nothing that was said to a meshed endpoint was to be read on the wire.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from meshnet.errors import CommandError
from meshnet_cli.demo.wire import Capture
from tests.faults.books import Books
from tests.faults.causes import SECRET
from tests.traffic.conftest import Hosts, Name
from tests.world import Mesh, Sidecar, World, into_the_mesh, still_alive

RELAYS = ("auto", "python")

once = pytest.mark.parametrize("relay", ["auto"])
"""For a fault that no relay takes part in."""


@contextmanager
def _mesh(relay: str) -> Iterator[Hosts]:
    with World() as world:
        web, api, twin, outside = (world.host(name) for name in ("web", "api", "twin", "outside"))
        mesh = Mesh(world)
        mesh.write()
        into_the_mesh(mesh, (web, api, twin), proxy={"relay": relay})
        yield Hosts(world, mesh, web, web, outside, [api, twin])


@pytest.fixture(scope="package")
def _meshes() -> Iterator[Callable[[str], Hosts]]:
    with ExitStack() as stack:
        made: dict[str, Hosts] = {}

        def of(relay: str) -> Hosts:
            if relay not in made:
                made[relay] = stack.enter_context(_mesh(relay))
            return made[relay]

        yield of


@pytest.fixture(params=RELAYS)
def relay(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def hosts(relay: str, _meshes: Callable[[str], Hosts], request: pytest.FixtureRequest) -> Iterator[Hosts]:
    found = _meshes(relay)
    sidecars = list(found.mesh.sidecars.values())
    books = [Books(sidecar) for sidecar in sidecars]
    with Capture(found.world.switch, SECRET) as wire:
        yield found
        for sidecar in sidecars:
            _mend(sidecar)
    still_alive(found.mesh, request)
    assert wire.with_marker == 0, "in plain text between hosts"
    for each in books:
        each.balance()


@pytest.fixture
def name(hosts: Hosts) -> Name:
    return hosts.new_name()


def _mend(sidecar: Sidecar) -> None:
    try:
        if sidecar.status().ready:
            return
    except CommandError:
        pass
    if sidecar.process is not None and not sidecar.process.alive:
        sidecar.spawn()
    sidecar.wait_until_ready()
