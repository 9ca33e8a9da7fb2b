"""`meshnet up`: brings this host into the mesh, in phases, or leaves it as it was."""

import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click

from meshnet.errors import CommandError
from meshnet.model.admin import Status
from meshnet.model.settings import Settings
from meshnet_cli import lock, preflight, supervise
from meshnet_cli.configuration import config_option, read_settings
from meshnet_cli.init import EXIT_ROLLED_BACK, print_plan
from meshnet_cli.main import EXIT_CONFIG
from meshnet_cli.output import warn
from meshnet_cli.rules import unproved

if TYPE_CHECKING:
    from meshnet.model.snapshot import Snapshot

_READY_TIMEOUT = 20.0
_DEATHS = 3  # after so many of the sidecar's it is not waited for any longer,
_FOR_GOOD = frozenset({EXIT_CONFIG, 126, 127})  # after one of these at once: nothing changes by itself
_ROLLBACK_DRAIN = 5.0  # seconds that what was captured meanwhile gets to end

Undo = Callable[[], object]


class Say(Protocol):
    def __call__(self, text: str, mark: str = "✓") -> None: ...


@click.command(
    "up",
    short_help="Bring this host into the mesh.",
    epilog="\b\nExamples:\n  sudo meshnet up\n  sudo meshnet up --dry-run",
)
@config_option
@click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")
@click.option("--trust-domain", default="local", show_default=True, help="For the authority made when there is none.")
def command(config: str | None, dry_run: bool, trust_domain: str) -> None:
    """Bring this host into the mesh: check it, start the sidecar, put in the rules, and prove that they work.

    Connections that are open stay open, SSH is left alone (capture.exclude_inbound_ports), and a failed proof puts
    everything back. A second run changes nothing. Undo it with `meshnet down`.
    """
    settings = read_settings(config)
    config = config and str(Path(config).resolve())
    with _phase("preflight") as say:
        preflight.need_right("up")
        status = supervise.running(settings)
        # It dies again and again, or waits for meshnet.toml to be mended.
        kept = status is None and supervise.is_supervised(settings)
        backend = preflight.check(settings, running=kept or status is not None)
        if status is not None:
            preflight.need_fit(settings, status)  # it may have been started with others
        snapshot = _mesh(settings)
        there = "a sidecar runs already" if status else "a sidecar is to come up again" if kept else ""
        say(f"rules by {backend}, {there or 'ports and group are free'}")
    if status is not None and lock.is_orphaned(Path(settings.admin.socket).parent):
        warn(f"nobody looks after the sidecar (pid {status.pid}): {lock.ORPHANED}")
    with _phase("discover") as say:
        say(" · ".join(_discovered(settings)) or "nobody listens here yet")
    if dry_run:
        print_plan(settings)
        return
    undo: list[Undo] = []
    try:
        if status is None:
            _prepare(settings, trust_domain, snapshot)
            with _phase("proxy") as say:
                output = supervise.Output(settings)
                if kept:
                    supervise.try_again(settings)
                else:
                    supervise.start(settings, config)
                    undo.append(lambda: supervise.stop(settings, drain=0.0))
                status = _wait_until_ready(settings, output, deaths=1 if kept else _DEATHS)
                preflight.need_fit(settings, status)
                say(f"ready (pid {status.pid}), {status.certificate.identity or 'no identity'}")
        _capture(settings, status, undo)
    except (CommandError, KeyboardInterrupt) as error:
        for step in reversed(undo):
            step()
        if undo and isinstance(error, CommandError):
            click.echo("✗ put back: the host is as it was before", err=True)
            raise CommandError(error.what, why=error.why, fix=error.fix, code=EXIT_ROLLED_BACK) from error
        raise
    click.echo(f"{status.node} is in the mesh.   See: meshnet conns   Undo: sudo meshnet down")


def _mesh(settings: Settings) -> "Snapshot | None":
    """What the mesh directory says, if there is one. Raises ConfigError, before anything is started."""
    from meshnet.proxy.directory import load_directory

    return load_directory(settings.mesh.directory) if Path(settings.mesh.directory).is_dir() else None


