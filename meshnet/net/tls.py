"""Mutual TLS 1.3 with SPIFFE ids between two sidecars: what an implementation offers, and what all of them share."""

import functools
import hashlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Protocol

from cryptography import x509

from meshnet.errors import ConnectionFailed, EndedBy, Reason
from meshnet.model.identity import is_spiffe_id

ALPN = "meshnet/1"

# X509_V_ERR_* of openssl/x509_vfy.h
_VERIFY_REASONS = {9: Reason.TLS_NOT_YET_VALID, 10: Reason.TLS_EXPIRED}
_NOT_LOOKED_AT = {1, 17, 65, 66}  # unspecified, out of memory, invalid call, store lookup: it says nothing of the peer


class Ticket(Protocol):
    """What a later handshake with the same peer, in the same context, can resume."""

    @property
    def time(self) -> int:
        """When it was made, in seconds since the epoch."""


class Channel(Protocol):
    """A TLS connection to a peer sidecar, whose handshake is over and who has proven to be `identity`.

    `good_until`: when its certificate ends, in seconds since the epoch. `context`: what the handshake was made with.
    """

    context: object
    identity: str
    good_until: float
    version: str
    cipher: str
    resumed: bool

    @property
    def ticket(self) -> Ticket | None: ...

    async def send_all(self, data: bytes) -> None:
        """Raises OSError."""

    def send_now(self, data: bytes) -> None:
        """A frame or two, which fit if anything does. Raises OSError, and the channel is then of no further use."""

    async def receive(self) -> bytes:
        """Some bytes, or nothing at the end. Raises OSError, and ConnectionFailed(tls.*) for what TLS has to say."""

    def receive_now(self) -> bytes | None:
        """As `receive`; None when it would have to wait."""

    def serve(self, host: str) -> None:
        """Before `receive`, by who waits for the peer at `host` to ask for a connection; only between frames.

        Where a relay takes orders it may answer by itself what they cover, until `receive` has something.
        """

    def stop_serving(self, host: str) -> None:
        """From now on `receive` has whatever the peer at `host` asks for, whether orders cover it or not."""

    def last_ends(self) -> tuple[str, str]:
        """How the last lease that a relay had by itself has ended: see meshnet.relay.Wire.take_back."""

    def shut(self) -> None:
        """Whoever receives finds an end."""

    def close(self) -> None:
        """A bare TCP close: meshnet/1 ends leases with frames, so that truncates nothing."""


class Returned(NamedTuple):
    """A channel that was in a depot: how many leases it had there, and when the last one ended (monotonic)."""

    channel: Channel
    leases: int
    idle_since: float


class Depot(Protocol):
    """Channels to one peer, between leases, that a relay may lease by itself for its orders."""

    def park(self, channel: Channel) -> None:
        """It is the depot's until it comes back."""

    def take(self) -> Returned | None:
        """The one that was used last, if there is one."""

    def recall(self) -> list[Returned]:
        """All, latest first; those that are leased come back by themselves when their leases end."""

    def counts(self) -> tuple[int, int, int]:
        """Parked, leased, and the most that were leased at once since the last `recall`."""


class Tls(Protocol):
    """An implementation."""

    def depot(self, come_back: Callable[[Returned], None]) -> Depot | None:
        """None where no relay leases channels by itself. `come_back` gets those that come back by themselves."""

    def context(self, certificate: str, key: str, bundle: str, *, is_server: bool) -> object:
        """From PEM files. Raises OSError, also when key and certificate are no pair, or ValueError."""

    async def connect(self, sock: socket.socket, context: object, ticket: Ticket | None, timeout: float) -> Channel:
        """The handshake of who dialled, within `timeout` seconds. Owns `sock`. Raises ConnectionFailed(tls.*)."""

    async def accept(self, sock: socket.socket, context: object, timeout: float) -> Channel:
        """The handshake of who was dialled, as `connect`."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who this sidecar is: its certificate, and whom it believes. Times are seconds since the epoch.

    `authorities` is a digest of the bundle.
    """

    identity: str
    issuer: str
    serial: str
    not_before: float
    not_after: float
    authorities: bytes
    client: object
    server: object

    def problem(self, now: float) -> str:
        """Why the certificate is of no use at `now`, by this host's clock: "has expired"; empty where it is of use."""
        if now < self.not_before:
            began = f"is not valid before {utc(self.not_before)}"
            return f"{began}, and this host's clock says {utc(now)}: set the clock (timedatectl), or issue it again"
        return "has expired" if now >= self.not_after else ""


