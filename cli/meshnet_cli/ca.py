"""`meshnet ca`: the certificate authority on this machine's disk."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshnet.errors import CommandError
from meshnet.model.identity import spiffe_id
from meshnet.model.settings import IdentitySection
from meshnet_cli.client import EXIT_PERMISSION
from meshnet_cli.output import DURATION, age, output_options, print_as, printable
from meshnet_cli.table import print_table

if TYPE_CHECKING:  # cryptography takes longer to import than all of the command line; each command does it itself
    from meshnet.control.authority import Authority, CertificateView

DIRECTORY = "/var/lib/meshnet/ca"

_PATH = click.Path(path_type=Path)
_directory = click.option(
    "--dir", "directory", type=_PATH, default=DIRECTORY, show_default=True, help="Where ca.pem and ca-key.pem are."
)


@click.group()
def command() -> None:
    """The certificate authority: create it, issue identities."""


@command.command(epilog="\b\nExample:\n  meshnet ca init --trust-domain prod")
@click.option("--trust-domain", required=True, metavar="NAME", help="The first part of every identity: spiffe://NAME/.")
@_directory
@click.option("--force", is_flag=True, help="Replace an authority; what it issued is then believed by nobody new.")
def init(*, trust_domain: str, directory: Path, force: bool) -> None:
    """Create an authority: a root certificate for ten years and its key."""
    from meshnet.control import authority

    try:
        root = authority.Authority.create(trust_domain, now=datetime.now(UTC))
    except ValueError as error:
        raise CommandError("no authority was created", why=str(error), fix="--trust-domain prod") from error
    with _files(f"cannot write to {directory}"):
        try:
            authority.save_authority(root, directory, replace=force)
        except FileExistsError as error:
            raise CommandError(
                "no authority was created",
                why=f"{directory} holds one already ({error})",
                fix=f"meshnet ca show {directory}, or --force to replace it: every certificate must then be reissued",
            ) from error
    click.echo(printable(f"authority for {trust_domain} in {directory}"))
    click.echo(printable(f"next: meshnet ca issue --service NAME --dir {directory} --out DIR"))


@command.command(
    epilog="\b\nExamples:\n  meshnet ca issue --service web --out ./web\n"
    "  meshnet ca issue --identity spiffe://prod/ns/shop/sa/db --ttl 1h --out ./db"
)
@click.option("--identity", metavar="SPIFFE_ID", help="The whole identity, spiffe://DOMAIN/PATH.")
@click.option("--service", metavar="NAME", help="Instead: the identity of a service account, by its name.")
@click.option("--namespace", default="default", show_default=True, help="With --service.")
@_directory
@click.option(
    "--out",
    type=_PATH,
    default=str(Path(IdentitySection().certificate).parent),
    show_default=True,
    help="Where cert.pem, key.pem and bundle.pem go; present ones are replaced.",
)
@click.option("--ttl", type=DURATION, default="24h", show_default=True, help="How long the certificate is valid.")
def issue(*, identity: str | None, service: str | None, namespace: str, directory: Path, out: Path, ttl: float) -> None:
    """Issue or renew the identity of a workload."""
    from meshnet.control import authority

    if (identity is None) == (service is None):
        raise click.UsageError("one of --identity and --service is needed")
    root = _load(directory)
    identity = identity if identity is not None else spiffe_id(root.trust_domain, namespace, service or "")
    try:
        issued = root.issue(identity, now=datetime.now(UTC), ttl=timedelta(seconds=ttl))
    except (ValueError, OverflowError) as error:
        raise CommandError(
            "no certificate was issued",
            why=str(error),
            fix=f"meshnet ca issue --identity {spiffe_id(root.trust_domain, 'default', 'web')} --ttl 24h",
        ) from error
    with _files(f"cannot write to {out}"):
        authority.save_issued(issued, out)
    click.echo(printable(f"{identity} in {out}, valid for {age(ttl)}"))


@command.command()
@click.argument("path", type=_PATH, metavar="FILE|DIR", default=DIRECTORY)
@output_options
def show(*, path: Path, output: str) -> None:
    """What certificates say: of a PEM file, or of every ca.pem, cert.pem and bundle.pem in a directory."""
    from meshnet.control import authority

    views = _read(path)

    def table() -> None:
        columns = ["FILE", "KIND", "IDENTITY", "EXPIRES", "SERIAL"]
        wide = ["NOT BEFORE", "NOT AFTER", "ISSUER", "SHA256"] if output == "wide" else []
        print_table([*columns, *wide], [_row(view)[: len(columns) + len(wide)] for view in views])

    print_as(output, authority.CertificateList(items=tuple(views)), views, name=_names, table=table)


def _row(view: "CertificateView") -> list[str]:
    left = view.expires_in_seconds
    return [
        view.file,
        "authority" if view.authority else "workload",
        _names(view),
        f"in {age(left)}" if left > 0 else f"EXPIRED {age(-left)} ago",
        view.serial[:16],
        view.not_before,
        view.not_after,
        view.issuer,
        view.sha256,
    ]


def _names(view: "CertificateView") -> str:
    return ",".join(view.names) or "-"


def _read(path: Path) -> "list[CertificateView]":
    from meshnet.control import authority

    names = (authority.CA_CERTIFICATE, authority.CERTIFICATE, authority.BUNDLE)
    with _files(f"cannot read {path}"):
        files = [path / name for name in names if (path / name).exists()] if path.is_dir() else [path]
        if not files:
            raise CommandError(
                f"no certificate in {path}",
                why=f"there is none of {', '.join(names)}",
                fix="meshnet ca show FILE, or make one: meshnet ca init --trust-domain NAME",
            )
        now = datetime.now(UTC)
        views: list[CertificateView] = []
        for file in files:
            try:
                views += authority.describe(file.read_bytes(), now=now, file=str(file))
            except ValueError as error:
                raise CommandError(
                    f"no certificate in {file}", why=_first_line(error), fix="meshnet ca show FILE, a PEM file"
                ) from error
    return views


def _load(directory: Path) -> "Authority":
    from meshnet.control import authority

    with _files(f"cannot read the authority in {directory}"):
        try:
            return authority.load_authority(directory)
        except FileNotFoundError as error:
            raise CommandError(
                f"no authority in {directory}",
                why=f"{error.filename} is not there",
                fix=f"meshnet ca init --trust-domain NAME --dir {directory}",
            ) from error
        except (ValueError, TypeError) as error:
            raise CommandError(
                f"the authority in {directory} is of no use",
                why=_first_line(error),
                fix=f"restore both files, or meshnet ca init --force --trust-domain NAME --dir {directory}",
            ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


@contextmanager
def _files(what: str) -> Iterator[None]:
    """Says in three lines what the file system refused."""
    try:
        yield
    except PermissionError as error:
        again = f"sudo {click.get_current_context().command_path} ..."
        raise CommandError(what, why=f"permission denied: {error.filename}", fix=again, code=EXIT_PERMISSION) from error
    except OSError as error:
        look = f"ls -ld {shlex.quote(str(error.filename))}" if error.filename else "df -h"
        why = f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
        raise CommandError(what, why=why, fix=look) from error
