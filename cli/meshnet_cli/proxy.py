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

    import trio

    from meshnet.proxy.app import run
    from meshnet.proxy.log import log_to_stderr

    log_to_stderr(settings.log.level)
    trio.run(run, settings)
