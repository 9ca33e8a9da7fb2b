"""A table of figures as Markdown."""

from collections.abc import Sequence

from tests.bench.report import number


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Numbers with three digits that count; everything else as it says itself."""
    lines = [head, ["--:"] * len(head), *([_shown(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _shown(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else str(value)
