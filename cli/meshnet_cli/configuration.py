"""Which meshnet.toml a command works with."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from meshnet.errors import ConfigError
from meshnet.model.settings import Settings

DEFAULT_CONFIG = "/etc/meshnet/meshnet.toml"


def config_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--config",
        envvar="MESHNET_CONFIG",
        metavar="FILE",
        help=f"Settings; without it {DEFAULT_CONFIG} if that exists, else the defaults.",
    )(command)


def read_settings(config: str | None) -> Settings:
    """flag > environment > file > default. Raises ConfigError."""
    from meshnet.codec.settings import load_settings

    if config is None and not Path(DEFAULT_CONFIG).exists():
        return load_settings("", os.environ, "the environment")
    file = config or DEFAULT_CONFIG
    try:
        text = Path(file).read_text()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=file) from error
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8 text", file=file) from error
    return load_settings(text, os.environ, file)
