"""Two pods in the mesh and a node. `client` and `server` come from manifests that `meshnet inject` has printed."""

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from meshnet.control.authority import Authority, save_issued
from meshnet_cli.kubernetes.manifests import read_documents
from meshnet_cli.main import main
from tests.pod.kubelet import Object, Pod
from tests.world import Host, World

API, PORT = "10.96.0.10", 8080

CURL = f"curl -sS --fail --max-time 10 http://{API}:{PORT}/"

CLIENT = f"""
apiVersion: v1
kind: Pod
metadata: {{name: client}}
spec:
  serviceAccountName: client
  terminationGracePeriodSeconds: 10
  initContainers:
    - {{name: fetch, command: [sh, -c, "{CURL}"], securityContext: {{runAsUser: 1000, runAsGroup: 1000}}}}
  containers:
    - {{name: app, command: [sh, -c, "{CURL} && exec sleep 600"], securityContext: {{runAsUser: 1000}}}}
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
    """One namespace of Kubernetes: identities, the mesh, and pods on hosts of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
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
            f"  addresses: [{API}]\n  ports: [{{port: {PORT}, mode: strict}}]\n"
            f"  endpoints: [{{address: {server.address}, tunnel: meshnet, "
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
        return Pod(host, self.node, template, self.objects)

    def client(self, manifest: str, *flags: str) -> Pod:
        """A pod on a host of its own."""
        self._clients += 1
        return self.pod(self.world.host(f"client-{self._clients}"), manifest, *flags)


@pytest.fixture(scope="module")
def _cluster() -> Iterator[Cluster]:
    # ./scripts/test without root maps one user: the sidecar, meshnet-init and the application are three.
    if os.getuid() != 0 or int(Path("/proc/self/uid_map").read_text().split()[2]) < 65536:
        pytest.skip("a pod has several users, and here is only one: run it as root")
    with World() as world:
        yield Cluster(world)


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
        host = cluster.world.host("server")
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
