"""The certificate authority: one root per trust domain, and the short-lived certificates of workloads under it.

What is issued is an X.509-SVID (https://spiffe.io, X509-SVID standard) on P-256: exactly one URI name, the SPIFFE id.
The upper half is values in, values out, with the clock a parameter; the lower half is files.

Renewing is issuing again into the same directory. A file is only ever replaced by a rename, so a reader sees all of the
old one or all of the new; but key and certificate are two files, and between two renames they are no pair. A reader
copes like this: load both, and if they do not belong together (OpenSSL: KEY_VALUES_MISMATCH), keep what it has and read
again. The new files are complete on disk before the first rename, so the next look finds the pair.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshnet.model.connection import Shape
from meshnet.model.identity import is_spiffe_id, is_trust_domain, trust_domain
from meshnet.net.files import write_files

CA_CERTIFICATE, CA_KEY = "ca.pem", "ca-key.pem"
CERTIFICATE, KEY, BUNDLE = "cert.pem", "key.pem", "bundle.pem"
ISSUED = (BUNDLE, KEY, CERTIFICATE)

ROOT_LIFETIME = timedelta(days=3650)
LEAF_LIFETIME = timedelta(hours=24)
_BACKDATED = timedelta(minutes=5)  # for hosts whose clock is behind


@dataclass(frozen=True, slots=True)
class Issued:
    """PEM files of one workload. `key` is None where the workload made its own and sent a request."""

    certificate: bytes
    key: bytes | None
    bundle: bytes


@dataclass(frozen=True, slots=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, domain: str, *, now: datetime) -> Self:
        """A new root for the trust domain `domain`. Raises ValueError if that is none."""
        if not is_trust_domain(domain):
            raise ValueError(f"{domain!r} is not a trust domain: lower-case letters, digits, dots, dashes, underscores")
        key = ec.generate_private_key(ec.SECP256R1())
        # A common name has at most 64 characters; two roots with one name are told apart by their key identifiers.
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"meshnet {domain}"[:64])])
        certificate = (
            _builder(name, name, key.public_key(), now, now + ROOT_LIFETIME)
            # Path length 1 leaves room for an intermediate under the same root.
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
            .add_extension(_usage(sign_certificates=True), critical=True)
            .add_extension(_uri(f"spiffe://{domain}"), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    @property
    def trust_domain(self) -> str:
        return _uris(self.certificate)[0].removeprefix("spiffe://")

    @property
    def bundle(self) -> bytes:
        """PEM of whom to believe."""
        return _pem(self.certificate)

    def issue(
        self, identity: str, *, now: datetime, ttl: timedelta = LEAF_LIFETIME, request: bytes | None = None
    ) -> Issued:
        """A certificate for `identity`. `request` is a PEM PKCS #10 request; only its key is taken from it.

        Raises ValueError: an identity of no or another trust domain, a lifetime that outlasts the root, a bad request.
        """
        self._check(identity, now, ttl)
        key = None if request else ec.generate_private_key(ec.SECP256R1())
        public_key = key.public_key() if key else _requested_key(request or b"")
        authority_id = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        leaf = (
            _builder(x509.Name([]), self.certificate.subject, public_key, now, now + ttl)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(_uri(identity), critical=True)  # critical, since there is no subject (RFC 5280, 4.2.1.6)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority_id), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        # The issuer goes with the leaf: given a lone leaf, OpenSSL builds and checks the chain at every handshake.
        return Issued(_pem(leaf) + _pem(self.certificate), _key_pem(key) if key else None, self.bundle)

    def _check(self, identity: str, now: datetime, ttl: timedelta) -> None:
        if not is_spiffe_id(identity):
            raise ValueError(f"{identity!r} is not a SPIFFE id such as spiffe://{self.trust_domain}/ns/default/sa/web")
        if trust_domain(identity) != self.trust_domain:
            raise ValueError(f"{identity} is not in this authority's trust domain, {self.trust_domain}")
        if ttl < timedelta(seconds=1):
            raise ValueError("a certificate must live for at least a second")
        root = self.certificate
        if not root.not_valid_before_utc <= now < root.not_valid_after_utc:
            raise ValueError(
                f"the authority's own certificate is valid from {root.not_valid_before_utc:%Y-%m-%d} "
                f"to {root.not_valid_after_utc:%Y-%m-%d}, and the clock says {now:%Y-%m-%d}"
            )
        if ttl > root.not_valid_after_utc - now:
            raise ValueError(f"the certificate would outlast the authority's own, {root.not_valid_after_utc:%Y-%m-%d}")


class CertificateView(Shape, frozen=True):
    """A certificate as people and programs read it. Times are RFC 3339 UTC; `names` are its URI names."""

    file: str
    names: tuple[str, ...]
    authority: bool
    issuer: str
    serial: str
    not_before: str
    not_after: str
    expires_in_seconds: float
    sha256: str


class CertificateList(Shape, frozen=True):
    items: tuple[CertificateView, ...]
    api_version: str = "meshnet.dev/v1"
    kind: str = "CertificateList"


def describe(pem: bytes, *, now: datetime, file: str = "") -> list[CertificateView]:
    """Every certificate in `pem`, in order. Raises ValueError if there is none."""
    return [_view(certificate, now, file) for certificate in x509.load_pem_x509_certificates(pem)]


def save_authority(authority: Authority, directory: Path, *, replace: bool = False) -> None:
    """Writes ca.pem and ca-key.pem. Raises FileExistsError if one is there, unless `replace`, and OSError."""
    files = {CA_KEY: _key_pem(authority.key), CA_CERTIFICATE: _pem(authority.certificate)}
    write_files(directory, files, replace=replace)


def load_authority(directory: Path) -> Authority:
    """Raises OSError, or ValueError if the files are not a certificate and the P-256 key that belongs to it."""
    certificate = x509.load_pem_x509_certificate((directory / CA_CERTIFICATE).read_bytes())
    key = serialization.load_pem_private_key((directory / CA_KEY).read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ValueError(f"{CA_KEY} is not the key of {CA_CERTIFICATE}")
    names = _uris(certificate)
    if not _is_authority(certificate) or len(names) != 1 or not is_trust_domain(names[0].removeprefix("spiffe://")):
        raise ValueError(f"{CA_CERTIFICATE} is not the certificate of an authority with one trust domain")
    return Authority(certificate, key)


def save_issued(issued: Issued, directory: Path) -> None:
    """Writes or replaces bundle.pem, key.pem (if there is a key) and cert.pem. Raises OSError."""
    # Whom to believe first: a peer that was renewed before us may already have a certificate of a new root.
    files = {BUNDLE: issued.bundle}
    if issued.key is not None:
        files[KEY] = issued.key
    files[CERTIFICATE] = issued.certificate
    write_files(directory, files)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, not_after: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _requested_key(request: bytes) -> ec.EllipticCurvePublicKey:
    parsed = x509.load_pem_x509_csr(request)
    key = parsed.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("the request's key is not a P-256 key")
    if not parsed.is_signature_valid:
        raise ValueError("the request is not signed with its own key")
    return key


def _view(certificate: x509.Certificate, now: datetime, file: str) -> CertificateView:
    return CertificateView(
        file=file,
        names=tuple(_uris(certificate)),
        authority=_is_authority(certificate),
        issuer=certificate.issuer.rfc4514_string(),
        serial=f"{certificate.serial_number:x}",
        not_before=_rfc3339(certificate.not_valid_before_utc),
        not_after=_rfc3339(certificate.not_valid_after_utc),
        expires_in_seconds=(certificate.not_valid_after_utc - now).total_seconds(),
        sha256=certificate.fingerprint(hashes.SHA256()).hex(),
    )


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _uri(uri: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
