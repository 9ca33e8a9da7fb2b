"""`meshnet bug-report`: all that a person needs who is to find out what is wrong here, in one file to look through."""

import io
import json
import os
import platform
import re
import socket
import ssl
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from meshnet import __version__
from meshnet.errors import CommandError, ConfigError
from meshnet.model.admin import (
    ConnectionList,
    EndpointList,
    FamilyList,
    GetMetrics,
    GetStatus,
    ListConnections,
    ListEndpoints,
    ListLogLevels,
    LogLevelList,
    Question,
    Status,
)
from meshnet_cli.client import EXIT_FAILED, admin_options, ask
from meshnet_cli.configuration import config_option, read_settings
from meshnet_cli.output import printable
from meshnet_cli.redact import Redactor, without_keys

T = TypeVar("T", bound=msgspec.Struct)

_LOG_BYTES = 1_000_000  # the last ones
_LOG_LINES = 5_000  # of the journal
_PATIENCE = 20.0  # seconds for another program
_SYSCTLS = (
    "kernel/osrelease",
    "net/core/somaxconn",
    "net/ipv4/ip_forward",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/ip_local_reserved_ports",
    "net/ipv4/ip_nonlocal_bind",
    "net/ipv4/tcp_fin_timeout",
    "net/ipv4/tcp_keepalive_intvl",
    "net/ipv4/tcp_keepalive_probes",
    "net/ipv4/tcp_keepalive_time",
    "net/ipv4/tcp_max_syn_backlog",
    "net/ipv4/tcp_rmem",
    "net/ipv4/tcp_syncookies",
    "net/ipv4/tcp_tw_reuse",
    "net/ipv4/tcp_wmem",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv6/conf/all/disable_ipv6",
    "net/netfilter/nf_conntrack_count",
    "net/netfilter/nf_conntrack_max",
    "net/netfilter/nf_conntrack_tcp_be_liberal",
    "net/netfilter/nf_conntrack_tcp_loose",
    "net/netfilter/nf_conntrack_tcp_timeout_close_wait",
    "net/netfilter/nf_conntrack_tcp_timeout_established",
    "fs/file-nr",
)


class Piece(msgspec.Struct, frozen=True):
    """A file of the report: what JSON is made of, or a text. `missing`: why there is none."""

    name: str
    content: Any = None
    missing: str = ""


