"""How commands print: the options they share, numbers and ages for people, and text from peers made harmless."""

import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import click
import msgspec

from meshnet.model.duration import parse_duration

FORMATS = ("table", "wide", "json", "jsonl", "name")

T = TypeVar("T", bound=msgspec.Struct)
F = TypeVar("F", bound=Callable[..., Any])


def output_options(command: F) -> F:
    """-o and --color. The command gets `output`, one of FORMATS."""
    output = click.option(
        "-o",
        "--output",
        type=click.Choice(FORMATS),
        default="table",
        show_default=True,
        envvar="MESHNET_OUTPUT",
        is_eager=True,
        callback=_remember_format,
        help="How to print: for people, for programs, or names only.",
    )
    color = click.option(
        "--color",
        type=click.Choice(("auto", "always", "never")),
        default="auto",
        expose_value=False,
        callback=_set_color,
        help="Colour in tables; auto: on a terminal, unless NO_COLOR is set.",
    )
    return output(color(command))


def table_options(command: F) -> F:
    """--no-header and --columns. The command gets `no_header` and `columns` (a text or None)."""
    no_header = click.option("--no-header", is_flag=True, help="Rows only: no header, notes or totals.")
    columns = click.option("--columns", metavar="A,B,...", help="Which columns, in this order.")
    return no_header(columns(command))


def sort_option(*keys: str) -> Callable[[F], F]:
    """--sort, largest first. The command gets `sort`, one of `keys` or None."""
    return click.option("--sort", type=click.Choice(keys), help="Largest first.")


def chosen_columns(text: str | None, default: Sequence[str], known: Collection[str]) -> list[str]:
    """The columns of --columns, or `default`. Raises click.BadParameter naming an unknown one."""
    if text is None:
        return list(default)
    names = [name.strip().upper() for name in text.split(",")]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
            raise click.BadParameter(f"no column {printable(name)!r}; {hint}", param_hint="--columns")
    return names


def output_format(ctx: click.Context) -> str:
    """What -o said in whatever command runs below `ctx`; `table` before it was read."""
    return str(ctx.meta.get(_FORMAT_KEY, "table"))


_FORMAT_KEY = "meshnet_cli.output"


def _remember_format(ctx: click.Context, _param: click.Parameter, value: str) -> str:
    ctx.meta[_FORMAT_KEY] = value
    return value


def _set_color(ctx: click.Context, _param: click.Parameter, value: str) -> None:
    if value == "auto":
        ctx.color = False if os.environ.get("NO_COLOR") else None  # None: click asks whether it is a terminal
    else:
        ctx.color = value == "always"


def print_as(
    output: str, whole: msgspec.Struct, items: Sequence[T], *, name: Callable[[T], str], table: Callable[[], None]
) -> None:
    """`whole` as JSON, each of its `items` as a line of JSON or by its name, or a `table`, whichever `output` says."""
    match output:
        case "json":
            print_json(whole)
        case "jsonl":
            for item in items:
                print_json_line(item)
        case "name":
            for item in items:
                click.echo(printable(name(item)))
        case _:
            table()


def print_json(value: msgspec.Struct) -> None:
    """One indented document."""
    click.echo(harmless_json(msgspec.json.format(msgspec.json.encode(value), indent=2).decode()))


def print_json_line(value: msgspec.Struct) -> None:
    click.echo(harmless_json(msgspec.json.encode(value).decode()))


class WarningView(msgspec.Struct):
    """What goes to stderr when JSON was asked for."""

    warning: str
    kind: str = "Warning"


def warn(text: str) -> None:
    """One line on stderr about what does not stop the command."""
    if output_format(click.get_current_context()) in {"json", "jsonl"}:
        click.echo(harmless_json(msgspec.json.encode(WarningView(text)).decode()), err=True)
    else:
        click.echo(f"warning: {printable(text)}", err=True)


def with_sudo() -> str:
    """The command that runs, to be typed again with more rights."""
    return shlex.join(["sudo", "meshnet", *sys.argv[1:]])


def harmless_json(text: str) -> str:
    """The same JSON, with what a terminal would act on written as \\uXXXX. Such characters only occur in strings."""
    return "".join(c if c == "\n" or c.isprintable() else _json_escape(c) for c in text)


def _json_escape(character: str) -> str:
    utf16 = character.encode("utf-16-be")
    return "".join(f"\\u{utf16[at : at + 2].hex()}" for at in range(0, len(utf16), 2))


def printable(text: str) -> str:
    """`text` with control, bidirectional and invisible characters spelled out: names come from peers.

    A terminal acts on escape sequences, and a right-to-left override makes one name look like another.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_UNITS = " KMGTP"


def size(count: int) -> str:
    """Bytes for people, in powers of 1000: `0`, `999`, `4.1K`, `88K`, `1.2M`."""
    value, unit = float(count), 0
    while round(value) >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    text = f"{value:.1f}".removesuffix(".0") if unit and value < 9.95 else f"{value:.0f}"
    return (text + _UNITS[unit]).rstrip()


def parse_size(text: str) -> int:
    """Bytes of `512`, `4.1K`, `1.2M`. Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMGTP]?)", text.upper())
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 512, 88K or 1.2M")
    thousands = _UNITS.index(match[2] or " ")
    return round(float(match[1]) * float(1000**thousands))


def age(seconds: float) -> str:
    """A time span for people, its two largest units: `0s`, `12s`, `2m14s`, `3h`, `4d2h`."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, length)
        if parts or count:
            parts.append(f"{count}{unit}" if count else "")
    return "".join(parts[:2]) or "0s"


def milliseconds(value: float | None) -> str:
    """`0.4ms`, `12ms`, or `-` for what was not measured."""
    if value is None:
        return "-"
    return f"{value:.1f}ms" if value < 9.95 else f"{value:.0f}ms"


class Parsed(click.ParamType[Any]):
    """An option's text through a function that raises ValueError with the words to show."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


DURATION = Parsed("duration", parse_duration)
SIZE = Parsed("size", parse_size)
