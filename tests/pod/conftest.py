"""Two pods in the mesh and a node. `client` and `server` come from manifests that `meshnet inject` has printed."""

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pytest
from click.testing import CliRunner

from meshnet.control.authority import Authority, save_issued
from meshnet_cli.kubernetes.manifests import read_documents
from meshnet_cli.main import main
from tests.pod.kubelet import Object, Pod
from tests.world import Host, World

API, API6, PORT = "10.96.0.10", "fd96::10", 8080
Family = Literal["ipv4", "ipv6"]
FAMILIES: tuple[Family, ...] = ("ipv4", "ipv6")


def calling(*addresses: str) -> str:
    """A command line that calls the service by each of its addresses."""
    hosts = (f"[{address}]" if ":" in address else address for address in addresses)
    return " && ".join(f"curl -gsS --fail --max-time 10 http://{host}:{PORT}/" for host in hosts)


def client_manifest(*addresses: str) -> str:
    """A pod whose init container and whose application call the service."""
    call = calling(*addresses)
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: client}}
spec:
  serviceAccountName: client
  terminationGracePeriodSeconds: 10
  initContainers:
    - {{name: fetch, command: [sh, -c, "{call}"], securityContext: {{runAsUser: 1000, runAsGroup: 1000}}}}
  containers:
    - {{name: app, command: [sh, -c, "{call} && exec sleep 600"], securityContext: {{runAsUser: 1000}}}}
"""


CURL = calling(API)
CLIENT = client_manifest(API)

PROBED = """
apiVersion: v1
kind: Pod
metadata: {name: probed}
spec:
  serviceAccountName: client
  containers:
    - name: app
      command: [python3, -m, http.server, "9000", --bind, "::", --directory, /work]
      workingDir: /work
      startupProbe: {tcpSocket: {port: 9000}, failureThreshold: 30}
      livenessProbe: {exec: {command: [test, -e, /work/alive]}}
      readinessProbe: {httpGet: {path: /ready, port: 9000}}
      volumeMounts: [{name: work, mountPath: /work}]
  volumes: [{name: work, emptyDir: {}}]
"""

_SERVER = f"""
apiVersion: v1
kind: Pod
metadata: {{name: server}}
spec:
  serviceAccountName: server
  containers:
    - name: nginx
      command: [nginx, -e, stderr, -c, /work/nginx.conf]
      ports: [{{containerPort: {PORT}}}]
      volumeMounts: [{{name: work, mountPath: /work}}]
      securityContext: {{runAsUser: 1000, runAsGroup: 1000}}
      startupProbe: {{httpGet: {{path: /, port: {PORT}}}, failureThreshold: 30}}
  volumes: [{{name: work, emptyDir: {{}}}}]