@click.command(
    "bug-report",
    short_help="One file with all that is needed to look into a fault.",
    epilog="\b\nExamples:\n  sudo meshnet bug-report\n  sudo meshnet bug-report --redact -o report.tar.gz\n"
    "  tar xzOf report.tar.gz meshnet-bug-report/status.json | jq .",
)
@click.option("-o", "--output", metavar="FILE.tar.gz", help="Where to; without it named by the time, in this folder.")
@click.option("--redact", is_flag=True, help="Addresses, names and identities by pseudonyms, the same throughout.")
@config_option
@admin_options
def command(*, output: str | None, redact: bool, config: str | None, socket_path: str, timeout: float) -> None:
    """Write one file with status, connections, endpoints, metrics, log levels, settings, findings of `check`, rules,
    the last log lines, versions, and what of the kernel matters.

    Keys are never in it. What could not be had is told, in the file too; as root nothing is missing. Look through it
    before you give it away.
    """
    pieces = list(_pieces(config, socket_path, timeout))
    if redact:
        pieces = redacted(pieces, [socket.gethostname()])
    path = Path(output or f"meshnet-bug-report-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    try:
        _write(path, pieces, redact=redact)
    except OSError as error:
        raise CommandError(
            f"cannot write {path}", why=error.strerror or str(error), fix="name another file: -o FILE", code=EXIT_FAILED
        ) from error
    for piece in pieces:
        click.echo(printable(f"{piece.name:<18} {piece.missing and 'missing: '}{piece.missing}").rstrip())
    click.echo(f"\n{path}: {path.stat().st_size:,} bytes, {'redacted' if redact else 'with names and addresses'}")


def redacted(pieces: list[Piece], hosts: list[str]) -> list[Piece]:
    """With pseudonyms that all of them share."""
    redactor = Redactor(hosts)
    for piece in pieces:
        redactor.learn(piece.content)
    return [
        msgspec.structs.replace(
            piece,
            content=redactor.value(piece.content)
            if not isinstance(piece.content, str)
            else redactor.text(piece.content),
            missing=redactor.text(piece.missing),
        )
        for piece in pieces
    ]


def _pieces(config: str | None, socket_path: str, timeout: float) -> Iterator[Piece]:
    def asked(question: Question, answer: type[T]) -> Callable[[], T]:
        return lambda: ask(socket_path, question, answer, timeout=timeout)

    yield _piece("status.json", asked(GetStatus(), Status))
    yield _piece("connections.json", asked(ListConnections(all=True), ConnectionList))
    yield _piece("endpoints.json", asked(ListEndpoints(), EndpointList))
    yield _piece("metrics.json", asked(GetMetrics(), FamilyList))
    yield _piece("log-levels.json", asked(ListLogLevels(), LogLevelList))
    yield _piece("settings.json", lambda: _settings(config))
    yield _piece("check.json", lambda: _findings(config))
    yield _piece("rules.json", lambda: _rules(config))
    yield _piece("log.txt", lambda: _log(config))
    yield _piece("versions.json", _versions)
    yield _piece("kernel.json", _kernel)


def _piece(name: str, look: Callable[[], Any]) -> Piece:
    try:
        return Piece(name, msgspec.to_builtins(look()))
    except CommandError as error:
        return Piece(name, missing=": ".join(filter(None, (error.what, error.why))))
    except ConfigError as error:
        return Piece(name, missing=str(error))
    except Exception as error:  # one part that cannot be had must not cost all others
        return Piece(name, missing=f"{type(error).__name__}: {error}")


def _settings(config: str | None) -> Any:
    from meshnet_cli.get import setting_list

    return setting_list(config)


def _findings(config: str | None) -> Any:
    from meshnet_cli.check import findings

    return list(findings(read_settings(config), config))


def _rules(config: str | None) -> Any:
    from meshnet_cli.rules import installed_view

    return installed_view(config)


def _log(config: str | None) -> str:
    """Of the file that the supervisor keeps, or of systemd's journal. Raises CommandError."""
    from meshnet_cli.supervise import log_file
    from meshnet_cli.vm import systemd
    from meshnet_cli.vm.units import SIDECAR

    file = log_file(read_settings(config))
    try:
        with file.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
            return log.read().decode(errors="replace")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CommandError(f"cannot read {file}", why=error.strerror or str(error)) from error
    if not systemd.is_installed():
        raise CommandError(f"there is no {file}", why="the sidecar's standard error is with whoever started it")
    words = ("journalctl", "-q", "--no-pager", "-o", "short-iso", "-n", str(_LOG_LINES), "-u", SIDECAR)
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CommandError("the journal cannot be read", why=str(error)) from error
    if done.returncode:
        raise CommandError("the journal cannot be read", why=done.stderr.strip())
    return done.stdout[-_LOG_BYTES:]


def _versions() -> dict[str, Any]:
    try:
        needed = metadata.requires("meshnet-l4") or ()
    except metadata.PackageNotFoundError:  # it runs from a folder
        needed = ()
    names = [re.split(r"[^A-Za-z0-9_.-]", line)[0] for line in needed if "extra ==" not in line]
    return {
        "meshnet": __version__,
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "os": _os_release(),
        "libraries": {name: metadata.version(name) for name in names},
    }


def _os_release() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""


def _kernel() -> dict[str, Any]:
    uname = os.uname()
    sysctls = {}
    for name in _SYSCTLS:
        try:
            sysctls[name.replace("/", ".")] = Path("/proc/sys", name).read_text().strip()
        except OSError as error:
            sysctls[name.replace("/", ".")] = f"({error.strerror})"
    return {
        "release": uname.release,
        "build": uname.version,
        "machine": uname.machine,
        "processors": os.cpu_count(),
        "sysctls": sysctls,
    }


def _write(path: Path, pieces: list[Piece], *, redact: bool) -> None:
    """For nobody but its owner. Raises OSError; then there is no file, or the one that was there."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    contents = {piece.name: piece.missing and f"missing: {piece.missing}" for piece in pieces}
    about = Piece("contents.json", {"meshnet": __version__, "redacted": redact, "files": contents})
    try:
        with (
            os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file,
            tarfile.open(fileobj=file, mode="w:gz") as archive,
        ):
            for piece in (about, *pieces):
                if not piece.missing:
                    _add(archive, piece)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _add(archive: tarfile.TarFile, piece: Piece) -> None:
    text = piece.content if isinstance(piece.content, str) else json.dumps(piece.content, indent=1)
    data = without_keys(text).encode()
    entry = tarfile.TarInfo(f"meshnet-bug-report/{piece.name}")
    entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
    archive.addfile(entry, io.BytesIO(data))
