"""The way of a connection through a peer's sidecars, and the certificates they show each other."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from meshnet.control.authority import Authority
from meshnet.model.identity import spiffe_id
from meshnet_cli.demo.world import Host
from tests.bench.tests import MTLS, SINGLE

PORT = 8080
TUNNEL_PORT, PLAIN_PORT = 15108, 15106
DOMAIN = "bench.example"
SERVICE_ADDRESS = "10.96.0.10"

# In a sidecar's directory. `chain` is the leaf and its issuer, `both` is the chain and the key.
LEAF, CHAIN, KEY, BOTH, BUNDLE = "leaf.pem", "chain.pem", "key.pem", "both.pem", "ca.pem"


@dataclass(frozen=True, slots=True)
class Hop:
    """One sidecar: where it listens, where it sends what comes, and which of the two is mTLS."""

    host: Host
    listen: tuple[str, int]
    to: tuple[str, int]
    peer: str = ""  # the name of the host at the other end of the mTLS connection
    accepts_tls: bool = False
    dials_tls: bool = False

    @property
    def identity(self) -> str:
        """Of the peer."""
        return identity(self.peer)


def way(mode: str, web: Host, api: Host) -> tuple[Hop, ...]:
    entry = ("127.0.0.1", PORT)
    if mode == SINGLE:
        return (Hop(web, entry, (api.address, PORT)),)
    tls = mode == MTLS
    between = (api.address, TUNNEL_PORT if tls else PLAIN_PORT)
    if tls and not (web.directory / LEAF).exists():
        authority = Authority.create(DOMAIN, now=datetime.now(UTC))
        for host in (web, api):
            issue(authority, host.name, host.directory)
    return (
        Hop(web, entry, between, peer=api.name, dials_tls=tls),
        Hop(api, between, ("127.0.0.1", PORT), peer=web.name, accepts_tls=tls),
    )


def capture(path: tuple[Hop, ...]) -> tuple[tuple[str, int], tuple[Hop, ...]]:
    """Rules that turn connections to the sidecars, as meshnet's do: what the client dials then, and the hops."""
    web, api = path
    for hop, hook, match in (
        (web, "output", f"ip daddr {SERVICE_ADDRESS} tcp dport {PORT}"),
        (api, "prerouting", f"tcp dport {PORT}"),
    ):
        rule = f"tcp flags & (fin | syn | rst | ack) == syn {match} redirect to :{hop.listen[1]};"
        chain = f"chain turn {{ type nat hook {hook} priority -105; {rule} }};"
        hop.host.run("nft", "-f", "-", stdin=f"table ip capture {{ {chain} }}\n")
    return (SERVICE_ADDRESS, PORT), (replace(web, to=(api.listen[0], PORT)), api)


def identity(name: str) -> str:
    return spiffe_id(DOMAIN, "default", name)


def issue(authority: Authority, name: str, directory: Path) -> None:
    """As meshnet's own certificates, and with a DNS name, which nginx asks of a server."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity(name)), x509.DNSName(name)]),
            critical=False,
        )
        .sign(authority.key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    chain = leaf + authority.bundle
    for file, text in {LEAF: leaf, CHAIN: chain, KEY: private, BOTH: chain + private, BUNDLE: authority.bundle}.items():
        (directory / file).write_bytes(text)
