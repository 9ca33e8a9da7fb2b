"""`meshnet uninject`: what `meshnet inject` did, taken back. The two share their options, so they share a file."""

from meshnet_cli.inject import uninject_command as command

__all__ = ["command"]
