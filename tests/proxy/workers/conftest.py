"""The mesh of tests/proxy, where `web` and `api` have two workers each."""

from collections.abc import Iterator

import pytest

from tests.proxy.conftest import Hosts
from tests.world import Mesh, World, into_the_mesh

WORKERS = {"workers": 2}


@pytest.fixture(scope="module")
def _hosts() -> Iterator[Hosts]:
    with World() as world:
        web, api, twin, outside = (world.host(name) for name in ("web", "api", "twin", "outside"))
        hosts = Hosts(world, Mesh(world), web, api, twin, outside)
        hosts.mesh.write(*hosts.resources)
        into_the_mesh(hosts.mesh, (web, api), proxy=WORKERS)
        yield hosts
