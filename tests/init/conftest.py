"""A lab for each backend: what holds for one holds for all."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from meshnet_init.choose import every_backend
from tests.init.kept import Kept
from tests.init.kernel import FAMILIES, Lab, backend_named
from tests.init.sides import Sides
from tests.world import World

# Chosen by what is installed, but never fewer than those that meshnet promises: see test_backends.
BACKENDS = [backend.name for backend in every_backend()]


@pytest.fixture(params=BACKENDS)
def lab(request: pytest.FixtureRequest, world: World) -> Lab:
    return Lab(world, backend_named(request.param))


@pytest.fixture
def kept(lab: Lab) -> Kept:
    return Kept(lab)


@pytest.fixture
def by_nft(world: World) -> Kept:
    """For what has nothing to do with the backend."""
    return Kept(Lab(world, backend_named("nft")))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def sides(lab: Lab, family: str) -> Iterator[Sides]:
    with ExitStack() as stack:
        yield Sides(lab, family, stack)
