import json
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from meshnet.control.authority import Authority, describe, load_authority, save_authority, save_issued
from meshnet.model.settings import IdentitySection
from meshnet_cli.main import main

NOW = datetime(2031, 5, 1, 12, 0, 0, tzinfo=UTC)
WEB = "spiffe://prod/ns/default/sa/web"


@pytest.fixture(scope="module")
def root() -> Authority:
    return Authority.create("prod", now=NOW)


def leaf_of(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificates(pem)[0]


def csr(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def openssl(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["openssl", *map(str, args)], capture_output=True, text=True, timeout=20, check=False)


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], prog_name="meshnet", catch_exceptions=False)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_root_is_for_ten_years_and_can_only_sign(root: Authority) -> None:
    certificate = root.certificate
    assert certificate.not_valid_before_utc == NOW - timedelta(minutes=5)
    assert certificate.not_valid_after_utc == NOW + timedelta(days=3650)
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature
    assert root.trust_domain == "prod"
    certificate.verify_directly_issued_by(certificate)


def test_a_leaf_says_one_name_both_uses_and_who_issued_it(root: Authority) -> None:
    issued = root.issue(WEB, now=NOW)
    leaf, issuer = x509.load_pem_x509_certificates(issued.certificate)
    assert issuer == root.certificate
    assert issued.bundle == root.bundle
    leaf.verify_directly_issued_by(issuer)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert list(names.value) == [x509.UniformResourceIdentifier(WEB)]
    assert names.critical
    uses = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert {use.dotted_string for use in uses} == {"1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2"}
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert leaf.extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature
    own = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier == own
    assert leaf.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest != own
    assert leaf.not_valid_before_utc == NOW - timedelta(minutes=5)
    assert leaf.not_valid_after_utc == NOW + timedelta(hours=24)
    assert isinstance(leaf.public_key(), ec.EllipticCurvePublicKey)


def test_no_two_certificates_share_a_serial_number_or_a_key(root: Authority) -> None:
    one, two = (leaf_of(root.issue(WEB, now=NOW).certificate) for _ in range(2))
    assert one.serial_number != two.serial_number
    assert one.public_key() != two.public_key()


