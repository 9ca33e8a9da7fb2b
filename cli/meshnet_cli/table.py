"""Tables in plain text: aligned by the cells that characters take on a screen, never cut."""

from collections.abc import Mapping, Sequence

import click

from meshnet_cli.output import printable

NOTE_INDENT = " " * 8

Colors = Mapping[str, Mapping[str, str]]
"""Column: {the whole text of a cell: its colour}."""


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    header: bool = True,
    notes: Sequence[str] = (),
    colors: Colors = {},  # noqa: B006 (a Mapping: nobody writes to it)
) -> None:
    """Prints `rows` under `columns`; `notes`, one a row where given, are second lines below their row."""
    lines = table_lines(columns, rows, header=header, notes=notes, colors=colors)
    if lines:
        click.echo("\n".join(lines))


def table_lines(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    header: bool = True,
    notes: Sequence[str] = (),
    colors: Colors = {},  # noqa: B006 (a Mapping: nobody writes to it)
) -> list[str]:
    """What print_table prints. Cells and notes are made harmless here."""
    shown = [[printable(cell) for cell in row] for row in rows]
    heads = [list(columns)] if header else []
    widths = [max(map(cell_width, column)) for column in zip(*heads, *shown, strict=True)]
    lines = [aligned(columns, widths)] if header else []
    for at, row in enumerate(shown):
        lines.append(aligned(row, widths, cell_colors(columns, row, colors)))
        if at < len(notes) and notes[at]:
            lines.append(NOTE_INDENT + printable(notes[at]))
    return lines


def aligned(cells: Sequence[str], widths: Sequence[int], colors: Sequence[str | None] = ()) -> str:
    """One line: each cell filled up to its width, two spaces between, none at the end."""
    colors = colors or [None] * len(cells)
    padding = [" " * max(0, width - cell_width(cell)) for cell, width in zip(cells, widths, strict=True)]
    padding[-1] = ""
    painted = [click.style(cell, fg=color) if color else cell for cell, color in zip(cells, colors, strict=True)]
    return "  ".join(cell + pad for cell, pad in zip(painted, padding, strict=True)).rstrip()


def cut(line: str, cells: int) -> str:
    """Its beginning, as much as so many cells have room for. Of a line without colours."""
    if line.isascii():
        return line[:cells]
    taken = 0
    for at, character in enumerate(line):
        taken += cell_width(character)
        if taken > cells:
            return line[:at]
    return line


def cell_colors(columns: Sequence[str], cells: Sequence[str], colors: Colors) -> list[str | None]:
    return [colors.get(name, {}).get(cell) for name, cell in zip(columns, cells, strict=True)]


def cell_width(text: str) -> int:
    """How many cells of a terminal `text` takes: two for most of Chinese, none for a combining accent."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # only for those who need it: start-up time is imports

    return cell_len(text)
