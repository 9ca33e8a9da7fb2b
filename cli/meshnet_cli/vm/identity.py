"""The identity of a host that has none: issued by the authority that is here, or by a new one of its own."""

import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.errors import CommandError
from meshnet.model.identity import is_trust_domain, spiffe_id, trust_domain
from meshnet.model.settings import Settings
from meshnet_cli import preflight
from meshnet_cli.vm.ledger import Ledger

if TYPE_CHECKING:
    from meshnet.model.snapshot import Snapshot


TRUST_DOMAIN = "local"


def need_trust_domain(settings: Settings, domain: str) -> None:
    """Raises CommandError for a name that is none, or is not that of the identity or the authority that are here."""
    if not is_trust_domain(domain):
        raise CommandError(
            f"{domain!r} is not a trust domain",
            why="it is of lower-case letters, digits, dots, dashes and underscores",
            fix="sudo meshnet up --trust-domain prod",
        )
    from meshnet.control import authority

    certificate = Path(settings.identity.certificate)
    home = preflight.authority_home(certificate)
    for file in (certificate, home / authority.CA_CERTIFICATE):
        try:
            names = authority.describe(file.read_bytes(), now=datetime.now(UTC))[0].names
        except (OSError, ValueError):
            continue  # whoever needs it says what is wrong with it
        found, slash, path = "".join(names[:1]).removeprefix("spiffe://").partition("/")
        if found == domain:
            return
        identity = f"spiffe://{domain}{slash}{path}" if path else spiffe_id(domain, "default", _name())
        if (home / authority.CA_CERTIFICATE).exists():
            fix = f"for a new authority, which no other host believes: meshnet ca init --trust-domain {domain} --force"
            fix += f" --dir {home} && meshnet ca issue --identity {identity} --dir {home} --out {certificate.parent}"
        else:
            fix = f"where the authority of {domain} is: meshnet ca issue --identity {identity} --out DIR;"
            fix += f" copy DIR/* to {certificate.parent}/"
        raise CommandError(
            f"this host is in trust domain {found}, not {domain}",
            why=f"so says {file}; --trust-domain names that of a new authority only",
            fix=f"to stay there: sudo meshnet up; {fix}",
        )


def make_identity(settings: Settings, domain: str, snapshot: "Snapshot | None", ledger: Ledger) -> str:
    """Says whose it is. Raises CommandError where a new authority would be a stranger to the mesh in `snapshot`."""
    certificate = Path(settings.identity.certificate)
    if certificate.exists():
        preflight.need_valid(settings.identity)
        return f"{certificate} as it is"
    from meshnet.control import authority

    home = preflight.authority_home(certificate)
    services = snapshot.services if snapshot else ()
    named = {trust_domain(endpoint.identity) for service in services for endpoint in service.given} - {"", domain}
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
            for name in (authority.CA_CERTIFICATE, authority.CA_KEY):
                ledger.note_file(home / name)
            authority.save_authority(root, home)
        identity = spiffe_id(root.trust_domain, "default", _name())
        issued = root.issue(identity, now=now)
        for name in authority.ISSUED:
            ledger.note_file(certificate.parent / name)
        authority.save_issued(issued, certificate.parent)
    except (OSError, ValueError) as error:
        raise CommandError(
            "could not make this host an identity", why=str(error), fix="meshnet ca issue --help; df -h"
        ) from error
    return f"{identity} by {whose} authority in {home}"


def _name() -> str:
    return socket.gethostname().partition(".")[0].lower()
