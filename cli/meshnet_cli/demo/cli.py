"""`meshnet demo`: a small mesh in namespaces of its own, proofs that it works, and a look at it."""

import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click
import msgspec

from meshnet.errors import CommandError
from meshnet_cli import supervise
from meshnet_cli.demo import sandbox
from meshnet_cli.demo.proofs import PROOFS, Before, NotHeld
from meshnet_cli.demo.stage import API_ADDRESS, Call, Stage
from meshnet_cli.demo.world import ProgramFailed, World
from meshnet_cli.output import print_json

NEEDED = {"ip": "iproute2", "nft": "nftables", "setpriv": "util-linux"}
WIDTH = 26


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """`evidence` is what was seen, held or not."""

    name: str
    held: bool
    evidence: str
    seconds: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    held: bool
    seconds: float
    proofs: tuple[Proof, ...]
    logs: str = ""  # the directory, kept when a proof failed


@click.command(
    "demo",
    short_help="A small mesh on this machine, to look at and to break.",
    epilog="Example: meshnet demo --stay",
)
@click.option("--stay", is_flag=True, help="Keep the mesh up until Ctrl-C, and say what to type.")
@click.option("--json", "as_json", is_flag=True, help="Print the proofs as JSON when all is done.")
def command(stay: bool, as_json: bool) -> None:
    """A small mesh on this machine: five hosts made of network namespaces, real rules, real sidecars.

    It proves what meshnet promises, one line a proof. It needs no root, never touches this machine's own rules, and
    leaves nothing behind. Exit status 0 only if every proof held.
    """
    begun = time.monotonic()
    say = Teller(silent=as_json)
    _check_programs()
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)
        sandbox.enter_sandbox()
        with World() as world:
            proofs, seconds = [], 0.0
            for proof in _play(world, say, stay):
                proofs.append(proof)
                seconds = time.monotonic() - begun  # without the time that it stays
            held = len(proofs) == len(PROOFS) + 2 and all(proof.held for proof in proofs)
            world.keep = not held
    except Stopped as stopped:
        click.echo("Stopped before the end. Nothing is left of it.", err=True)
        raise click.exceptions.Exit(stopped.status) from None
    report = Report(
        held=held,
        seconds=round(seconds, 1),
        proofs=tuple(proofs),
        logs="" if held else str(world.directory),
    )
    if as_json:
        print_json(report)
    elif held:
        say(f"\nEvery proof held, in {report.seconds} s. Nothing is left of it.")
    else:
        say(f"\nNot every proof held. What every program printed: {report.logs}")
    raise click.exceptions.Exit(0 if held else 1)


class Stopped(BaseException):
    """Ctrl-C, or a polite `kill`: the world is taken down on the way out."""

    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status


def _stop(number: int, frame: FrameType | None) -> None:
    # Once is enough: a second Ctrl-C would interrupt the taking down.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(128 + number)