def test_a_workload_that_made_its_own_key_keeps_it(root: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    issued = root.issue(WEB, now=NOW, request=csr(key))
    assert issued.key is None
    assert leaf_of(issued.certificate).public_key() == key.public_key()


@pytest.mark.parametrize(
    "request_pem",
    [
        csr(ec.generate_private_key(ec.SECP384R1())),
        csr(rsa.generate_private_key(65537, 2048)),
        b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        b"no request",
    ],
)
def test_a_request_that_is_not_for_p256_is_refused(root: Authority, request_pem: bytes) -> None:
    with pytest.raises(ValueError):
        root.issue(WEB, now=NOW, request=request_pem)


def test_a_request_that_its_key_did_not_sign_is_refused(root: Authority) -> None:
    genuine = x509.load_pem_x509_csr(csr(ec.generate_private_key(ec.SECP256R1())))
    der = bytearray(genuine.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(ValueError, match="not signed with its own key"):
        root.issue(WEB, now=NOW, request=forged)


@pytest.mark.parametrize(
    ("identity", "ttl", "now", "why"),
    [
        ("web", timedelta(hours=1), NOW, "is not a SPIFFE id"),
        ("spiffe://prod", timedelta(hours=1), NOW, "is not a SPIFFE id"),
        ("spiffe://prod/../x", timedelta(hours=1), NOW, "is not a SPIFFE id"),
        ("spiffe://test/ns/default/sa/web", timedelta(hours=1), NOW, "trust domain, prod"),
        (WEB, timedelta(0), NOW, "at least a second"),
        (WEB, timedelta(days=4000), NOW, "outlast"),
        (WEB, timedelta(days=2), NOW + timedelta(days=3649), "outlast"),
        (WEB, timedelta(hours=1), NOW + timedelta(days=3651), "the authority's own certificate"),
        (WEB, timedelta(hours=1), NOW - timedelta(days=1), "the authority's own certificate"),
    ],
)
def test_what_cannot_be_issued_is_refused(
    root: Authority, identity: str, ttl: timedelta, now: datetime, why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        root.issue(identity, now=now, ttl=ttl)


@pytest.mark.parametrize("domain", ["", "Prod", "a/b", "spiffe://prod", "x" * 256, "a b"])
def test_a_trust_domain_has_few_characters(domain: str) -> None:
    with pytest.raises(ValueError, match="is not a trust domain"):
        Authority.create(domain, now=NOW)


def test_a_long_trust_domain_is_no_trouble() -> None:
    long = "a" * 255
    root = Authority.create(long, now=NOW)
    assert root.trust_domain == long
    root.issue(f"spiffe://{long}/sa/web", now=NOW)


def test_what_was_saved_is_loaded(root: Authority, tmp_path: Path) -> None:
    save_authority(root, tmp_path)
    assert load_authority(tmp_path).certificate == root.certificate
    assert {path.name for path in tmp_path.iterdir()} == {"ca.pem", "ca-key.pem"}


def test_files_are_the_owners_alone_whatever_the_umask(root: Authority, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        save_authority(root, tmp_path / "ca")
        save_issued(root.issue(WEB, now=NOW), tmp_path / "web")
    finally:
        os.umask(before)
    assert mode(tmp_path / "ca") == mode(tmp_path / "web") == 0o700
    assert [mode(path) for path in sorted(tmp_path.glob("*/*"))] == [0o600] * 5


@pytest.mark.parametrize("present", ["ca.pem", "ca-key.pem"])
def test_an_authority_is_never_overwritten_by_accident(root: Authority, tmp_path: Path, present: str) -> None:
    (tmp_path / present).write_text("precious")
    with pytest.raises(FileExistsError):
        save_authority(root, tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(present, "precious")]


def test_an_authority_is_overwritten_on_demand(root: Authority, tmp_path: Path) -> None:
    save_authority(Authority.create("old", now=NOW), tmp_path)
    save_authority(root, tmp_path, replace=True)
    assert load_authority(tmp_path).trust_domain == "prod"


def test_a_key_of_another_authority_is_noticed(root: Authority, tmp_path: Path) -> None:
    save_authority(root, tmp_path)
    save_authority(Authority.create("prod", now=NOW), tmp_path / "other")
    (tmp_path / "other" / "ca-key.pem").replace(tmp_path / "ca-key.pem")
    with pytest.raises(ValueError, match="is not the key"):
        load_authority(tmp_path)


def test_a_leaf_is_no_authority(root: Authority, tmp_path: Path) -> None:
    issued = root.issue(WEB, now=NOW)
    (tmp_path / "ca.pem").write_bytes(issued.certificate)
    (tmp_path / "ca-key.pem").write_bytes(issued.key or b"")
    with pytest.raises(ValueError, match="not the certificate of an authority"):
        load_authority(tmp_path)


def test_a_reader_that_reads_again_always_comes_to_a_pair_while_certificates_are_renewed(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    root = Authority.create("prod", now=now)
    save_issued(root.issue(WEB, now=now), tmp_path)
    over = threading.Event()

    def renew() -> None:
        try:
            for _ in range(40):
                save_issued(root.issue(WEB, now=now), tmp_path)
        finally:
            over.set()

    writer = threading.Thread(target=renew)
    writer.start()
    pairs, reasons = 0, set[str]()
    while not over.is_set() or not pairs:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
            pairs += 1
        except ssl.SSLError as error:
            reasons.add(error.reason)
    writer.join()
    assert pairs > 1
    assert reasons <= {"KEY_VALUES_MISMATCH"}  # never half a file
    assert {path.name for path in tmp_path.iterdir()} == {"cert.pem", "key.pem", "bundle.pem"}


def test_openssl_believes_what_was_issued_and_nothing_else(tmp_path: Path) -> None:
    assert run("ca", "init", "--trust-domain", "prod", "--dir", tmp_path / "ca").exit_code == 0
    assert run("ca", "init", "--trust-domain", "prod", "--dir", tmp_path / "stranger").exit_code == 0
    issued = run("ca", "issue", "--service", "web", "--dir", tmp_path / "ca", "--out", tmp_path / "web")
    assert (issued.exit_code, issued.output) == (0, f"{WEB} in {tmp_path}/web, valid for 1d\n")
    certificate = tmp_path / "web" / "cert.pem"
    for purpose in ("sslserver", "sslclient"):
        check = ("verify", "-x509_strict", "-purpose", purpose, "-CAfile")
        assert openssl(*check, tmp_path / "web" / "bundle.pem", certificate).stdout == f"{certificate}: OK\n"
        assert openssl(*check, tmp_path / "stranger" / "ca.pem", certificate).returncode != 0
    text = openssl("x509", "-in", certificate, "-noout", "-text").stdout
    assert f"URI:{WEB}" in text
    assert "ASN1 OID: prime256v1" in text


def test_two_workloads_shake_hands_over_tls_1_3_and_see_each_other(tmp_path: Path) -> None:
    run("ca", "init", "--trust-domain", "prod", "--dir", tmp_path)
    for name in ("web", "db"):
        run("ca", "issue", "--service", name, "--namespace", "shop", "--dir", tmp_path, "--out", tmp_path / name)
    seen: dict[str, object] = {}

    def serve(sock: socket.socket) -> None:
        with context(tmp_path / "db", ssl.PROTOCOL_TLS_SERVER).wrap_socket(sock, server_side=True) as server:
            seen["version"], seen["client"] = server.version(), uris(server)
            server.sendall(b"hello")

    one, two = socket.socketpair()
    one.settimeout(20)
    two.settimeout(20)
    thread = threading.Thread(target=serve, args=(two,))
    thread.start()
    with context(tmp_path / "web", ssl.PROTOCOL_TLS_CLIENT).wrap_socket(one) as client:
        assert client.recv(5) == b"hello"
        assert uris(client) == ["spiffe://prod/ns/shop/sa/db"]
    thread.join()
    assert seen == {"version": "TLSv1.3", "client": ["spiffe://prod/ns/shop/sa/web"]}


def context(directory: Path, protocol: int) -> ssl.SSLContext:
    made = ssl.SSLContext(protocol)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    made.load_verify_locations(directory / "bundle.pem")
    return made


def uris(sock: ssl.SSLSocket) -> list[object]:
    certificate = sock.getpeercert()
    assert certificate
    names = certificate["subjectAltName"]
    assert isinstance(names, tuple)
    return [name[1] for name in names]


def test_the_file_names_are_the_ones_a_sidecar_looks_for(root: Authority, tmp_path: Path) -> None:
    save_issued(root.issue(WEB, now=NOW), tmp_path)
    section = IdentitySection()
    expected = {Path(path).name for path in (section.certificate, section.key, section.bundle)}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_show_prints_what_is_in_a_directory_or_a_file(tmp_path: Path) -> None:
    run("ca", "init", "--trust-domain", "prod", "--dir", tmp_path)
    run("ca", "issue", "--service", "web", "--ttl", "90m", "--dir", tmp_path, "--out", tmp_path / "web")
    table = run("ca", "show", tmp_path / "web")
    lines = [line.split() for line in table.output.splitlines()]
    assert lines[0][:4] == ["FILE", "KIND", "IDENTITY", "EXPIRES"]
    assert [line[:3] for line in lines[1:]] == [
        [f"{tmp_path}/web/cert.pem", "workload", WEB],
        [f"{tmp_path}/web/cert.pem", "authority", "spiffe://prod"],
        [f"{tmp_path}/web/bundle.pem", "authority", "spiffe://prod"],
    ]
    (shown,) = json.loads(run("ca", "show", "-o", "json", tmp_path).output)["items"]
    (described,) = describe((tmp_path / "ca.pem").read_bytes(), now=datetime.now(UTC))
    assert shown["sha256"] == described.sha256
    assert shown["names"] == ["spiffe://prod"]
    assert shown["authority"] is True
    assert shown["notAfter"].endswith("Z")
    assert run("ca", "show", "-o", "name", tmp_path / "web" / "cert.pem").output == f"{WEB}\nspiffe://prod\n"


def test_init_refuses_to_replace_an_authority_without_force(tmp_path: Path) -> None:
    init = ("ca", "init", "--trust-domain", "prod", "--dir", tmp_path)
    assert run(*init).exit_code == 0
    before = (tmp_path / "ca-key.pem").read_bytes()
    again = run(*init)
    assert again.exit_code == 1
    assert "holds one already" in again.stderr
    assert "--force" in again.stderr
    assert (tmp_path / "ca-key.pem").read_bytes() == before
    assert run(*init, "--force").exit_code == 0
    assert (tmp_path / "ca-key.pem").read_bytes() != before


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["issue"], 2, "one of --identity and --service"),
        (["issue", "--service", "web", "--identity", WEB], 2, "one of --identity and --service"),
        (["issue", "--service", "a b"], 1, "is not a SPIFFE id"),
        (["issue", "--identity", "spiffe://test/sa/web"], 1, "not in this authority's trust domain"),
        (["issue", "--service", "web", "--ttl", "24"], 2, "is not a duration"),
        (["issue", "--service", "web", "--ttl", "999999h"], 1, "outlast"),
        (["issue", "--service", "web", "--ttl", "1ms"], 1, "at least a second"),
        (["init", "--trust-domain", "Not This"], 1, "is not a trust domain"),
    ],
)
def test_wrong_arguments_are_refused_and_write_nothing(tmp_path: Path, args: list[str], code: int, words: str) -> None:
    run("ca", "init", "--trust-domain", "prod", "--dir", tmp_path / "ca")
    out = ["--out", str(tmp_path / "out")] if args[0] == "issue" else []
    result = run("ca", *args, "--dir", tmp_path / "ca", *out)
    assert result.exit_code == code
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "ca init --trust-domain"),
        ({"ca.pem": b"no PEM", "ca-key.pem": b"no PEM"}, "of no use"),
        ({"ca.pem": b"no PEM"}, "of no use"),
    ],
)
def test_an_authority_that_is_not_there_or_broken_is_named(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    result = run("ca", "issue", "--service", "web", "--dir", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert words in result.stderr


def test_an_encrypted_authority_key_is_named(root: Authority, tmp_path: Path) -> None:
    save_authority(root, tmp_path)
    encrypted = root.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    )
    (tmp_path / "ca-key.pem").write_bytes(encrypted)
    result = run("ca", "issue", "--service", "web", "--dir", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "of no use" in result.stderr


def test_show_says_when_there_is_nothing_to_show(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("no certificate")
    for path, words in [(tmp_path, "there is none of"), (tmp_path / "key.pem", "no certificate in")]:
        result = run("ca", "show", path)
        assert result.exit_code == 1
        assert words in result.stderr
    assert run("ca", "show", tmp_path / "absent.pem").exit_code == 1


def test_a_file_in_the_way_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("ca", "init", "--trust-domain", "prod", "--dir", tmp_path / "file")
    assert result.exit_code == 1
    assert "cannot write to" in result.stderr
    assert "\nfix: ls -ld " in result.stderr


def test_the_command_line_starts_without_cryptography() -> None:
    code = "import sys, meshnet_cli.ca; sys.exit('cryptography' in sys.modules)"
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(root / part) for part in (".", "cli", "init"))}
    started = subprocess.run([sys.executable, "-c", code], env=environment, check=False, timeout=20)
    assert started.returncode == 0
