"""Who is on the other side: proven by certificate at both ends, or there is no connection. Never in plain text."""

import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from meshnet.codec.frames import Fin, GoAway, Opened
from meshnet.control.authority import BUNDLE, CERTIFICATE, KEY, Authority, Issued, save_issued
from meshnet.errors import CommandError
from meshnet.model.connection import Connection
from meshnet.model.resource import EndpointSpec
from meshnet.model.service import TunnelKind
from meshnet.net import tls
from tests.proxy.conftest import API, Hosts
from tests.proxy.peer import TUNNEL_PORT, Peer, credentials, issue
from tests.proxy.programs import Records, accept, converse, echo, is_reset, listen, nobody_came, reason
from tests.world import Host, Sidecar, wait_for

pytestmark = pytest.mark.netns


def now(**offset: float) -> datetime:
    """The authority's clock, which a test may set; its own certificate is not older than some minutes."""
    return datetime.now(UTC) + timedelta(**offset)


SHORT = timedelta(seconds=1)


def home(hosts: Hosts, host: Host) -> Path:
    return hosts.sidecar(host).config.parent


@pytest.fixture
def identity_of_api(hosts: Hosts) -> Iterator[None]:
    """What the test does to the certificate of `api` is undone after it."""
    kept = {name: (home(hosts, hosts.api) / name).read_bytes() for name in (CERTIFICATE, KEY, BUNDLE)}
    yield
    give(hosts, hosts.api, Issued(kept[CERTIFICATE], kept[KEY], kept[BUNDLE]))


def give(hosts: Hosts, host: Host, issued: Issued) -> None:
    """Restarts the host's sidecar with this certificate, which is sooner than to wait until it looks."""
    sidecar = hosts.sidecar(host)
    assert sidecar.process is not None
    sidecar.process.kill()
    save_issued(issued, home(hosts, host))
    sidecar.spawn()
    wait_for(lambda: knows_the_mesh(sidecar), what="the sidecar has read the mesh")


def refused(hosts: Hosts) -> str:
    """Why `web` cannot call `api`; its application, which listens, never hears of it, least of all in plain text."""
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server:
        assert is_reset(hosts.web, API, 8080, b"secret")
        assert nobody_came(server)
    return reason(out.one())


def test_an_endpoint_that_is_not_who_the_mesh_says_is_not_spoken_to(hosts: Hosts) -> None:
    service = hosts.mesh.service("api", [8080], [hosts.api], addresses=[API])
    endpoint = EndpointSpec(
        address=hosts.api.address, tunnel=TunnelKind.MESHNET, identity=hosts.mesh.identity("somebody-else")
    )
    spec = msgspec.structs.replace(service.spec, endpoints=(endpoint,))
    hosts.write(msgspec.structs.replace(service, spec=spec))
    assert refused(hosts) == "tls.peer_identity by proxy in tls"


@pytest.mark.produces("tls.expired")
def test_an_endpoint_whose_certificate_has_expired_is_not_spoken_to(hosts: Hosts, identity_of_api: None) -> None:
    give(hosts, hosts.api, hosts.mesh.authority.issue(hosts.mesh.identity("api"), now=now(minutes=-2), ttl=SHORT))
    assert hosts.sidecar(hosts.api).status().certificate.problem == "it has expired"
    assert refused(hosts) == "tls.expired by proxy in tls"


@pytest.mark.produces("tls.not_yet_valid")
def test_an_endpoint_whose_certificate_is_not_valid_yet_is_not_spoken_to(hosts: Hosts, identity_of_api: None) -> None:
    give(hosts, hosts.api, hosts.mesh.authority.issue(hosts.mesh.identity("api"), now=now(days=1)))
    assert refused(hosts) == "tls.not_yet_valid by proxy in tls"


def test_an_endpoint_of_an_authority_we_do_not_trust_is_not_spoken_to(hosts: Hosts, identity_of_api: None) -> None:
    impostor = Authority.create(hosts.mesh.trust_domain, now=now()).issue(hosts.mesh.identity("api"), now=now())
    give(hosts, hosts.api, impostor)
    assert refused(hosts) == "tls.peer_identity by proxy in tls"


@pytest.mark.parametrize(("tunnel_port", "code"), [(TUNNEL_PORT, "connect.refused"), (7, "tls.handshake")])
def test_an_endpoint_without_a_sidecar_that_works_is_not_spoken_to(hosts: Hosts, tunnel_port: int, code: str) -> None:
    hosts.write(hosts.mesh.service("api", [8080], [hosts.outside], addresses=[API], tunnel_port=tunnel_port))
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.outside, 8080) as server, echo(hosts.outside, 7):
        assert is_reset(hosts.web, API, 8080, b"secret")
        assert nobody_came(server)
    assert reason(out.one()) == f"{code} by proxy in tls"


@pytest.mark.produces("tls.no_identity")
def test_a_sidecar_without_a_certificate_speaks_to_no_meshed_endpoint(hosts: Hosts) -> None:
    bare = hosts.world.host("bare")
    sidecar = hosts.mesh.sidecar(bare, start=False)
    (sidecar.config.parent / CERTIFICATE).unlink()
    sidecar.spawn()
    wait_for(lambda: has_mesh(sidecar))
    sidecar.capture()
    out = Records(sidecar)
    with listen(hosts.api, 8080) as server:
        assert is_reset(bare, API, 8080)
        assert nobody_came(server)
    assert reason(out.one()) == "tls.no_identity by proxy in tls"
    status = sidecar.status()
    assert not status.ready
    assert "cert.pem" in status.not_ready_because[0]
    # What is not in the mesh is not affected.
    with listen(hosts.outside, 5555) as server:
        converse(bare.connect(hosts.outside.address, 5555), accept(server))


