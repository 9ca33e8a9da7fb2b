"""`meshnet proxy`: the sidecar itself, in the foreground."""

import click

from meshnet_cli.configuration import config_option, read_settings


@click.command(
    "proxy",
    short_help="Run the sidecar in the foreground.",
    epilog="Example: meshnet proxy --config /etc/meshnet/meshnet.toml",
)
@config_option
def command(config: str | None) -> None:
    """Run the sidecar in the foreground until SIGTERM, which drains it.

    The access log goes to standard output, everything else to standard error. SIGHUP reads the mesh files again.
    """
    settings = read_settings(config)

    import logging

    import trio

    from meshnet.proxy.app import run

    logging.basicConfig(
        level=settings.log.level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True
    )
    trio.run(run, settings)
