"""The demonstration: hosts made of network namespaces, real rules, real sidecars, and proofs that can fail.

sandbox    this process in namespaces of its own, so that the host is never touched
world      hosts on a switch, and the programs that run on them
folder     where its files are, and what becomes of those of a run that was killed
mesh       meshnet on those hosts
stage      the hosts of the demonstration; programs.py is what runs on them
wire       what passes between the hosts
proofs     what is proved
cli        `meshnet demo`
"""

from typing import Any


def __getattr__(name: str) -> Any:
    # Tests build worlds without importing a command line.
    if name == "command":
        from meshnet_cli.demo.cli import command

        return command
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