class Teller:
    """Says what happens while it happens; on a terminal also what is being tried. `silent`: stdout is not for it."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent
        self._live = not silent and sys.stdout.isatty()

    def __call__(self, text: str) -> None:
        if not self._silent:
            click.echo(text)

    def invite(self, text: str) -> None:
        """What a person must read to go on."""
        click.echo(text, err=self._silent)

    def trying(self, name: str) -> None:
        if self._live:
            click.echo(f"  {name} …", nl=False)

    def proof(self, proof: Proof) -> None:
        mark = click.style("✓", fg="green") if proof.held else click.style("✗", fg="red", bold=True)
        start = "\r\033[K" if self._live else ""
        first, *rest = proof.evidence.splitlines() or [""]
        self(f"{start}{mark} {proof.name:<{WIDTH}} {first}   {proof.seconds:.1f}s")
        if said := [line.strip(" |") for line in rest if any(map(str.isalpha, line))]:
            for line in said[-3:]:  # the end of what a program printed mostly says it
                self(f"{'':{WIDTH + 2}} {line}")


def _play(world: World, say: Teller, stay: bool) -> Iterator[Proof]:
    """Every proof that came to be tried, told as it comes."""
    built: list[tuple[Stage, Before]] = []

    def build() -> str:
        stage = Stage(world)
        built.append((stage, Before(stage)))
        return f"{', '.join(world.hosts)} on one switch, ordinary programs, connections open"

    def up() -> str:
        built[0][0].up()
        return f"a sidecar and redirect rules on each of {len(world.hosts)} hosts"

    for name, step in (("five hosts", build), ("mesh up", up)):
        proof = _tried(name, step, say)
        yield proof
        if not proof.held:
            return
    stage, before = built[0]
    for name, prove in PROOFS.items():
        yield _tried(name, lambda prove=prove: prove(stage, before), say)  # type: ignore[misc]  # the loop's value
    with _busy(stage):
        for host in (stage.web, stage.cron):
            say(f"\n{host.name}$ meshnet conns\n{stage.sidecar(host).meshnet('conns')}".rstrip())
        if stay:
            _stay(stage, say)


def _tried(name: str, step: Callable[[], str], say: Teller) -> Proof:
    say.trying(name)
    begun = time.monotonic()
    try:
        held, evidence = True, step()
    except (NotHeld, ProgramFailed, CommandError, OSError, TimeoutError) as error:
        held, evidence = False, str(error)
    except Stopped:
        say("")
        raise
    proof = Proof(name=name, held=held, evidence=evidence, seconds=round(time.monotonic() - begun, 2))
    say.proof(proof)
    return proof


@contextmanager
def _busy(stage: Stage) -> Iterator[None]:
    """Some connections to look at."""
    calls = [Call(stage.web, API_ADDRESS) for _ in range(3)]
    try:
        for call in calls:
            call.say("a line")
        yield
    finally:
        for call in calls:
            call.close()


def _stay(stage: Stage, say: Teller) -> None:
    """Wait for Ctrl-C, with a way into every host."""
    doors = stage.world.directory / "hosts"
    doors.mkdir()
    for host in stage.world.hosts.values():
        _write_door(doors / host.name, host.namespace, stage.sidecar(host).config)
    web = ("sudo " if "SUDO_USER" in os.environ else "") + shlex.quote(str(doors / "web"))
    say.invite(f"""The mesh stays up until Ctrl-C. From another terminal, a command on one of the hosts, here web:

    {web} {fetch(f"http://{API_ADDRESS}:8080/", sandbox.search_path())}
    {web} meshnet conns -f
    {web} meshnet endpoints
    {web} meshnet status
    {web} nft list ruleset
    {web}                        # a shell

Hosts: {", ".join(sorted(stage.world.hosts))} in {doors}
Resources: edit {stage.mesh.directory}/mesh.yaml, and the sidecars follow""")
    try:
        while True:
            time.sleep(0.2)  # noqa: TID251 - waits for a person
    except Stopped:
        say("")
    for sidecar in stage.mesh.sidecars.values():
        if supervise.is_supervised(sidecar.settings):  # somebody typed `meshnet up`: that one is not our child
            supervise.cut(sidecar.settings)


def fetch(url: str, path: str) -> str:
    """A shell's words to print what `url` gives, with the programs found in `path` (as in $PATH)."""
    if shutil.which("curl", path=path):
        return f"curl -s {url}"
    code = f'import urllib.request as r; print(r.urlopen("{url}").read().decode())'
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}"


def _write_door(path: Path, namespace: int, config: Path) -> None:
    """A script that runs its arguments, or a shell, on the host with that network namespace and meshnet.toml."""
    # By way of this process, which lives as long as the world: whatever runs on the host may be killed.
    pid = os.getpid()
    inside = f"--mount --net=/proc/{pid}/fd/{namespace}"
    if _own_user_namespace():
        inside = f"--user --preserve-credentials {inside}"
    path.write_text(
        f"""#!/bin/sh
unset MESHNET_SOCKET
export MESHNET_CONFIG={shlex.quote(str(config))}
export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH":/usr/sbin:/sbin
[ $# -gt 0 ] || set -- sh
exec nsenter --target {pid} {inside} --wd="$PWD" "$@"
"""
    )
    path.chmod(0o755)


def _own_user_namespace() -> bool:
    return Path("/proc/self/uid_map").read_text().split()[2] == "1"


def _check_programs() -> None:
    path = sandbox.search_path()
    missing = [package for program, package in NEEDED.items() if not shutil.which(program, path=path)]
    if missing:
        raise CommandError(
            f"the demo needs {' and '.join(missing)}",
            why="hosts are made with the system's own programs",
            fix=f"sudo apt-get install -y {' '.join(missing)}",
        )
