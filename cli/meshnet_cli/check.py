"""`meshnet check`: whether this host can be in the mesh, looked at from all sides and changed in none."""

import ctypes
import resource
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import click
import msgspec

from meshnet.errors import CommandError, ConfigError
from meshnet.model.settings import Settings
from meshnet_cli import preflight, supervise
from meshnet_cli.client import EXIT_FAILED
from meshnet_cli.configuration import config_option, read_settings
from meshnet_cli.output import output_options, print_as, printable

EXIT_WARNED = 3

_CONNTRACK = Path("/proc/sys/net/netfilter")
_FULL = 0.8  # of the connection tracking table: bursts still have to fit
_FEW_DESCRIPTORS = 65536  # a connection takes two or three
_TIME_ERROR = 5  # adjtimex(2)
_MARKS = {"ok": "✓", "warning": "!", "error": "✗"}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """`code` stays what it is from version to version."""

    code: str
    level: Literal["ok", "warning", "error"]
    what: str
    why: str = ""
    fix: str = ""


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
    items = tuple(findings(read_settings(config)))
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


def findings(settings: Settings) -> Iterator[Finding]:
    """One for each thing looked at; more where several are wrong. The settings themselves are well-formed."""
    status = None
    try:
        status = supervise.running(settings)
    except CommandError:
        pass  # said below, by whoever holds its ports
    yield _needed("rights.net_admin", "may change the kernel's rules", lambda: preflight.need_right("check"))
    yield _needed("rules.backend", "", lambda: _backend(settings))
    if status is None:
        yield _needed("ports.free", "the sidecar's ports are free", lambda: preflight.need_free_ports(settings))
        yield _needed(
            "group.free", f"nobody runs with group {settings.capture.gid}", lambda: preflight.need_free_group(settings)
        )
    else:
        yield Finding(code="sidecar.running", level="ok", what=f"a sidecar runs (pid {status.pid})")
        yield _needed("sidecar.settings", "it fits these settings", partial(preflight.need_fit, settings, status))
    yield _identity(settings)
    yield _needed("mesh.files", "", lambda: _mesh(settings))
    yield _relay(settings)
    yield _clock()
    yield _conntrack()
    yield _descriptors()


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
    from meshnet_init.apply import choose
    from meshnet_init.host import host_facts
    from meshnet_init.plan import make_plan

    plan = make_plan(settings, host_facts())
    return f"the kernel takes them by {choose(settings.capture.backend).name}: {len(plan.rules)} rules"


def _identity(settings: Settings) -> Finding:
    if not Path(settings.identity.certificate).exists():
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

    if not MISSING:
        return Finding(code="relay.native", level="ok", what="the native relay is built")
    return Finding(
        code="relay.native",
        level="error" if settings.proxy.relay == "native" else "warning",
        what="the native relay is not here",
        why=f"{MISSING}; the Python relay takes several times the processor",
        fix="install gcc and Python's headers, then meshnet again; and libssl.so.3",
    )


def _clock() -> Finding:
    # The kernel's own view, whoever sets the clock: struct timex is 208 bytes, and all zero it only asks.
    if ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(256)) != _TIME_ERROR:
        return Finding(code="clock.synchronised", level="ok", what="the clock is synchronised")
    return Finding(
        code="clock.synchronised",
        level="warning",
        what="nothing keeps this host's clock right",
        why="certificates are valid from a time to a time; an hour off, and peers refuse each other",
        fix="timedatectl set-ntp true, or install chrony",
    )


def _conntrack() -> Finding:
    code = "conntrack.room"
    try:
        count, most = (int((_CONNTRACK / f"nf_conntrack_{name}").read_text()) for name in ("count", "max"))
    except (FileNotFoundError, PermissionError):
        return Finding(code=code, level="ok", what="no connection is tracked yet")
    if count < _FULL * most:
        return Finding(code=code, level="ok", what=f"{count} of {most} connections are tracked")
    return Finding(
        code=code,
        level="warning",
        what=f"{count} of {most} connections are tracked: the table is nearly full",
        why="captured connections are tracked, and what does not fit is dropped without a word",
        fix=f"sysctl -w net.netfilter.nf_conntrack_max={2 * most}",
    )


def _descriptors() -> Finding:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = most == resource.RLIM_INFINITY or most >= _FEW_DESCRIPTORS
    return Finding(
        code="descriptors.limit",
        level="ok" if enough else "warning",
        what=f"a process may have {most} descriptors",
        why="" if enough else f"that is about {most // 2} connections",
        fix="" if enough else f"raise it: ulimit -Hn {_FEW_DESCRIPTORS}, or /etc/security/limits.conf",
    )
