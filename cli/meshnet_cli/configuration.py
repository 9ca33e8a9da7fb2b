"""Which meshnet.toml a command works with."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from meshnet.errors import ConfigError
from meshnet.model.settings import AdminSection, Settings
from meshnet_cli.output import warn, with_sudo

DEFAULT_CONFIG = "/etc/meshnet/meshnet.toml"
DEFAULT_SOCKET = AdminSection().socket
_CONFIG_VARIABLE = "MESHNET_CONFIG"


def config_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--config",
        envvar=_CONFIG_VARIABLE,
        metavar="FILE",
        help=f"Settings; without it {DEFAULT_CONFIG} if that exists, else the defaults.",
    )(command)


def read_settings(config: str | None) -> Settings:
    """flag > environment > file > default. Raises ConfigError."""
    from meshnet.codec.settings import load_settings

    if config is None and not _somebody_wrote(DEFAULT_CONFIG):
        return load_settings("", os.environ, "the environment")
    file = config or DEFAULT_CONFIG
    return load_settings(read_text(file), os.environ, file)


def admin_socket() -> str:
    """Where the settings say that the sidecar listens.

    Who asks a sidecar must get an answer even if its settings were broken since: this warns, and takes the default.
    """
    config = os.environ.get(_CONFIG_VARIABLE) or None
    if config is None and "MESHNET_ADMIN__SOCKET" not in os.environ and not _somebody_wrote(DEFAULT_CONFIG):
        return DEFAULT_SOCKET  # nobody says anything: reading settings would be half of the time that a command takes
    try:
        return read_settings(config).admin.socket
    except ConfigError as error:
        first, *more = str(error).splitlines()
        others = f", and {len(more)} more" if more else ""
        warn(f"the settings are not read: {first}{others}; looking for the sidecar at {DEFAULT_SOCKET}")
        return DEFAULT_SOCKET


def _somebody_wrote(file: str) -> bool:
    """Also true of a file that may not be looked at: reading it says so."""
    try:
        os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def read_text(file: str) -> str:
    """Raises ConfigError."""
    try:
        content = Path(file).read_bytes()
    except FileNotFoundError as error:
        raise ConfigError("there are no such settings", file=file, suggestion="name another: --config FILE") from error
    except PermissionError as error:
        again = with_sudo() if os.geteuid() else f"ls -ld {file}"
        raise ConfigError("the settings cannot be read: permission denied", file=file, suggestion=again) from error
    except OSError as error:
        raise ConfigError(
            f"the settings cannot be read: {error.strerror}", file=file, suggestion="name a file: --config FILE"
        ) from error
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            "the settings are not UTF-8 text", file=file, line=line, suggestion="save the file as UTF-8"
        ) from error
