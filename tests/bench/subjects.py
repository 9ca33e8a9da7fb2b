"""What is compared. Each subject is a world of its own: client and sidecar on `web`, sidecar and server on `api`."""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from meshnet.control.authority import BUNDLE, CERTIFICATE, KEY, Authority, save_issued
from meshnet.errors import CommandError
from meshnet.model.connection import Connection, Security
from meshnet.model.identity import spiffe_id
from meshnet_cli.demo.mesh import Mesh, Sidecar
from meshnet_cli.demo.world import Host, Process, ProgramFailed, World, wait_for
from tests.bench import load
from tests.bench.figures import DIRECT, HAPROXY, MESHNET, MTLS, PLAIN
from tests.bench.load import LoadFailed, Subject

PORT = 8080
_SERVICE_ADDRESS = "10.96.0.10"
_TUNNEL_PORT = 15108
_PLAIN_PORT = 15106
_NO_CERTIFICATE = "TLSV13_ALERT_CERTIFICATE_REQUIRED"  # RFC 8446, 6.2, as OpenSSL spells it

SUBJECTS = ((DIRECT, ""), (HAPROXY, PLAIN), (MESHNET, PLAIN), (HAPROXY, MTLS), (MESHNET, MTLS))


class CheckFailed(Exception):
    """A subject does not do what it is to be measured at."""


@contextmanager
def subject(peer: str, mode: str, program: Path) -> Iterator[Subject]:
    """Built, checked and ready to be measured. Raises CommandError with the logs when it is not."""
    with World() as world:
        web, api = world.host("web"), world.host("api")
        try:
            built = _build(peer, mode, world, web, api, program)
        except (CheckFailed, LoadFailed, ProgramFailed, TimeoutError) as error:
            logs = [f"{host.name} {one.name}: {one.output[-2000:]}" for host in (web, api) for one in host.processes]
            raise CommandError(
                f"{peer} {mode} cannot be measured: {error}", why="\n".join(logs), fix="see what its logs say, above"
            ) from error
        yield built


def _build(peer: str, mode: str, world: World, web: Host, api: Host, program: Path) -> Subject:
    for host in (web, api):
        _allow_many_short_connections(host)
    api.spawn(program, "serve", str(PORT))
    wait_for(lambda: api.listens(PORT), what="the server")
    if peer == DIRECT:
        built = Subject(peer, mode, web, (api.address, PORT))
    elif peer == HAPROXY:
        built = _haproxy(mode, web, api)
    else:
        built = _meshnet(mode, world, web, api, program)
    load.run(program, "rr", built, 1, warm=0, seconds=0.1)
    if mode == MTLS:
        _check_refusal(web, api)
    return built


def _haproxy(mode: str, web: Host, api: Host) -> Subject:
    tls = mode == MTLS
    port = _TUNNEL_PORT if tls else _PLAIN_PORT
    authority = Authority.create("bench.example", now=datetime.now(UTC))
    for host in (web, api):
        issued = authority.issue(spiffe_id("bench.example", "default", host.name), now=datetime.now(UTC))
        save_issued(issued, host.directory)
        both = (host.directory / CERTIFICATE).read_bytes() + (host.directory / KEY).read_bytes()
        (host.directory / "both.pem").write_bytes(both)
    sidecars = [
        _spawn_haproxy(web, f"127.0.0.1:{PORT}", "", f"{api.address}:{port}", _ssl(web) if tls else ""),
        _spawn_haproxy(api, f"{api.address}:{port}", _ssl(api) if tls else "", f"127.0.0.1:{PORT}", ""),
    ]
    wait_for(lambda: (web.listens(PORT) and api.listens(port)) or not all(sidecar.alive for sidecar in sidecars))
    for sidecar in sidecars:
        if not sidecar.alive:
            raise CheckFailed(f"HAProxy does not start:\n{sidecar.output}")
    return Subject(HAPROXY, mode, web, ("127.0.0.1", PORT), sidecars)


def _spawn_haproxy(host: Host, bind: str, bind_ssl: str, server: str, server_ssl: str) -> Process:
    config = host.directory / "haproxy.cfg"
    config.write_text(
        f"""global
    nbthread 1
    maxconn 4000
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen sidecar
    bind {bind} {bind_ssl}
    server next {server} {server_ssl}
"""
    )
    return host.spawn("haproxy", "-db", "-f", config)


def _ssl(host: Host) -> str:
    """Both ends show a certificate and verify the other's. Sessions may resume, as is HAProxy's default."""
    files = f"crt {host.directory / 'both.pem'} ca-file {host.directory / BUNDLE}"
    return f"ssl verify required {files} ssl-min-ver TLSv1.3"


def _meshnet(mode: str, world: World, web: Host, api: Host, program: Path) -> Subject:
    mesh = Mesh(world, "bench.example")
    mesh.write(mesh.service("api", [PORT], [api], addresses=(_SERVICE_ADDRESS,), meshed=mode == MTLS))
    sidecars = [mesh.sidecar(host) for host in (web, api)]
    for sidecar in sidecars:
        sidecar.capture()
    processes = [sidecar.process for sidecar in sidecars if sidecar.process]
    built = Subject(MESHNET, mode, web, (_SERVICE_ADDRESS, PORT), processes)
    load.run(program, "rr", built, 1, warm=0, seconds=0.1)
    for sidecar in sidecars:
        _check_security(sidecar, Security.MTLS if mode == MTLS else Security.PLAIN)
    return built


def _check_security(sidecar: Sidecar, wanted: Security) -> None:
    """Both sidecars must have had the connection in hand, and moved it as the mode says."""

    def carried() -> Connection | None:
        return next((record for record in sidecar.connections() if record.bytes_sent), None)

    record = wait_for(carried, what=f"the record of a connection on {sidecar.host.name}")
    assert record is not None
    if record.tls.mode is not wanted:
        raise CheckFailed(f"meshnet on {sidecar.host.name}: the connection is {record.tls.mode}, not {wanted}")


def _check_refusal(web: Host, api: Host) -> None:
    """Who shows no certificate must be told so, and get nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["meshnet/1"])
    try:
        with context.wrap_socket(web.connect(api.address, _TUNNEL_PORT)) as client:
            said = repr(client.recv(1))
    except OSError as error:
        said = str(error)
    if _NO_CERTIFICATE not in said:
        raise CheckFailed(f"a client without a certificate was not refused for that: {said}")


def _allow_many_short_connections(host: Host) -> None:
    """A closed connection blocks its port for a minute, and a minute of them is more than there are ports."""
    with host.entered():
        ipv4 = Path("/proc/sys/net/ipv4")
        (ipv4 / "ip_local_port_range").write_text("16384 65535")
        (ipv4 / "tcp_tw_reuse").write_text("1")
