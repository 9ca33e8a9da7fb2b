"""Real clients for hours, while things go wrong at random; see scripts/soak."""

import random
import time

import click

from meshnet_cli.demo.sandbox import enter_sandbox
from meshnet_cli.main import expected_errors
from tests.soak.soak import soak


@click.command()
@click.option("--seconds", type=click.FloatRange(10), default=3600.0, help="How long (3600).")
@click.option("--seed", type=int, help="What goes wrong, and when; of its own choice, and printed, if not said.")
@click.option("--only", metavar="TEXT", default="", help="Only faults with this in their name.")
@click.pass_context
def main(context: click.Context, seconds: float, seed: int | None, only: str) -> None:
    """Exit 1 when a client failed that no fault explains, a byte or a record is missing, or something grew."""
    with expected_errors(context):
        enter_sandbox()
        began = time.monotonic()
        report = soak(
            seconds,
            random.randrange(1 << 32) if seed is None else seed,
            lambda line: click.echo(f"{time.monotonic() - began:8.1f} s  {line}"),
            only,
        )
    click.echo("\n".join(report.lines))
    for line in report.wrong:
        click.echo(f"wrong: {line}", err=True)
    if report.wrong:
        context.exit(1)


if __name__ == "__main__":
    main(prog_name="scripts/soak")
