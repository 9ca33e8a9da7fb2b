"""`meshnet get`: the settings in force, and where each comes from."""

import os
from pathlib import Path

import click
import msgspec

from meshnet_cli.configuration import DEFAULT_CONFIG, config_option, read_text
from meshnet_cli.output import output_options, print_as
from meshnet_cli.table import print_table


class SettingView(msgspec.Struct, frozen=True):
    """`origin` is default, file or env; `place` the line or the variable that says it."""

    name: str
    value: str | int | tuple[str, ...]
    origin: str
    place: str


class SettingList(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    items: tuple[SettingView, ...]
    api_version: str = "meshnet.dev/v1"
    kind: str = "SettingList"


@click.command(
    "get",
    short_help="The settings, and where each comes from.",
    epilog="\b\nExamples:\n  meshnet get\n  meshnet get capture.exclude_inbound_ports\n  meshnet get capture -o json",
)
@config_option
@output_options
@click.argument("name", metavar="[KEY]", required=False)
def command(config: str | None, output: str, name: str | None) -> None:
    """Show the settings in force: all, those of a section, or the value of one.

    A variable beats the file, the file beats the default.
    """
    from meshnet.codec.edit import need_setting

    items = [item for item in setting_list(config).items if name in (None, item.name, item.name.partition(".")[0])]
    if not items:
        need_setting(name or "")
    alone = name is not None and len(items) == 1 and items[0].name == name

    def table() -> None:
        if alone:
            click.echo(_shown(items[0]))
        else:
            print_table(("KEY", "VALUE", "FROM"), [(i.name, _shown(i) or "-", i.place or i.origin) for i in items])

    print_as(output, SettingList(items=tuple(items)), items, name=lambda item: item.name, table=table)


def setting_list(config: str | None) -> SettingList:
    """All that are in force. Raises ConfigError."""
    from meshnet.codec.settings import settings_with_origin

    file = config or DEFAULT_CONFIG
    text = read_text(file) if config or Path(file).exists() else ""
    settings, origins = settings_with_origin(text, os.environ, file)
    items = []
    for full, origin in origins.items():
        section, _, key = full.partition(".")
        value = getattr(getattr(settings, section), key)
        items.append(SettingView(full, value, origin.kind, origin.place))
    return SettingList(items=tuple(items))


def _shown(item: SettingView) -> str:
    """As `meshnet set` takes it."""
    return ",".join(item.value) if isinstance(item.value, tuple) else str(item.value)
