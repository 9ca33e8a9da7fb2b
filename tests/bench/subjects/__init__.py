"""What is compared. Each subject is a world of its own: client and sidecar on `web`, sidecar and server on `api`.

hops      the way from client to server for a peer, and the certificates of its sidecars
haproxy, nginx, envoy   a peer's sidecar for one hop
meshnet   sidecars and redirect rules, run as users run them
check     what each must refuse and serve before it is measured
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from meshnet.errors import CommandError
from meshnet_cli.demo.mesh import Mesh
from meshnet_cli.demo.sandbox import search_path
from meshnet_cli.demo.world import Host, Process, ProgramFailed, World, wait_for
from tests.bench import load
from tests.bench.load import LoadFailed, Subject
from tests.bench.subjects import envoy, haproxy, meshnet, nginx
from tests.bench.subjects.check import CheckFailed, Probe, check_refusals
from tests.bench.subjects.hops import DOMAIN, PORT, TUNNEL_PORT, Hop, capture, way
from tests.bench.table import DIRECT, MESHNET, REDIRECTED
from tests.bench.tests import MTLS

_SIDECARS: Mapping[str, Callable[[Hop, int], Process]] = {
    "haproxy": haproxy.start,
    "haproxy-splice": partial(haproxy.start, splice=True),
    "nginx": nginx.start,
    REDIRECTED: nginx.start,
    "envoy": envoy.start,
}
_ECHO = Probe(b"Eecho", b"Eecho")  # what begins with an E comes back; see generator/server.c
_PROGRAMS = {"haproxy": "haproxy", "haproxy-splice": "haproxy", "nginx": "nginx", REDIRECTED: "nginx", "envoy": "envoy"}


def absent(peer: str, workers: int) -> str:
    """Why there is nothing to measure, if so."""
    if peer == MESHNET and workers not in meshnet.SETTINGS:
        return "not yet"
    program = _PROGRAMS.get(peer)
    if program and shutil.which(program, path=search_path()) is None:
        return "not installed"
    return ""


def versions() -> dict[str, str]:
    """Of the peers that are installed, as they say it."""
    found = {}
    for peer, (program, option) in {
        "HAProxy": ("haproxy", "-v"),
        "nginx": ("nginx", "-v"),
        "Envoy": ("envoy", "--version"),
    }.items():
        path = shutil.which(program, path=search_path())
        if path:
            done = subprocess.run([path, option], capture_output=True, text=True, check=True)
            said = re.search(r"version:?\s+(\S+)", done.stdout + done.stderr)
            found[peer] = said[1] if said else "version not said"
        else:
            found[peer] = "not installed"
    return found


@contextmanager
def subject(peer: str, mode: str, workers: int, program: Path) -> Iterator[Subject]:
    """Built, checked and ready to be measured. Raises CommandError with the logs when it is not."""
    with World() as world:
        web, api = world.host("web"), world.host("api")
        try:
            built = _build(peer, mode, workers, world, web, api, program)
        except (CheckFailed, LoadFailed, ProgramFailed, TimeoutError) as error:
            logs = [f"{host.name} {one.name}: {one.output[-2000:]}" for host in (web, api) for one in host.processes]
            raise CommandError(
                f"{peer} {mode} cannot be measured: {error}", why="\n".join(logs), fix="see what its logs say, above"
            ) from error
        yield built


def _build(peer: str, mode: str, workers: int, world: World, web: Host, api: Host, program: Path) -> Subject:
    for host in (web, api):
        allow_many_short_connections(host)
    server = api.spawn(program, "serve", str(PORT))
    wait_for(lambda: api.listens(PORT), what="the server")
    mesh = None
    if peer == DIRECT:
        built = Subject(peer, web, (api.address, PORT), server)
    elif peer == MESHNET:
        mesh = Mesh(world, DOMAIN)
        built = meshnet.build(web, api, mesh, server, mode, workers)
    else:
        built = _peer(peer, mode, workers, web, api, server)
    load.run(program, "rr", built, 1, warm=0, seconds=0.3)
    if mesh:
        built.says = meshnet.check(mesh, web, api, mode)
    elif peer != DIRECT and mode == MTLS:
        check_refusals(web, (api.address, TUNNEL_PORT), web.directory, _ECHO)
    return built


def _peer(peer: str, mode: str, workers: int, web: Host, api: Host, server: Process) -> Subject:
    path = way(mode, web, api)
    target = path[0].listen
    if peer == REDIRECTED:
        target, path = capture(path)
    sidecars = [_SIDECARS[peer](hop, workers) for hop in path]
    wait_for(
        lambda: all(hop.host.listens(hop.listen[1]) for hop in path) or not all(one.alive for one in sidecars),
        what=f"{peer} listens",
    )
    for sidecar in sidecars:
        if not sidecar.alive:
            raise CheckFailed(f"{peer} does not start")
    return Subject(peer, web, target, server, sidecars)


def allow_many_short_connections(host: Host) -> None:
    """A closed connection blocks its port for a minute, and a minute of them is more than there are ports."""
    with host.entered():
        ipv4 = Path("/proc/sys/net/ipv4")
        (ipv4 / "ip_local_port_range").write_text("16384 65535")
        (ipv4 / "tcp_tw_reuse").write_text("1")
