"""What the scripts say of themselves."""

import os
import shutil
import subprocess
from pathlib import Path

import click
import pytest

import tests.bench.__main__
import tests.bench.growth.__main__
import tests.machines.__main__
import tests.soak.__main__
from meshnet_cli.demo.cli import command as demo

SCRIPTS = [path for path in sorted((Path(__file__).parent.parent / "scripts").iterdir()) if os.access(path, os.X_OK)]
TAKES = {
    "bench": [tests.bench.__main__.main, tests.bench.growth.__main__.main],
    "demo": [demo],
    "soak": [tests.soak.__main__.main],
    "test-machines": [tests.machines.__main__.main],
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """One with scripts alone, and a PATH with so little that nothing could be set up."""
    shutil.copytree(SCRIPTS[0].parent, tmp_path / "scripts")
    (tmp_path / "bin").mkdir()
    for program in ("sh", "dirname", "sed", "id"):
        found = shutil.which(program)
        assert found
        (tmp_path / "bin" / program).symlink_to(found)
    return tmp_path


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("name", [script.name for script in SCRIPTS])
def test_a_script_asked_for_help_says_what_it_is_for_and_how_it_is_called_and_does_nothing(
    checkout: Path, name: str, option: str
) -> None:
    done = subprocess.run(
        ["../scripts/" + name, option],
        cwd=checkout / "bin",
        env={"PATH": str(checkout / "bin")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"  scripts/{name}" in done.stdout
    taken = [each for command in TAKES.get(name, []) for each in command.params if isinstance(each, click.Option)]
    assert [option.opts for option in taken if not _named(option, done.stdout)] == []
    assert not (checkout / ".venv").exists()


def _named(option: click.Option, text: str) -> bool:
    return any(name in text for name in (*option.opts, *option.secondary_opts))
