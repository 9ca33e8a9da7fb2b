"""`meshnet rules keep`: the keeper of this network namespace's rules, in the foreground."""

import sys
from functools import partial

import click

from meshnet_cli.configuration import config_option, read_settings


@click.command(
    "keep",
    short_help="Hold the rules to the plan, whoever changes them.",
    epilog="\b\nExamples:\n  sudo meshnet rules keep\n  sudo meshnet rules keep --config /etc/meshnet/meshnet.toml",
)
@config_option
def command(config: str | None) -> None:
    """Put the rules in, and hold them to the plan until SIGTERM, which leaves them as they are.

    Every capture.proof_interval, and whenever the kernel tells of a change, the rules are compared with the plan and
    repaired in one step; open connections live on. Each repair is told on standard error, with who had changed what,
    and in `meshnet status`. With capture.strict they are held once more, as long as this runs, where no flush reaches
    them. With capture.fail = "open" new connections go direct while the sidecar is dead. SIGHUP reads the settings
    again; those that would capture the port by which SSH reaches this host are refused (`meshnet up` has
    --accept-risk for that). `meshnet init`, `init remove` and `down` have it wait or stand down by themselves.
    """
    from meshnet.proxy.log import log_to_stderr
    from meshnet_cli import preflight
    from meshnet_cli.vm import ssh
    from meshnet_init.keep.keeper import Keeper

    settings = read_settings(config)
    preflight.need_right()
    log_to_stderr(settings.log.level)
    Keeper(lambda: read_settings(config), partial(ssh.ports, cautious=True)).run()


def keeper_command(config: str | None) -> list[str]:
    """What starts one, for whoever looks after programs on this host. It needs root, or CAP_NET_ADMIN."""
    return [sys.executable, "-m", "meshnet_cli.main", "rules", "keep", *(["--config", config] if config else [])]