"""

_NGINX = f"""
daemon off;
pid /work/pid;
events {{}}
http {{
  access_log off;
  client_body_temp_path /work/b; proxy_temp_path /work/p; fastcgi_temp_path /work/f;
  uwsgi_temp_path /work/u; scgi_temp_path /work/s;
  server {{ listen {PORT}; listen [::]:{PORT}; location / {{ return 200 "hello"; }} }}
}}
"""


def meshnet(*arguments: object, stdin: str = "") -> list[Any]:
    """The documents that a command of meshnet prints."""
    done = CliRunner().invoke(main, list(map(str, arguments)), input=stdin, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return read_documents(done.stdout, "stdout")


class Cluster:
    """One namespace of Kubernetes: identities, the mesh, and pods on hosts of a world.

    Its pods have an address of each of `families`, the first of which is where a kubelet probes them.
    """

    def __init__(self, world: World, families: tuple[Family, ...]) -> None:
        self.world = world
        self.families = families
        self.apis = [{"ipv4": API, "ipv6": API6}[family] for family in families]
        self.node = world.host("node")
        self.objects: list[Object] = []
        self.authority = Authority.create("mesh.example", now=datetime.now(UTC))
        self.server: Pod | None = None
        self.running: Pod | None = None
        self._clients = 0

    def install(self, *accounts: str, server: Host) -> None:
        """What `meshnet install` prints: the mesh has one service, of which `server` is the endpoint."""
        home = self.world.directory
        mesh = home / "api.yaml"
        mesh.write_text(
            "apiVersion: meshnet.dev/v1\nkind: Service\nmetadata: {name: api}\nspec:\n"
            f"  addresses: {json.dumps(self.apis)}\n  ports: [{{port: {PORT}, mode: strict}}]\n"
            f"  endpoints: [{{address: '{self.address(server)}', tunnel: meshnet, "
            "identity: spiffe://mesh.example/ns/default/sa/server}]\n"
        )
        folders = []
        for account in accounts:
            folder = home / f"identity-{account}"
            identity = f"spiffe://mesh.example/ns/default/sa/{account}"
            save_issued(self.authority.issue(identity, now=datetime.now(UTC)), folder)
            folders += ["--identity", f"{account}={folder}"]
        settings = home / "meshnet.toml"
        settings.write_text('[capture]\nproof_interval = "1s"\n')
        self.objects = meshnet("install", "--mesh", mesh, "--config", settings, *folders)

    def pod(self, host: Host, manifest: str, *flags: str) -> Pod:
        """A pod, injected and not started. Of a Job it is the pod that the Job would make."""
        (document,) = meshnet("inject", *flags, stdin=manifest)
        template = document if document["kind"] == "Pod" else document["spec"]["template"]
        return Pod(host, self.node, template, self.objects, self.address(host))

    def address(self, host: Host, family: Family | None = None) -> str:
        """Of one family; of the first."""
        return {"ipv4": host.address, "ipv6": host.address6}[family or self.families[0]]

    def host(self, name: str) -> Host:
        """For a pod."""
        host = self.world.host(name)
        for family, flag in (("ipv4", "-4"), ("ipv6", "-6")):
            if family not in self.families:
                host.run("ip", flag, "address", "flush", "dev", "eth0")
        return host

    def client(self, manifest: str, *flags: str) -> Pod:
        """A pod on a host of its own."""
        self._clients += 1
        return self.pod(self.host(f"client-{self._clients}"), manifest, *flags)


@pytest.fixture(scope="module")
def _cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Of both families, IPv4 first, unless tests name others."""
    # ./scripts/test without root maps one user: the sidecar, meshnet-init and the application are three.
    if os.getuid() != 0 or int(Path("/proc/self/uid_map").read_text().split()[2]) < 65536:
        pytest.skip("a pod has several users, and here is only one: run it as root")
    with World() as world:
        yield Cluster(world, getattr(request, "param", FAMILIES))


@pytest.fixture
def cluster(_cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """When the test fails, its report shows the end of every log."""
    before = set(_cluster.world.hosts)
    yield _cluster
    for host in _cluster.world.hosts.values():
        for process in host.processes:
            request.node.add_report_section("teardown", f"{host.name}: {process.name}", process.output[-3000:])
    shared = {pod.host.name: pod for pod in (_cluster.server, _cluster.running) if pod}
    dead = [f"{process.name} of {name}" for name, pod in shared.items()
            for process in pod.processes.values() if not process.alive]  # fmt: skip
    assert dead == [], "what all tests share did not live to the end of this one"
    for name in set(_cluster.world.hosts) - before - set(shared):
        for process in _cluster.world.hosts[name].processes:
            process.kill()


@pytest.fixture
def server(cluster: Cluster) -> Pod:
    """A pod that has started: nginx answers `hello` behind its sidecar, in strict mode."""
    if cluster.server is None:
        host = cluster.host("server")
        cluster.install("client", "server", server=host)
        cluster.server = cluster.pod(host, _SERVER)
        (cluster.server.volumes / "work" / "nginx.conf").write_text(_NGINX)
        cluster.server.start()
    return cluster.server


@pytest.fixture
def client(cluster: Cluster, server: Pod) -> Callable[..., Pod]:
    """A pod beside it, of a manifest, injected and not started."""
    return cluster.client


@pytest.fixture
def running(cluster: Cluster, server: Pod) -> Pod:
    """CLIENT, started; for tests that leave it as they found it."""
    if cluster.running is None:
        cluster.running = cluster.client(CLIENT)
        cluster.running.start()
    return cluster.running


def need_truthful_probes(pod: Pod) -> None:
    """Of PROBED, whose files and program are what its probes ask for."""
    work = pod.volumes / "work"
    (work / "ready").write_text("")
    pod.start()
    assert pod.probe("app", "startupProbe")
    assert pod.probe("app", "readinessProbe")
    (work / "ready").unlink()
    assert not pod.probe("app", "readinessProbe")
    assert not pod.probe("app", "livenessProbe")
    (work / "alive").write_text("")
    assert pod.probe("app", "livenessProbe")
    pod.processes["app"].kill()
    assert not pod.probe("app", "startupProbe")  # the one of TCP, which a redirected port would have taken for well
    assert not pod.probe("app", "readinessProbe")
    assert pod.probe("meshnet-proxy", "livenessProbe")
