"""`meshnet check`: whether this host can be in the mesh, looked at from all sides and changed in none."""

from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path

import click
import msgspec

from meshnet.errors import CommandError, ConfigError
from meshnet.model.admin import Status
from meshnet.model.settings import Settings
from meshnet_cli import preflight, supervise
from meshnet_cli.client import EXIT_FAILED
from meshnet_cli.configuration import config_option, read_settings
from meshnet_cli.finding import Finding, unseen
from meshnet_cli.output import output_options, print_as, printable
from meshnet_cli.vm import host, ssh, systemd

EXIT_WARNED = 3

_SOON = 0.25  # of a certificate's life: it should have been renewed at half of it
_MOST_SHOWN = 3  # differences
_MARKS = {"ok": "✓", "warning": "!", "error": "✗"}


class Findings(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    ok: bool
    items: tuple[Finding, ...]
    api_version: str = "meshnet.dev/v1"
    kind: str = "Findings"


@click.command(
    "check",
    short_help="Whether this host can be in the mesh.",
    epilog="\b\nExamples:\n  sudo meshnet check\n"
    "  sudo meshnet check -o json | jq '.items[] | select(.level != \"ok\")'\n"
    "  sudo meshnet check --fail-on warning",
)
@config_option
@output_options
@click.option(
    "--fail-on",
    type=click.Choice(("error", "warning")),
    default="error",
    show_default=True,
    help="From what on the exit code is not 0.",
)
def command(config: str | None, output: str, fail_on: str) -> None:
    """Look at everything that `meshnet up` needs, and at what will hurt later. Changes nothing.

    Exit code 0 if all is well, 1 with an error, 3 with a warning and --fail-on warning.
    """
    items = tuple(findings(read_settings(config), config))
    levels = {item.level for item in items}
    result = Findings(ok="error" not in levels, items=items)

    def table() -> None:
        for item in items:
            click.echo(f"{_MARKS[item.level]} {item.code:<20} {printable(item.what)}")
            for label, text in (("why", item.why), ("fix", item.fix)):
                if text:
                    click.echo(f"  {'':<20} {label}: {printable(text)}")

    print_as(output, result, items, name=lambda item: item.code, table=table)
    if "error" in levels:
        click.get_current_context().exit(EXIT_FAILED)
    if fail_on == "warning" and "warning" in levels:
        click.get_current_context().exit(EXIT_WARNED)


def findings(settings: Settings, config: str | None) -> Iterator[Finding]:
    """One for each thing looked at; more where several are wrong. The settings themselves are well-formed."""
    status, asked = None, True
    try:
        status = supervise.running(settings)
    except CommandError:
        asked = False  # said below, by whoever holds its ports
    yield _needed("rights.net_admin", "may change the kernel's rules", preflight.need_right)
    yield host.kernel()
    yield _needed("rules.backend", "", lambda: _backend(settings))
    yield host.guard(settings)
    if asked:
        yield _in_force(settings, status)
    yield host.saved_rules()
    yield host.foreign_rules()
    if status is None:
        yield _needed("ports.free", "the sidecar's ports are free", lambda: preflight.need_free_ports(settings))
        yield _needed(
            "group.free", f"nobody runs with group {settings.capture.gid}", lambda: preflight.need_free_group(settings)
        )
    else:
        yield Finding(code="sidecar.running", level="ok", what=f"a sidecar runs (pid {status.pid})")
        yield _needed("sidecar.settings", "it fits these settings", partial(preflight.need_fit, settings, status))
    yield _truthful(settings, status)
    yield _readiness(settings, status)
    yield _needed(
        "ssh.reachable", "SSH does not depend on the sidecar", lambda: ssh.need_safe(settings, (), "meshnet up")
    )
    yield _service(settings, config, status)
    yield _identity(settings)
    yield _expiry(status)
    yield _needed("mesh.files", "", lambda: _mesh(settings))
    yield _relay(settings)
    yield host.clock()
    yield host.conntrack()
    yield host.descriptors()
    yield host.disk(settings)


def _needed(code: str, fine: str, look: Callable[[], str | None]) -> Finding:
    """An error if `look` raises one; else what it says, or `fine`."""
    try:
        return Finding(code=code, level="ok", what=look() or fine)
    except CommandError as error:
        return Finding(code=code, level="error", what=error.what, why=error.why, fix=error.fix)
    except ConfigError as error:
        where = f"{error.file}:{error.line}" if error.line else error.file
        return Finding(code=code, level="error", what=error.problem, why=where, fix=error.suggestion)


def _backend(settings: Settings) -> str:
    from meshnet_init.choose import choose_for
    from meshnet_init.host import host_facts
    from meshnet_init.plan import make_plan

    plan = make_plan(settings, host_facts())
    choice = choose_for(settings, plan)
    return "; ".join([f"the kernel takes them by {choice.backend.name}: {len(plan.rules)} rules", *choice.notes])


def _truthful(settings: Settings, status: Status | None) -> Finding:
    """Whether the sidecar that runs holds connect(); that the kernel can is said with the rules' backend."""
    code = "connect.truthful"
    if not settings.capture.truthful_connect:
        return Finding(code=code, level="ok", what="capture.truthful_connect is off")
    if status is None:
        return Finding(code=code, level="ok", what="no sidecar runs that could hold connect()")
    truthful = status.truthful
    if truthful is not None and truthful.in_force:
        return Finding(code=code, level="ok", what=f"connect() is held: {truthful.held} times until now")
    return Finding(
        code=code,
        level="warning",
        what="capture.truthful_connect is not in force",
        why="the sidecar was started without it" if truthful is None else truthful.problem or "it has just begun",
        fix="give the sidecar the capability NET_ADMIN, and start it again: sudo meshnet down && sudo meshnet up",
    )


def _readiness(settings: Settings, status: Status | None) -> Finding:
    """Whether the port is nobody's, and somebody still comes in through the rules who did so before."""
    code = "capture.readiness"
    if not settings.capture.readiness_port:
        return Finding(code=code, level="ok", what="capture.readiness_port is off")
    free = _needed(code, "", lambda: preflight.need_free_readiness_port(settings, running=status is not None))
    if free.level != "ok":
        return free
    if settings.capture.proof_interval == "off":
        what = "when readiness was last asked for is not kept: capture.proof_interval is off"
        return Finding(code=code, level="ok", what=what)
    visits = status.capture.visits if status is not None and status.capture is not None else ()
    late = [it for it in visits if it.late]
    if not late:
        when = ", ".join(f"{it.family} {it.last}" for it in visits)
        return Finding(code=code, level="ok", what=f"readiness was last asked for through the rules: {when or 'never'}")
    return Finding(
        code=code,
        level="warning",
        what=f"nobody asks for readiness through the rules any more: {', '.join(it.family for it in late)}",
        why=", ".join(f"last at {it.last}, before that every {it.every_seconds:.0f} s" for it in late),
        fix="sudo meshnet rules verify; if the rules are in force, look after who asked",
    )


def _in_force(settings: Settings, sidecar: Status | None) -> Finding:
    """What the kernel holds of ours by now, wherever it came from, for the sidecar that runs or for nobody."""
    from meshnet_init.apply import drift, in_kernel
    from meshnet_init.host import host_facts
    from meshnet_init.plan import make_plan

    code = "rules.in_force"
    try:
        found = in_kernel()
        plan = make_plan(settings, host_facts())
    except CommandError as error:
        return unseen(code, error.what, error.why)
    except ConfigError as error:
        return Finding(code=code, level="warning", what="no rules can be planned", why=error.problem)
    captures = [backend.name for backend, installed in found if not installed.draining()]
    if sidecar is None:
        if not captures:
            return Finding(code=code, level="ok", what="nothing is captured, and no sidecar runs")
        return Finding(
            code=code,
            level="error",
            what=f"rules are in force ({', '.join(captures)}), and no sidecar runs",
            why="what they capture is refused, in and out",
            fix="sudo meshnet up; or take them out: sudo meshnet init remove",
        )
    lines = drift(plan, found[0][0], found) if captures else ["nothing new is captured"]
    if not lines:
        return Finding(code=code, level="ok", what=f"they are in force as planned ({captures[0]})")
    return Finding(
        code=code,
        level="error",
        what="a sidecar runs, and the rules in force are not those of these settings",
        why="; ".join(
            [*lines[:_MOST_SHOWN], *([f"and {more} more"] if (more := len(lines) - _MOST_SHOWN) > 0 else [])]
        ),
        fix="sudo meshnet up",
    )


def _identity(settings: Settings) -> Finding:
    try:
        found = Path(settings.identity.certificate).exists()
    except OSError as error:
        what = f"{settings.identity.certificate} cannot be looked at"
        return unseen("identity.valid", what, error.strerror or str(error))
    if not found:
        return Finding(
            code="identity.valid",
            level="warning",
            what="this host has no certificate yet",
            why="without one no meshed endpoint is spoken to",
            fix="sudo meshnet up makes one by an authority of its own; or copy one that was issued: meshnet ca --help",
        )
    return _needed("identity.valid", "its certificate is valid", lambda: preflight.need_valid(settings.identity))


def _mesh(settings: Settings) -> str:
    from meshnet.proxy.directory import load_directory

    directory = Path(settings.mesh.directory)
    if not directory.is_dir():
        return f"no {directory} yet: nothing is meshed"
    snapshot = load_directory(settings.mesh.directory)
    return f"{len(snapshot.services)} ports of services in {directory}"


def _relay(settings: Settings) -> Finding:
    from meshnet.relay.native import MISSING

    if MISSING is None:
        return Finding(code="relay.native", level="ok", what="the native relay is here")
    return Finding(
        code="relay.native",
        level="error" if settings.proxy.relay == "native" else "warning",
        what="the native relay is not here",
        why=f"{MISSING.why}; the Python relay takes several times the processor",
        fix=MISSING.fix,
    )


def _service(settings: Settings, config: str | None, status: Status | None) -> Finding:
    code = "service.units"
    if not systemd.is_here():
        return Finding(
            code=code, level="ok", what="no systemd runs this host: meshnet up looks after the sidecar itself"
        )
    if not systemd.is_installed():
        return Finding(code=code, level="ok", what="not installed yet")
    service = systemd.Service(settings, config and str(Path(config).resolve()))
    if differing := service.differing_units():
        return Finding(
            code=code,
            level="warning",
            what=f"{', '.join(differing)} is not as these settings, or this version, want it",
            why="settings were changed, or meshnet was upgraded, since it was written",
            fix="sudo meshnet up && sudo systemctl restart meshnet",
        )
    if status is not None and not service.is_enabled():
        return Finding(
            code=code,
            level="warning",
            what="it is up, but will not be after a reboot",
            why="its units are not enabled",
            fix="sudo meshnet up",
        )
    return Finding(code=code, level="ok", what="the units are as these settings want them")


def _expiry(status: Status | None) -> Finding:
    """Of the certificate that the sidecar holds, for what is on disk is another matter."""
    code = "identity.expiry"
    if status is None or not status.certificate.not_after:
        return Finding(code=code, level="ok", what="no sidecar holds a certificate")
    held = status.certificate
    first, last = (datetime.fromisoformat(text) for text in (held.not_before, held.not_after))
    life = (last - first).total_seconds()
    if held.begins_in_seconds:
        return Finding(
            code=code,
            level="error",
            what=f"the sidecar's certificate begins at {held.not_before}",
            why="by this host's clock that is still to come; until then no meshed endpoint is spoken to",
            fix="timedatectl shows the clock, and what sets it",
        )
    if held.expires_in_seconds > _SOON * life:
        return Finding(code=code, level="ok", what=f"the sidecar's certificate ends at {held.not_after}")
    return Finding(
        code=code,
        level="warning" if held.expires_in_seconds > 0 else "error",
        what=f"the sidecar's certificate ends at {held.not_after}" if held.expires_in_seconds > 0 else "it has expired",
        why="nothing has renewed it; without one no meshed endpoint is spoken to",
        fix=f"where the authority is: meshnet ca issue --identity {held.identity} --out DIR; copy DIR/* here",
    )