def has_mesh(sidecar: Sidecar) -> bool:
    """Whether it runs and has read the mesh, as one does that will not become ready."""
    try:
        return sidecar.status().config.version > 0
    except CommandError:
        return False


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("expired", "tls.expired"),
        ("not yet valid", "tls.not_yet_valid"),
        ("of another authority", "tls.peer_identity"),
        ("missing", "tls.handshake"),
    ],
)
def test_a_client_whose_certificate_is_no_good_is_refused(hosts: Hosts, fault: str, code: str) -> None:
    authority, web = hosts.mesh.authority, hosts.mesh.identity("web")
    impostor = Authority.create(hosts.mesh.trust_domain, now=now())
    match fault:
        case "expired":
            context = credentials(authority.issue(web, now=now(minutes=-2), ttl=SHORT)).client
        case "not yet valid":
            context = credentials(authority.issue(web, now=now(days=2))).client
        case "of another authority":
            context = credentials(impostor.issue(web, now=now()), authority.bundle).client
        case _:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.load_verify_locations(cadata=authority.bundle.decode())
            context.set_alpn_protocols([tls.ALPN])
    assert reason(refused_by_api(hosts, context)).startswith(f"{code} by proxy in ")


@pytest.mark.produces("tls.peer_identity")
def test_a_client_of_another_trust_domain_is_refused_even_if_its_authority_is_trusted(
    hosts: Hosts, identity_of_api: None
) -> None:
    elsewhere = Authority.create("elsewhere.example", now=now())
    both = hosts.mesh.authority.bundle + elsewhere.bundle
    issued = issue(hosts.mesh, "api")
    give(hosts, hosts.api, Issued(issued.certificate, issued.key, both))
    stranger = elsewhere.issue("spiffe://elsewhere.example/ns/default/sa/web", now=now())
    record = refused_by_api(hosts, credentials(stranger, both).client)
    assert reason(record) == "tls.peer_identity by proxy in accept"
    assert record.reason is not None
    assert "elsewhere.example" in record.reason.message


def test_a_client_that_offers_another_protocol_is_refused(hosts: Hosts) -> None:
    context = credentials(issue(hosts.mesh, "web")).client
    context.set_alpn_protocols(["h2"])
    assert reason(refused_by_api(hosts, context)).startswith("tls.handshake")


def test_a_client_with_an_older_tls_is_refused(hosts: Hosts) -> None:
    done = hosts.web.run(
        "openssl", "s_client", "-connect", f"{hosts.api.address}:{TUNNEL_PORT}", "-tls1_2", check=False
    )
    assert done.returncode != 0
    assert "protocol version" in done.stderr


def refused_by_api(hosts: Hosts, context: ssl.SSLContext) -> Connection:
    """The one record of a tunnel that does not come up; the application never hears of it."""
    into = Records(hosts.sidecar(hosts.api))
    with listen(hosts.api, 8080) as server:
        with pytest.raises((OSError, EOFError)), Peer(hosts.web, hosts.api, context) as peer:
            peer.open(hosts.api.address, 8080)
        assert nobody_came(server)
    return into.one()


def knows_the_mesh(sidecar: Sidecar) -> bool:
    """Ready it is not, with such a certificate."""
    try:
        return sidecar.status().config.version > 0
    except CommandError:
        return False


@pytest.mark.parametrize("relay", ["native", "python"])
def test_a_tunnel_from_before_the_authorities_were_others_serves_nobody(hosts: Hosts, relay: str) -> None:
    here, web = hosts.world.host(f"under-{relay}"), hosts.mesh.identity("web")
    sidecar = hosts.mesh.sidecar(here, start=False, proxy={"relay": relay})
    sidecar.spawn()
    wait_for(lambda: knows_the_mesh(sidecar), what="the sidecar has read the mesh")
    others = Authority.create(hosts.mesh.trust_domain, now=now())
    before, after = issue(hosts.mesh, "web"), others.issue(web, now=now())
    with listen(here, 8080) as server, Peer(hosts.web, here, context_of(before)) as old:
        carry(old, here, server)
        serial = sidecar.status().certificate.serial
        save_issued(others.issue(hosts.mesh.identity("api"), now=now()), sidecar.config.parent)
        wait_for(lambda: sidecar.status().certificate.serial != serial)
        with Peer(hosts.web, here, context_of(after)) as new:
            for _ in range(3):  # the last ones under an order, where the relay takes orders
                carry(new, here, server)
        said = []
        with pytest.raises((EOFError, ConnectionResetError)):
            said.append(old.open(here.address, 8080, source=f"{hosts.web.address}:40000"))
            while True:
                said.append(old.frame())
        assert set(map(type, said)) <= {GoAway}
        assert nobody_came(server)


def context_of(issued: Issued) -> ssl.SSLContext:
    context = credentials(issued).client
    assert isinstance(context, ssl.SSLContext)
    return context


def carry(peer: Peer, host: Host, server: socket.socket) -> None:
    """A whole connection through the tunnel."""
    assert peer.open(host.address, 8080, source=f"{peer.sock.getsockname()[0]}:40000") == Opened()
    with accept(server) as app:
        peer.sock.sendall(peer.wire.fin())
        assert app.recv(1) == b""
    assert peer.frame() == Fin()
