"""Measures how meshnet's work grows, as a report in Markdown; see scripts/bench. Two to three minutes."""

import os
import tempfile
from pathlib import Path

import click

from meshnet_cli.demo.sandbox import enter_sandbox
from meshnet_cli.main import expected_errors
from tests.bench import load, machine
from tests.bench.growth import mesh
from tests.bench.growth.connections import LEVELS, connections
from tests.bench.growth.room import rooms
from tests.bench.growth.storm import storm
from tests.bench.tests import MODES, MTLS, PLAIN

GROWTH = Path(__file__).parent.with_name("GROWTH.md")

_HOW = """\
Written by `scripts/bench --growth --write`. What must not grow is what one connection costs, and how late the event
loop is. CPU is user and system time of both sidecars.
"""

_CONNECTIONS = """\

Client and sidecar on one host, sidecar and server on another, as for RESULTS.md; so many connections are open that have
each had one request answered, and are idle: both sidecars say so. Where one process cannot have them all there is a
second table, of sidecars with as many workers as it takes; of mTLS only that one.

*KiB/connection*: by how much both sidecars have grown since none was open; of a few connections it is what the
allocators happen to do. *CPU us/request*: ping-pong of 256 bytes on 64 more. *New connection*: connect, request,
response, close, eight at a time; its *handshakes* are those of tunnels meanwhile. *Lag* of any event loop, meanwhile;
*lag of both* while it was scraped and asked for `meshnet conns`, three times each. Each figure is the bound of a bucket
in `/metrics` that no turn of a loop was above. *Scrape* and *conns*: the fastest of three, of the slower sidecar.
*Descriptors*: of the process of a sidecar that has most. CPU is the median of three times half a second; a verdict
needs all three on one side of the target.
"""

_STORM = """\
Connect, request, response, close, 256 at a time for 5 s, after 3 s of the same. What the generator has opened, what
`meshnet_tcp_connections_closed_total` has counted, and the lines of the access log (each with an id of its own) must be
the same number, on both sides.
"""

_SERVICES = """\
In one event loop, with real files and the relay of a sidecar: all services change, and then there is a scrape. Every
endpoint is known, and each service has an order in force, up to as many as there may be; with another mesh none of them
is any more. *Lag* is by how much a task was late that wants to run every millisecond, and not for want of a processor.
Each figure is the worst of three changes. The verdict needs all three of them on one side of the target; otherwise it
is *too noisy*.
"""

_WARM, _SECONDS = 3.0, 5.0
_LONGEST = {PLAIN: 30.0, MTLS: 75.0}  # seconds, for a table of open connections; of mTLS each takes a handshake
_PATIENCE = 20.0  # seconds, for a quiet machine


@click.command()
@click.option("--write", is_flag=True, help=f"Write the report to {os.path.relpath(GROWTH)} too.")
@click.pass_context
def main(context: click.Context, write: bool) -> None:
    """Endpoints, services, open connections, a storm of new ones. Exit 1 when the account of the storm is wrong."""
    with expected_errors(context):
        enter_sandbox()
        files = machine.allow_many_files()
        with tempfile.TemporaryDirectory(prefix="meshnet-bench-") as directory:
            program = load.build(Path(directory))
            with machine.spinners(program, True) as spinning:
                about = machine.description(spinning, "scripts/bench --growth")
                noise, waited = machine.wait_until_quiet(program, spinning, _PATIENCE)
                about["quiet"] = (
                    f"waited {waited:.0f} s; then others used {noise.others:.0%} of the processors' time, "
                    f"and {noise.stolen:.0%} was stolen"
                )
                parts = ["# How the work grows", _HOW, *(f"- {name}: {value}" for name, value in about.items())]
                parts += ["\n## Open connections", _CONNECTIONS.rstrip()]
                found = rooms(LEVELS[-1], files, machine.free_memory())
                for mode, room in (*((PLAIN, room) for room in found), (MTLS, found[-1])):
                    parts += [
                        f"\n### {MODES[mode]}, {room.processes} in each sidecar\n",
                        connections(program, mode, LEVELS, room, _LONGEST[mode]).rstrip(),
                    ]
                parts.append("")
                table, wrong = storm(program, [PLAIN, MTLS], warm=_WARM, seconds=_SECONDS)
                parts += ["\n## A storm of connections\n", _STORM, table, *(f"- **wrong**: {line}" for line in wrong)]
            parts += ["\n## Endpoints of a service, choosing one\n", mesh.endpoints()]
            parts += [
                "\n## A change of all services, and a scrape when every endpoint is known\n",
                _SERVICES,
                mesh.services(),
            ]
    text = "\n".join(parts)
    click.echo(text)
    if write:
        GROWTH.write_text(text)
    if wrong:
        context.exit(1)


if __name__ == "__main__":
    main(prog_name="scripts/bench --growth")
