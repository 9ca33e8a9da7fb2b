import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from meshnet import __version__
from meshnet.errors import CommandError, ConfigError
from meshnet_cli.main import ENTRIES, expected_errors, main
from tests.cli.sidecar import ROOT, Sidecar, all_four, clean_environment

READERS = ("conns", "explain", "status", "endpoints")
HEAVY = {"trio", "cryptography", "pyroute2", "httpx", "rich", "asyncio", "ssl", "yaml", "prometheus_client"}


def modules_after(*args: str) -> set[str]:
    """Every module that `meshnet ARGS` has imported when it ends."""
    program = (
        "import sys; from meshnet_cli.main import main\n"
        "try: main.main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *args],
        cwd=ROOT,
        env={**clean_environment(), "PYTHONPATH": "cli:init:."},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return set(done.stderr.split())


def of_commands(modules: set[str]) -> set[str]:
    """The commands among them."""
    return {name for name, entry in ENTRIES.items() if entry.module in modules}


def test_help_imports_no_command() -> None:
    modules = modules_after("--help")
    assert of_commands(modules) == set()
    assert not HEAVY & modules


@pytest.mark.parametrize("name", READERS)
def test_help_of_a_command_imports_that_command_and_nothing_heavy(name: str) -> None:
    modules = modules_after(name, "--help")
    assert of_commands(modules) == {name}
    assert not HEAVY & modules


def test_a_whole_conns_imports_only_the_floors_it_stands_on(sidecar: Sidecar) -> None:
    sidecar.will_answer(all_four())
    modules = modules_after("conns", "--socket", str(sidecar.path))
    assert not HEAVY & modules
    assert {name for name in modules if name.split(".")[0] in {"meshnet", "meshnet_init", "meshnet_cli"}} == {
        "meshnet",
        "meshnet.errors",
        "meshnet.model",
        "meshnet.model.address",
        "meshnet.model.admin",
        "meshnet.model.canary",
        "meshnet.model.capture",
        "meshnet.model.connection",
        "meshnet.model.duration",
        "meshnet.model.identity",
        "meshnet.model.settings",
        "meshnet_cli",
        "meshnet_cli.client",
        "meshnet_cli.columns",
        "meshnet_cli.configuration",
        "meshnet_cli.conns",
        "meshnet_cli.filter_flags",
        "meshnet_cli.filters",
        "meshnet_cli.groups",
        "meshnet_cli.listing",
        "meshnet_cli.main",
        "meshnet_cli.output",
        "meshnet_cli.table",
    }


@pytest.mark.parametrize("name", ENTRIES)
def test_every_command_named_in_the_help_is_there_and_says_what_it_does(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"], prog_name="meshnet", catch_exceptions=False)
    assert result.exit_code == 0
    assert f"Usage: meshnet {name} " in result.output
    assert len(result.output.splitlines()) > 3


@pytest.mark.parametrize("name", READERS)
def test_the_help_of_a_command_begins_as_the_list_of_commands_says(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"], prog_name="meshnet")
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: meshnet {name} ")
    assert ENTRIES[name].help in result.output
    assert f"  meshnet {name}" in result.output.partition("Examples:")[2]


def test_the_help_lists_the_commands_in_groups() -> None:
    output = CliRunner().invoke(main, ["-h"], prog_name="meshnet").output
    titles = [line for line in output.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Options:", "Start here:", "See:", "Fix and look:", "Kubernetes:", "Admin:"]
    assert all(f"\n  {name} " in output for name in ENTRIES)


def test_a_misspelt_command_is_guessed() -> None:
    result = CliRunner().invoke(main, ["conn"], prog_name="meshnet")
    assert result.exit_code == 2
    assert "No such command 'conn'. Did you mean 'conns'?" in result.stderr


def test_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).output == f"meshnet, version {__version__}\n"


def shown(error: BaseException) -> tuple[int, str]:
    """The exit code and the text of a command that raises `error`."""

    @click.command()
    def command() -> None:
        with expected_errors(click.get_current_context()):
            raise error

    result = CliRunner().invoke(command)
    return result.exit_code, result.stderr


def test_a_command_error_is_three_lines_and_its_own_code() -> None:
    error = CommandError("it broke", why="a reason", fix="meshnet status", code=7)
    assert shown(error) == (7, "error: it broke\nwhy: a reason\nfix: meshnet status\n")
    assert shown(CommandError("it broke")) == (1, "error: it broke\n")


def test_a_config_error_is_exit_78_and_names_file_and_line() -> None:
    error = ConfigError("unknown field 'prot'", file="/etc/meshnet/a.yaml", line=3, suggestion="did you mean port?")
    assert shown(error) == (
        78,
        "error: unknown field 'prot'\nwhy: it is in /etc/meshnet/a.yaml:3\nfix: did you mean port?\n",
    )
    assert shown(ConfigError("no such mode")) == (78, "error: no such mode\n")


@pytest.mark.parametrize(
    ("file", "line", "why", "fix"),
    [
        ("/etc/meshnet/a.yaml", 3, "it is in /etc/meshnet/a.yaml:3", "edit /etc/meshnet/a.yaml, line 3"),
        ("/srv/my mesh.d", 0, "it is about /srv/my mesh.d", "ls -ld '/srv/my mesh.d'"),
        ("MESHNET_LOG__LEVEL", 0, "the variable MESHNET_LOG__LEVEL says so", "unset MESHNET_LOG__LEVEL"),
    ],
)
def test_a_config_error_without_a_suggestion_says_where_to_look(file: str, line: int, why: str, fix: str) -> None:
    error = ConfigError("it is wrong", file=file, line=line)
    assert shown(error) == (78, f"error: it is wrong\nwhy: {why}\nfix: {fix}\n")


def test_several_problems_are_a_line_each_and_none_passes_for_a_line_of_ours() -> None:
    error = CommandError("first\nfix: rm -rf /\x1b[2J", fix="meshnet status")
    assert shown(error) == (1, "error: first\n       fix: rm -rf /\\x1b[2J\nfix: meshnet status\n")


def test_ctrl_c_is_exit_130_and_silent() -> None:
    assert shown(KeyboardInterrupt()) == (130, "")


def test_a_fault_of_our_own_is_not_dressed_up() -> None:
    with pytest.raises(ZeroDivisionError):
        main_with_a_fault()


def main_with_a_fault() -> None:
    with expected_errors(click.Context(main)):
        raise ZeroDivisionError
