"""`meshnet log level`: what a sidecar logs, changed while it runs."""

from typing import get_args

import click

from meshnet.model.admin import SUBSYSTEMS, Level, ListLogLevels, LogLevel, LogLevelList, SetLogLevel
from meshnet_cli.client import admin_options, ask
from meshnet_cli.output import DURATION, Parsed, age, output_options, print_as
from meshnet_cli.table import print_table

_LEVELS: tuple[Level, ...] = get_args(Level)
_BACK = "default"


def parse_wish(text: str) -> SetLogLevel:
    """Of `debug`, `proxy=debug` or `proxy=default`. Raises ValueError."""
    subsystem, _, word = text.rpartition("=")
    if "=" in text and subsystem not in SUBSYSTEMS:
        raise ValueError(f"{subsystem!r} is not one of {', '.join(SUBSYSTEMS)}")
    if word == _BACK:
        return SetLogLevel(subsystem=subsystem)
    for level in _LEVELS:
        if level == word:
            return SetLogLevel(subsystem=subsystem, level=level)
    raise ValueError(f"{word!r} is not one of {', '.join((*_LEVELS, _BACK))}")


@click.group("log", short_help="What the sidecar logs.")
def command() -> None:
    """What the sidecar logs beside the access log, while it runs; `log.level` is what it begins with."""


@command.command(
    "level",
    epilog="\b\nExamples:\n  meshnet log level\n  sudo meshnet log level access=debug --for 10m\n"
    "  sudo meshnet log level tunnel=debug proxy=warning\n  sudo meshnet log level tunnel=default",
)
@click.argument("wishes", nargs=-1, type=Parsed("level", parse_wish), metavar="[[SUBSYSTEM=]LEVEL]...")
@click.option("--for", "lasts", type=DURATION, help="Then it goes back by itself; without it when the sidecar ends.")
@output_options
@admin_options
def level_command(
    *, wishes: tuple[SetLogLevel, ...], lasts: float | None, output: str, socket_path: str, timeout: float
) -> None:
    """Show the log levels of the sidecar and its workers, or change them.

    LEVEL is debug, info, warning or error; default takes back what was set. Without SUBSYSTEM it is for all that have
    no level of their own. To change one is for root and the sidecar's own user.
    """
    if lasts is not None and not any(wish.level for wish in wishes):
        raise click.UsageError("--for goes with a level, as in: meshnet log level debug --for 10m")
    if lasts == 0:
        raise click.UsageError("--for 0s is no time; without --for a level lasts until the sidecar ends")
    answer = None
    for wish in wishes:
        seconds = (lasts or 0.0) if wish.level else 0.0
        request = SetLogLevel(subsystem=wish.subsystem, level=wish.level, seconds=seconds)
        answer = ask(socket_path, request, LogLevelList, timeout=timeout)
    answer = answer or ask(socket_path, ListLogLevels(), LogLevelList, timeout=timeout)
    items = answer.items

    def table() -> None:
        print_table(("SUBSYSTEM", "LEVEL", "BACK_IN"), [(it.subsystem, it.level, _back(it)) for it in items])

    print_as(output, answer, items, name=lambda it: it.subsystem, table=table)


def _back(it: LogLevel) -> str:
    return "-" if it.seconds_left is None else age(it.seconds_left)
