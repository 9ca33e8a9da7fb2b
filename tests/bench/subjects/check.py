"""What a subject with mTLS must do before it is measured: serve who belongs to the mesh, and nobody else."""

import ssl
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from meshnet.control.authority import Authority
from meshnet_cli.demo.world import Host
from tests.bench.subjects.hops import BOTH, DOMAIN, issue

_PATIENCE = 5.0
_GOOD = "a good certificate"  # without it the refusals would show nothing


class CheckFailed(Exception):
    """A subject does not do what it is to be measured at."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What is said once connected, and the answer that only a served client gets."""

    hello: bytes
    answer: bytes
    alpn: str = ""


def check_refusals(web: Host, address: tuple[str, int], good: Path, probe: Probe) -> None:
    """`good` holds the certificate of the client's sidecar. Raises CheckFailed."""
    with tempfile.TemporaryDirectory(prefix="meshnet-bench-rogue-") as rogue:
        issue(Authority.create(DOMAIN, now=datetime.now(UTC)), web.name, Path(rogue))
        clients = {
            "plain text": None,
            "a client without a certificate": _context(probe, None),
            "a certificate of another authority": _context(probe, Path(rogue)),
            _GOOD: _context(probe, good),
        }
        for name, context in clients.items():
            try:
                served = _served(web, address, probe, context)
            except TimeoutError as error:
                raise CheckFailed(f"{name} got neither an answer nor an end in {_PATIENCE:g} s") from error
            if served != (name == _GOOD):
                raise CheckFailed(f"{name} was {'served' if served else 'refused'}")


def _context(probe: Probe, identity: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if probe.alpn:
        context.set_alpn_protocols([probe.alpn])
    if identity:
        context.load_cert_chain(identity / BOTH)
    return context


def _served(web: Host, address: tuple[str, int], probe: Probe, context: ssl.SSLContext | None) -> bool:
    """Raises TimeoutError when there is neither an answer nor an end."""
    said = b""
    try:
        with (
            web.connect(*address, timeout=_PATIENCE) as plain,
            context.wrap_socket(plain) if context else plain as client,
        ):
            client.sendall(probe.hello)
            while len(said) < len(probe.answer) and (more := client.recv(len(probe.answer) - len(said))):
                said += more
    except TimeoutError:
        raise  # an OSError too, but no refusal
    except OSError:
        return False
    return said == probe.answer
