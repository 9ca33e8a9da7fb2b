"""The README is part of the product: commands, settings, fields and reasons are all in it, and its YAML is valid."""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest

from meshnet.codec.mesh import read_mesh
from meshnet.errors import Reason
from meshnet.model import resource
from meshnet.model.settings import Settings
from meshnet_cli import init
from meshnet_cli.kubernetes.wishes import ANNOTATIONS
from meshnet_cli.main import ENTRIES, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = "\n".join([README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))])
SETTINGS = [
    (f"{section.name}.{field.name}", field.default)
    for section in msgspec.structs.fields(Settings)
    for field in msgspec.structs.fields(section.type)
]


@pytest.mark.parametrize("command", ENTRIES)
def test_every_command_is_told(command: str) -> None:
    assert f"`meshnet {command}" in README


@pytest.mark.parametrize(("name", "default"), SETTINGS, ids=[name for name, _ in SETTINGS])
def test_every_setting_is_told_with_its_default(name: str, default: object) -> None:
    row = re.search(rf"^\| `{re.escape(name)}` \|([^|]*)\|", README, re.MULTILINE)
    assert row, f"{name} is not in the README"
    shown = ", ".join(default) if isinstance(default, tuple) else str(default)
    shown = shown.lower() if isinstance(default, bool) else shown
    assert row[1].strip().partition(" (")[0] == shown


def test_every_variable_that_is_read_is_told() -> None:
    sources = [file.read_text() for room in ("cli", "meshnet") for file in (ROOT / room).rglob("*.py")]
    read = {name for source in sources for name in re.findall(r"""["'](MESHNET_[A-Z]+)["']""", source)}
    assert {"MESHNET_CONFIG", "MESHNET_NODE"} <= read
    assert [name for name in sorted(read) if f"`{name}`" not in README] == []


@pytest.mark.parametrize("annotation", ANNOTATIONS)
def test_every_annotation_is_told_with_an_example(annotation: str) -> None:
    assert re.search(rf"^\| `meshnet\.dev/{annotation}` \| `[^`]+` \|", README, re.MULTILINE)


@pytest.mark.parametrize("command", ["inject", "uninject", "install"])
def test_every_flag_for_kubernetes_is_told_with_an_example(command: str) -> None:
    found = importlib.import_module(ENTRIES[command].module).command
    flags = {each for option in found.params for each in (*option.opts, *option.secondary_opts)}
    told = set(re.findall(r"`(--?[a-z-]+)`", "".join(re.findall(r"^\| (`-[^|]*)\| `[^`]+` \|", README, re.MULTILINE))))
    assert flags - {"--native-sidecar"} <= told  # the default


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_told(reason: Reason) -> None:
    assert f"`{reason}`" in README


def test_every_field_of_a_resource_is_shown() -> None:
    specs = [found for found in vars(resource).values() if isinstance(found, type) and found.__name__.endswith("Spec")]
    wanted = {field.encode_name for spec in specs for field in msgspec.structs.fields(spec)} - {"name"}
    shown = set(re.findall(r"\b(\w+):", README))
    assert wanted <= shown


def test_its_yaml_makes_a_mesh() -> None:
    for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL):
        assert read_mesh([("README.md", block)], 1).services


@pytest.mark.parametrize("flag", [f"--{key.replace('_', '-')}" for _, key, _, _ in init.FLAGS])
def test_every_flag_of_the_rules_is_told_with_an_example(flag: str) -> None:
    page = (ROOT / "docs" / "capture.md").read_text()
    assert re.search(rf"^\| `{flag}` \| `{flag} \S+` \|", page, re.MULTILINE), flag


def commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


COMMANDS = dict(commands(main))
SHARED = {"--output", "--color", "--socket", "--timeout", "--config", "--no-header", "--columns"}
ROW = r"^\| `[^|]*{flag}\b.*?` \| `[^|]*{words}"


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] not in ("inject", "uninject", "install")])
def test_every_flag_is_told_with_an_example(words: tuple[str, ...]) -> None:
    for option in COMMANDS[words].params:
        if not isinstance(option, click.Option) or option.hidden:
            continue
        for flag in (*option.opts, *option.secondary_opts):
            if flag.startswith("--"):
                command = "" if flag in SHARED else f"meshnet {words[0]} "
                assert re.search(ROW.format(flag=flag, words=command), PAGES, re.MULTILINE), flag


EXAMPLES = re.findall(r"\| `((?:sudo )?meshnet [^`]+)`", (ROOT / "docs" / "commands.md").read_text())


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_of_a_flag_can_be_typed(example: str) -> None:
    words = shlex.split(re.split(r" (?:\\\||&&) ", example.removeprefix("sudo "))[0])[1:]
    command: click.Command = main
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), words[0])
        assert found is not None
        command, words = found, words[1:]
    command.make_context("meshnet", words)  # raises what a wrong flag or value would be told
