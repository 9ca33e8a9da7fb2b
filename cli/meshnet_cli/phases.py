"""What a command with several phases says of each: one line, with what came out and how long it took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import click

from meshnet.errors import CommandError


class Say(Protocol):
    def __call__(self, text: str, mark: str = "✓") -> None: ...


@contextmanager
def phase(name: str) -> Iterator[Say]:
    """The phase calls what it gets with what came out; a CommandError is the end of it."""
    started = time.monotonic()
    said, sign = "", "✓"

    def say(text: str, mark: str = "✓") -> None:
        nonlocal said, sign
        said, sign = text, mark

    try:
        yield say
    except CommandError:
        click.echo(f"✗ {name:<10} {time.monotonic() - started:5.1f}s", err=True)
        raise
    click.echo(f"{sign} {name:<10} {time.monotonic() - started:5.1f}s  {said}")