def utc(seconds: float) -> str:
    """A time since the epoch as RFC 3339 has it."""
    return datetime.fromtimestamp(int(seconds), UTC).isoformat().replace("+00:00", "Z")


def load_credentials(certificate: str, key: str, bundle: str, tls: Tls) -> Credentials:
    """Reads PEM files. Raises OSError (also when key and certificate are no pair) or ValueError."""
    leaf = x509.load_pem_x509_certificate(Path(certificate).read_bytes())
    identities = _identities(leaf)
    if len(identities) != 1 or not is_spiffe_id(identities[0]):
        raise ValueError(f"{certificate} must carry exactly one SPIFFE id, not {identities}")
    return Credentials(
        identity=identities[0],
        issuer=leaf.issuer.rfc4514_string(),
        serial=f"{leaf.serial_number:x}",
        not_before=leaf.not_valid_before_utc.timestamp(),
        not_after=leaf.not_valid_after_utc.timestamp(),
        authorities=hashlib.sha256(Path(bundle).read_bytes()).digest(),
        client=tls.context(certificate, key, bundle, is_server=False),
        server=tls.context(certificate, key, bundle, is_server=True),
    )


def peer_identity(certificate: bytes) -> tuple[str, float]:
    """The SPIFFE id in a peer's certificate (DER) and when that ends. Raises ConnectionFailed(tls.*).

    The time is looked at again here because a resumed session brings a certificate nobody verified just now.
    """
    identities, not_after = _names_and_end(certificate)
    if len(identities) != 1 or not is_spiffe_id(identities[0]):
        raise ConnectionFailed(Reason.TLS_PEER_IDENTITY, f"the peer's certificate names {list(identities) or 'nobody'}")
    if not_after < time.time():
        raise ConnectionFailed(Reason.TLS_EXPIRED, f"the certificate of {identities[0]} has expired")
    return identities[0], not_after


def handshake_timeout(seconds: float, is_client: bool) -> ConnectionFailed:
    ended_by = EndedBy.PROXY if is_client else EndedBy.CLIENT
    return ConnectionFailed(Reason.TLS_HANDSHAKE, f"no TLS handshake within {seconds:.3g} s", ended_by=ended_by)


def not_verified(code: int, message: str) -> ConnectionFailed:
    """What X509_V_ERR_* `code` of the peer's certificate means to an operator (openssl/x509_vfy.h)."""
    if code in _NOT_LOOKED_AT:
        return ConnectionFailed(Reason.TLS_HANDSHAKE, f"the peer's certificate was not verified: {message}")
    reason = _VERIFY_REASONS.get(code, Reason.TLS_PEER_IDENTITY)
    of_clocks = code in _VERIFY_REASONS
    hint = f"; this host's clock says {utc(time.time())}: is that right (timedatectl)?" if of_clocks else ""
    return ConnectionFailed(reason, f"the peer's certificate: {message}{hint}")


@functools.lru_cache(maxsize=1024)  # one peer makes many handshakes with one certificate
def _names_and_end(certificate: bytes) -> tuple[tuple[str, ...], float]:
    try:
        leaf = x509.load_der_x509_certificate(certificate)
        return tuple(_identities(leaf)), leaf.not_valid_after_utc.timestamp()
    except ValueError as error:
        raise ConnectionFailed(Reason.TLS_PEER_IDENTITY, f"the peer's certificate cannot be read: {error}") from error


def _identities(leaf: x509.Certificate) -> list[str]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)
