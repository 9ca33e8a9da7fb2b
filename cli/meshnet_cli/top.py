"""`meshnet top`: the same as `meshnet stat`, again and again."""

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import click

from meshnet_cli.client import admin_options
from meshnet_cli.output import chosen_columns, output_options, print_json_line, sort_option, table_options
from meshnet_cli.rates import Stat
from meshnet_cli.stat import COLUMNS, SORT_KEYS, TABLE, WIDE, chosen, interval_option, need_service, stat_lines, stats
from meshnet_cli.table import cut

# Of every terminal since the VT100 and xterm (console_codes(4)): another screen, and no cursor on it; and back.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _END_OF_LINE, _REST = "\x1b[H", "\x1b[K\n", "\x1b[J"


@click.command(
    "top",
    short_help="Rates of each service, live.",
    epilog="\b\nExamples:\n  meshnet top\n  meshnet top --sort failed --interval 5s\n  meshnet top --count 3 -o jsonl",
)
@click.argument("service", default="")
@interval_option
@sort_option(*SORT_KEYS)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after so many.")
@table_options
@output_options
@admin_options
def command(
    *,
    service: str,
    interval: float,
    sort: str | None,
    count: int | None,
    no_header: bool,
    columns: str | None,
    output: str,
    socket_path: str,
    timeout: float,
) -> None:
    """How much each service is called, and how much of that fails, again every --interval, until Ctrl-C.

    Those that are called most stand first, unless --sort says otherwise. Off a terminal each look is printed below the
    last one, with an empty line between.
    """
    if output in {"json", "name"}:
        raise click.UsageError("top goes with -o table, wide or jsonl; meshnet stat has the others")
    names = chosen_columns(columns, WIDE if output == "wide" else TABLE, COLUMNS)
    need_service(service, socket_path, timeout)
    looks = islice((chosen(found, service, sort or "opened") for found in stats(socket_path, interval, timeout)), count)
    try:
        if output == "jsonl":
            for found in looks:
                print_json_line(found)
        elif sys.stdout.isatty():
            _draw(looks, names, header=not no_header)
        else:
            _print(looks, names, header=not no_header)
    except KeyboardInterrupt:
        return


def _print(looks: Iterator[Stat], names: Sequence[str], *, header: bool) -> None:
    for at, found in enumerate(looks):
        if at:
            click.echo()
        click.echo("\n".join(stat_lines(found, names, header=header)))


def _draw(looks: Iterator[Stat], names: Sequence[str], *, header: bool) -> None:
    with _other_screen():
        for found in looks:
            columns, lines = shutil.get_terminal_size()
            title = (
                [f"{time.strftime('%H:%M:%S')}, rates of {found.interval_seconds:g}s; Ctrl-C ends"] if header else []
            )
            every = [*title, *stat_lines(found, names, header=header)]
            text = _END_OF_LINE.join(cut(line, columns) for line in every[: lines - 1])
            _write(_HOME + text + _END_OF_LINE + _REST)


@contextmanager
def _other_screen() -> Iterator[None]:
    _write(_ENTER)
    try:
        yield
    finally:
        _write(_LEAVE)


def _write(text: str) -> None:
    """click would take what moves the cursor out where colours are off."""
    sys.stdout.write(text)
    sys.stdout.flush()
