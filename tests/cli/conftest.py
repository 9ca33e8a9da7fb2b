import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from meshnet_cli.main import main
from tests.cli.sidecar import Sidecar


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
