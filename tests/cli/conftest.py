import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from meshnet_cli.main import main
from tests.cli.machine import Machine
from tests.cli.sidecar import Sidecar
from tests.world import Host, World


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    server = Sidecar(tmp_path / "admin.sock")
    yield server
    server.close()


Meshnet = Callable[..., Result]


@pytest.fixture
def meshnet(sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch) -> Meshnet:
    """`meshnet ARGS` in this process, asking `sidecar`."""
    for name in [name for name in os.environ if name.startswith(("MESHNET_", "NO_COLOR"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MESHNET_SOCKET", str(sidecar.path))

    def run(*args: str) -> Result:
        # catch_exceptions=False: a traceback is a failed test, not an exit code.
        return CliRunner().invoke(main, list(args), prog_name="meshnet", catch_exceptions=False)

    return run


@pytest.fixture
def new_machine(world: World) -> Iterator[Callable[[str], Machine]]:
    with ExitStack() as stack:

        def make(name: str) -> Machine:
            machine = Machine(world, name)
            stack.callback(machine.close)
            return machine

        yield make


@pytest.fixture
def machine(new_machine: Callable[[str], Machine]) -> Machine:
    return new_machine("web")


@pytest.fixture
def peer(world: World) -> Host:
    return world.host("peer")