def _prepare(settings: Settings, trust_domain: str, snapshot: "Snapshot | None") -> None:
    """The sidecar's identity and its mesh directory, made where there are none."""
    with _phase("identity") as say:
        say(_identity(settings, trust_domain, snapshot))
    try:
        Path(settings.mesh.directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(
            f"cannot make {settings.mesh.directory}, where the mesh resources are to be",
            why=str(error.strerror),
            fix="make it yourself, or name another: mesh.directory in meshnet.toml",
        ) from error


def _identity(settings: Settings, domain: str, snapshot: "Snapshot | None") -> str:
    certificate = Path(settings.identity.certificate)
    if certificate.exists():
        preflight.need_valid(settings.identity)
        return f"{certificate} as it is"
    from meshnet.control import authority
    from meshnet.model.identity import spiffe_id, trust_domain

    home = preflight.authority_home(certificate)
    services = snapshot.services if snapshot else ()
    named = {trust_domain(endpoint.identity) for service in services for endpoint in service.endpoints} - {"", domain}
    if named and not (home / authority.CA_CERTIFICATE).exists():
        raise CommandError(
            "this host has no certificate yet",
            why=f"a new authority of its own would be a stranger to trust domain {', '.join(sorted(named))}",
            fix=f"where that is: meshnet ca issue --service NAME --out DIR; copy DIR/* to {certificate.parent}/",
        )
    now = datetime.now(UTC)
    try:
        if (home / authority.CA_CERTIFICATE).exists():
            root, whose = authority.load_authority(home), "the"
        else:
            root, whose = authority.Authority.create(domain, now=now), "a new"
            authority.save_authority(root, home)
        identity = spiffe_id(root.trust_domain, "default", socket.gethostname().partition(".")[0].lower())
        issued = root.issue(identity, now=now)
        authority.save_issued(issued, certificate.parent)
    except (OSError, ValueError) as error:
        raise CommandError(
            "could not make this host an identity", why=str(error), fix="meshnet ca issue --help"
        ) from error
    return f"{identity} by {whose} authority in {home}"


def _capture(settings: Settings, status: Status, undo: list[Undo]) -> None:
    from meshnet_init.apply import apply, installed_rules
    from meshnet_init.rollback import put_back
    from meshnet_init.verify import verify

    with _phase("rules") as say:
        before = installed_rules()
        applied = apply(settings)
        if applied.changed:
            cut = (lambda: supervise.cut(settings)) if undo else (lambda: None)  # only a sidecar that we started
            undo.append(lambda: put_back(before, _ROLLBACK_DRAIN, cut))
        say(f"{applied.rules} rules by {applied.backend}, {'put in' if applied.changed else 'nothing changed'}")
    with _phase("verify") as say:
        result = verify(settings, status)
        found = [f"{it.direction} {it.family}: {it.status}" for it in (*result.canaries, *result.inbound)]
        if not result.ok:
            why = "; ".join([*result.differences, *result.misfits, *found])
            raise CommandError("the rules do not do what they should", why=why, fix=result.fix)
        if why_not := unproved(result):
            say(why_not, mark="!")
        else:
            say(", ".join(found))


def _discovered(settings: Settings) -> Iterator[str]:
    for listener in preflight.listeners(settings):
        yield f"{listener.port} {listener.why_not or 'captured'}"


def _wait_until_ready(settings: Settings, output: supervise.Output, deaths: int) -> Status:
    """Raises CommandError with the sidecar's last words when it does not come up."""
    deadline = time.monotonic() + _READY_TIMEOUT
    while True:
        status = _status(settings)
        if status is not None and status.ready:
            return status
        codes = output.exit_codes()
        if status is None and (len(codes) >= deaths or _FOR_GOOD.intersection(codes)):
            raise _never_ready(f"the sidecar does not stay up: it ended with exit code {codes[-1]}", settings, output)
        if not supervise.is_supervised(settings):
            raise _never_ready("the sidecar ended", settings, output)
        if time.monotonic() > deadline:
            if status is None:
                raise _never_ready(f"the sidecar did not answer within {_READY_TIMEOUT:g} s", settings, output)
            raise CommandError(
                "the sidecar did not become ready",
                why="; ".join(status.not_ready_because),
                fix=f"meshnet status, less {supervise.log_file(settings)}",
            )
        time.sleep(0.05)  # noqa: TID251 - another process's readiness is polled; nothing tells us


def _never_ready(what: str, settings: Settings, output: supervise.Output) -> CommandError:
    """With the sidecar's own `error:`, `why:` and `fix:`, or the end of whatever else it said."""
    said = output.last_words()
    fixes = [line.removeprefix("fix: ") for line in said if line.startswith("fix: ")]
    because = [re.sub("^(error|why): +", "", line).strip() for line in said if not line.startswith("fix: ")]
    log = f"less {supervise.log_file(settings)}"
    return CommandError(what, why="; ".join(because) or "it said nothing", fix="; or ".join([*fixes, log]))


def _status(settings: Settings) -> Status | None:
    """One that is not yet in a state to answer is asked again."""
    try:
        return supervise.running(settings)
    except CommandError:
        return None


@contextmanager
def _phase(name: str) -> Iterator[Say]:
    """One line a phase: what came out, and how long it took."""
    started = time.monotonic()
    said, sign = "", "✓"

    def say(text: str, mark: str = "✓") -> None:
        nonlocal said, sign
        said, sign = text, mark

    try:
        yield say
    except CommandError:
        click.echo(f"✗ {name:<10} {time.monotonic() - started:5.1f}s", err=True)
        raise
    click.echo(f"{sign} {name:<10} {time.monotonic() - started:5.1f}s  {said}")
