"""Mutual TLS 1.3 with SPIFFE ids, on non-blocking sockets that a relay can take over afterwards."""

import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

import trio
from cryptography import x509

from meshnet.errors import ConnectionFailed, Reason
from meshnet.model.identity import is_spiffe_id

ALPN = "meshnet/1"

# X509_V_ERR_* of openssl/x509_vfy.h
_VERIFY_NOT_YET_VALID, _VERIFY_EXPIRED = 9, 10
# What the other side's alert may say about our certificate (RFC 8446, 6.2), as OpenSSL spells it.
_OUR_CERTIFICATE = frozenset(
    {
        "SSLV3_ALERT_BAD_CERTIFICATE",
        "SSLV3_ALERT_CERTIFICATE_EXPIRED",
        "SSLV3_ALERT_CERTIFICATE_REVOKED",
        "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
        "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
        "TLSV13_ALERT_CERTIFICATE_REQUIRED",
        "TLSV1_ALERT_UNKNOWN_CA",
    }
)


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who this sidecar is: its certificate, and whom it believes. Times are seconds since the epoch."""

    identity: str
    issuer: str
    serial: str
    not_before: float
    not_after: float
    client: ssl.SSLContext
    server: ssl.SSLContext


def load_credentials(certificate: str, key: str, bundle: str) -> Credentials:
    """Reads PEM files. Raises OSError, ssl.SSLError (also when key and certificate are no pair) or ValueError."""
    leaf = x509.load_pem_x509_certificate(Path(certificate).read_bytes())
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        identities = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        identities = []
    if len(identities) != 1 or not is_spiffe_id(identities[0]):
        raise ValueError(f"{certificate} must carry exactly one SPIFFE id, not {identities}")
    return Credentials(
        identity=identities[0],
        issuer=leaf.issuer.rfc4514_string(),
        serial=f"{leaf.serial_number:x}",
        not_before=leaf.not_valid_before_utc.timestamp(),
        not_after=leaf.not_valid_after_utc.timestamp(),
        client=_context(ssl.PROTOCOL_TLS_CLIENT, certificate, key, bundle),
        server=_context(ssl.PROTOCOL_TLS_SERVER, certificate, key, bundle),
    )


def _context(protocol: int, certificate: str, key: str, bundle: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # a SPIFFE id is checked instead, by `peer_identity`'s callers
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols([ALPN])
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(bundle)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 1  # one tunnel resumes one session; a second ticket would be work for nobody
    return context


def wrap(
    context: ssl.SSLContext, plain: socket.socket, *, server_side: bool = False, session: ssl.SSLSession | None = None
) -> ssl.SSLSocket:
    """Takes `plain` over, no handshake yet. Raises ConnectionFailed(tls.handshake) if the peer is gone already."""
    try:
        return context.wrap_socket(plain, server_side=server_side, do_handshake_on_connect=False, session=session)
    except OSError as error:
        plain.close()
        raise tls_failure(error) from error


async def handshake(sock: ssl.SSLSocket) -> None:
    """Completes the handshake and checks the ALPN. Raises ConnectionFailed(tls.*)."""
    try:
        while True:
            try:
                sock.do_handshake()
                break
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(sock)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(sock)
    except OSError as error:
        raise tls_failure(error) from error
    if sock.selected_alpn_protocol() != ALPN:
        raise ConnectionFailed(Reason.TLS_HANDSHAKE, f"the peer does not speak {ALPN}")


def peer_identity(sock: ssl.SSLSocket) -> tuple[str, float]:
    """The peer's SPIFFE id and when its certificate ends. Raises ConnectionFailed(tls.*).

    The time is looked at again here because a resumed session brings a certificate nobody verified just now.
    """
    certificate = sock.getpeercert() or {}
    identities = [str(name[1]) for name in certificate.get("subjectAltName", ()) if name[0] == "URI"]
    if len(identities) != 1 or not is_spiffe_id(identities[0]):
        raise ConnectionFailed(Reason.TLS_PEER_IDENTITY, f"the peer's certificate names {identities or 'nobody'}")
    not_after = float(ssl.cert_time_to_seconds(str(certificate["notAfter"])))
    if not_after < time.time():
        raise ConnectionFailed(Reason.TLS_EXPIRED, f"the certificate of {identities[0]} has expired")
    return identities[0], not_after


def tls_failure(error: OSError) -> ConnectionFailed:
    """What an error of the ssl module means to an operator."""
    if isinstance(error, ssl.SSLCertVerificationError):
        codes = {_VERIFY_EXPIRED: Reason.TLS_EXPIRED, _VERIFY_NOT_YET_VALID: Reason.TLS_NOT_YET_VALID}
        reason = codes.get(error.verify_code, Reason.TLS_PEER_IDENTITY)
        hint = "; are both clocks right?" if error.verify_code in codes else ""
        return ConnectionFailed(reason, f"the peer's certificate: {error.verify_message}{hint}")
    if isinstance(error, ssl.SSLEOFError | ConnectionResetError | BrokenPipeError):
        return ConnectionFailed(Reason.TLS_HANDSHAKE, "the peer hung up during the handshake")
    if isinstance(error, ssl.SSLError):
        if error.reason in _OUR_CERTIFICATE:
            return ConnectionFailed(Reason.TLS_NO_IDENTITY, f"the peer does not take our certificate: {error.reason}")
        return ConnectionFailed(Reason.TLS_HANDSHAKE, f"TLS: {error.reason or error}")
    return ConnectionFailed(Reason.TLS_HANDSHAKE, f"TLS: {error.strerror or error}")


async def send_all(sock: ssl.SSLSocket, data: bytes) -> None:
    """Sends everything. Raises OSError (ssl.SSLError among them)."""
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except ssl.SSLWantWriteError:
            await trio.lowlevel.wait_writable(sock)
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(sock)


async def receive_some(sock: ssl.SSLSocket, size: int) -> bytes:
    """Some bytes, or nothing at the end. Raises OSError (ssl.SSLError among them)."""
    while True:
        try:
            return sock.recv(size)
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(sock)
        except ssl.SSLWantWriteError:
            await trio.lowlevel.wait_writable(sock)
