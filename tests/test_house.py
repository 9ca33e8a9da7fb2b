"""The rules of the house, held on the tree itself."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    path for top in ("meshnet", "cli/meshnet_cli", "init/meshnet_init") for path in sorted((ROOT / top).rglob("*.py"))
]
ALL_CODE = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
C_CODE = sorted(path for top in ("meshnet", "tests") for path in (ROOT / top).rglob("*.[ch]"))

LONGEST = 500
WIDEST = 120  # of C; ruff holds Python to it
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "manager", "core", "misc"}

FORBIDDEN_AT_START = {
    "trio": "an event loop; the command line needs none to ask a question",
    "cryptography": "slow to import; only ca and the sidecar need it",
    "pyroute2": "slow to import; only the rules need it",
    "httpx": "slow to import",
    "rich": "only on a terminal",
}


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("path", [*ALL_CODE, *C_CODE], ids=names([*ALL_CODE, *C_CODE]))
def test_no_file_is_so_long_that_it_tells_two_stories(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("path", C_CODE, ids=names(C_CODE))
def test_no_line_of_c_is_wider_than_one_of_python(path: Path) -> None:
    assert [line for line in path.read_text().splitlines() if len(line) > WIDEST] == []


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_every_source_file_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} begins without a docstring"


def test_no_room_is_called_by_a_word_that_says_nothing() -> None:
    assert not {path.stem for path in SOURCES} & FORBIDDEN_NAMES
    assert not {path.parent.name for path in SOURCES} & FORBIDDEN_NAMES


@pytest.mark.parametrize("path", ALL_CODE, ids=names(ALL_CODE))
def test_every_ignore_has_its_reason_beside_it(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for mark in re.finditer(r"#\s*(type: ignore|noqa)(\[[\w, -]+\]|: [A-Z0-9, ]+)?(?P<reason>.*)", line):
            if path == Path(__file__):
                continue
            assert len(mark["reason"].strip(" #-")) > 5, f"{path}:{number}: an ignore without its reason"


def test_the_commands_that_ask_questions_start_without_heavy_imports() -> None:
    script = (
        "import sys; sys.argv = ['meshnet', 'conns', '--help']\n"
        "from meshnet_cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=_environment()
    )
    imported = {name.partition(".")[0] for name in done.stderr.split()}
    assert "click" in imported
    for name, why in FORBIDDEN_AT_START.items():
        assert name not in imported, f"meshnet conns --help imports {name}: {why}"


def test_the_top_level_is_what_the_user_asked_for() -> None:
    wanted = {"pyproject.toml", "meshnet", "init", "cli", "tests", "vagrant", "scripts"}
    assert wanted <= {path.name for path in ROOT.iterdir()}


def test_every_dependency_of_the_scripts_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        re.split(r"[=<>]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "scripts/constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {re.split(r"[=<>\[;]", name)[0].lower().replace("_", "-") for name in wanted} <= pinned


def _environment() -> dict[str, str]:
    roots = [str(ROOT), str(ROOT / "cli"), str(ROOT / "init")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(roots)}
