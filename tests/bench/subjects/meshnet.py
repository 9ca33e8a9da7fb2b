"""meshnet on both hosts, with the redirect rules in force."""

from typing import Any

from meshnet.codec.frames import Ping, Pong, encode
from meshnet.control.authority import CERTIFICATE, KEY
from meshnet.model.connection import Connection, Security
from meshnet.model.resource import API_VERSION, LimitsSpec, Metadata, TrafficPolicy, TrafficPolicySpec
from meshnet.net.tls import ALPN
from meshnet_cli.demo.mesh import Mesh, Sidecar
from meshnet_cli.demo.world import Host, Process, wait_for
from tests.bench.growth.room import MOST_WORKERS
from tests.bench.load import Subject
from tests.bench.subjects.check import CheckFailed, Probe, check_refusals
from tests.bench.subjects.hops import BOTH, PORT, SERVICE_ADDRESS, TUNNEL_PORT
from tests.bench.table import MESHNET
from tests.bench.tests import MTLS, SINGLE

# By the number of workers, the sections of meshnet.toml that make them. A number that is not here is "not yet".
SETTINGS: dict[int, dict[str, dict[str, Any]]] = {
    workers: {"proxy": {"workers": workers}} for workers in range(1, MOST_WORKERS + 1)
}

# Twice: who expects TLS can refuse plain text from the fifth byte on, and one PING has four.
_PING = Probe(encode(Ping()) * 2, encode(Pong()) * 2, ALPN)


def build(web: Host, api: Host, mesh: Mesh, server: Process, mode: str, workers: int) -> Subject:
    unlimited = TrafficPolicySpec(services=("api",), limits=LimitsSpec(max_connections=0))
    mesh.write(
        mesh.service("api", [PORT], [api], addresses=(SERVICE_ADDRESS,), meshed=mode == MTLS),
        TrafficPolicy(api_version=API_VERSION, metadata=Metadata(name="unlimited"), spec=unlimited),
    )
    hosts = (web,) if mode == SINGLE else (web, api)
    sidecars = [_sidecar(mesh, host, **SETTINGS[workers]) for host in hosts]
    for sidecar in sidecars:
        sidecar.wait_until_ready()
        sidecar.capture()
    processes = [sidecar.process for sidecar in sidecars if sidecar.process]
    return Subject(MESHNET, web, (SERVICE_ADDRESS, PORT), server, processes)


def _sidecar(mesh: Mesh, host: Host, **sections: dict[str, Any]) -> Sidecar:
    """Started, not yet ready."""
    sidecar = mesh.sidecar(host, identity="", start=False, **sections)
    sidecar.spawn()
    return sidecar


def check(mesh: Mesh, web: Host, api: Host, mode: str) -> str:
    """After a connection: each sidecar had it in hand, and moved it as the mode says. Raises CheckFailed.

    What meshnet says of itself: the relay that carried it.
    """
    wanted = Security.MTLS if mode == MTLS else Security.PLAIN
    relays = {_carried(sidecar, wanted).relay for sidecar in mesh.sidecars.values()}
    if mode == MTLS:
        home = mesh.sidecars[web.name].config.parent
        (home / BOTH).write_bytes((home / CERTIFICATE).read_bytes() + (home / KEY).read_bytes())
        check_refusals(web, (api.address, TUNNEL_PORT), home, _PING)
    return f"relay {', '.join(sorted(relays))} ({mode})"


def _carried(sidecar: Sidecar, wanted: Security) -> Connection:
    def carried() -> Connection | None:
        return next((record for record in sidecar.connections() if record.bytes_sent), None)

    record = wait_for(carried, what=f"the record of a connection on {sidecar.host.name}")
    assert record is not None
    if record.tls.mode is not wanted:
        raise CheckFailed(f"meshnet on {sidecar.host.name}: the connection is {record.tls.mode}, not {wanted}")
    return record
