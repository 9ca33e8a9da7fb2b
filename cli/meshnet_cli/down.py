"""`meshnet down`: takes this host out of the mesh without cutting what is open."""

import click

from meshnet_cli import supervise
from meshnet_cli.configuration import config_option, read_settings
from meshnet_cli.output import DURATION


@click.command(
    "down",
    short_help="Take this host out of the mesh; open connections live on.",
    epilog="\b\nExamples:\n  sudo meshnet down\n  sudo meshnet down --drain 5m",
)
@config_option
@click.option("--drain", type=DURATION, default="30s", show_default=True, help="How long to wait for open connections.")
def command(config: str | None, drain: float) -> None:
    """Take this host out of the mesh, in three phases.

    New connections go direct at once; those that went through the sidecar are waited for; then the rules are deleted
    and the sidecar ends. Nothing is cut unless it outlives --drain. When nothing is up, nothing is done.
    """
    settings = read_settings(config)
    from meshnet_init.remove import remove

    removed = remove(drain=drain, waiting=lambda left: click.echo(f"  waiting for {left} open connections"))
    click.echo(f"✓ rules      {'removed' if removed.backends else 'there were none'}")
    if removed.cut:
        click.echo(f"! {removed.cut} connections were still open after {drain:g} s and are cut", err=True)
    stopped = supervise.stop(settings, drain=0.0 if removed.cut else drain)
    click.echo(f"✓ proxy      {'stopped' if stopped else 'there was none'}")
