"""A pod as Kubernetes runs it: rules by NET_ADMIN alone, a sidecar with no capability, and an application behind it."""

import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from meshnet.model.admin import GetStatus, Status
from meshnet.model.capture import CaptureStatus
from meshnet_cli.client import ask
from tests.init.kernel import COMMANDS, listening
from tests.pod.caller import Caller, asks_once
from tests.pod.conftest import API, API6, CLIENT, CURL, PORT, PROBED, Cluster, need_truthful_probes
from tests.pod.kubelet import Pod
from tests.proxy.programs import ended_by_rst
from tests.world import ProgramFailed, wait_for

pytestmark = pytest.mark.netns

JOB = f"""
apiVersion: batch/v1
kind: Job
metadata: {{name: report}}
spec:
  template:
    spec:
      serviceAccountName: client
      restartPolicy: Never
      terminationGracePeriodSeconds: 10
      containers:
        - {{name: job, command: [sh, -c, "for i in 1 2 3; do {CURL} || exit 1; done"]}}
"""


def facts(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def capture_of(pod: Pod) -> CaptureStatus:
    """What the sidecar says of capture."""
    socket_path = str(pod.volumes / "meshnet-run" / "admin.sock")
    found = ask(socket_path, GetStatus(), Status).capture
    assert found is not None
    return found


def test_traps_5_and_6_init_containers_and_the_application_find_the_proxy_ready(running: Pod, server: Pod) -> None:
    pod = running
    assert pod.started == ["meshnet-init", "meshnet-proxy", "fetch", "app"]
    app = pod.processes["app"]
    wait_for(lambda: app.output == "hello")
    # It was the mesh that brought them there: through a tunnel, with the identity of the pod's service account.
    by_client = f'"source":{{"address":"{pod.host.address}:'

    def served() -> list[str]:
        lines = server.processes["meshnet-proxy"].output.splitlines()
        return [line for line in lines if by_client in line and '"inbound"' in line]

    wait_for(lambda: len(served()) == 2)
    assert all('"identity":"spiffe://mesh.example/ns/default/sa/client"' in line for line in served())


def test_the_sidecar_has_no_right_and_a_root_directory_it_cannot_write_to(running: Pod) -> None:
    found = facts(running.processes["meshnet-proxy"].pid)
    assert {found[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (found["Uid"].split()[0], found["Gid"].split()[0], found["NoNewPrivs"]) == ("15137", "15137", "1")
    for name in ("meshnet-init", "meshnet-proxy"):
        assert running.execute(name, "touch", "/anywhere", check=False) == 1
        assert running.execute(name, "touch", f"/run/meshnet/{name}") == 0
    assert running.execute("meshnet-proxy", "meshnet", "rules", "verify", check=False) == 5
    assert running.execute("meshnet-init", "meshnet", "rules", "verify") == 0


@pytest.mark.parametrize("backend", ["nft", "iptables", "legacy"])
def test_each_backend_has_the_rights_it_needs_and_no_more(client: Callable[..., Pod], backend: str) -> None:
    pod = client(CLIENT, "--backend", backend)
    assert f"in force ({backend})" in pod.run_to_end("meshnet-init")
    with pytest.raises(ProgramFailed, match="onnect to server"):  # no sidecar yet: refused, and not let pass
        pod.run_to_end("fetch")
    lock = pod.volumes / "meshnet-run" / "xtables.lock"
    assert lock.exists() == (backend == "legacy")


@pytest.mark.parametrize("backend", ["nft", "iptables"])
def test_that_the_rules_are_tried_in_the_pod_s_own_namespace_is_told_and_no_warning(
    client: Callable[..., Pod], backend: str
) -> None:
    """A runtime lets nobody make another one."""
    said = client(CLIENT, "--backend", backend).run_to_end("meshnet-init")
    assert f"{backend} was tried in this network namespace, by rules that nothing came to" in said
    assert "warning" not in said


def test_legacy_tables_that_may_not_be_looked_at_are_left_aside_and_told(client: Callable[..., Pod]) -> None:
    pod = client(CLIENT)
    pod.host.run("iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-p", "udp", "-j", "ACCEPT")
    said = pod.run_to_end("meshnet-init")
    assert "in force (nft)" in said
    assert "rules in the legacy tables (ip nat) may stand ahead of these" in said


def test_without_the_right_to_the_legacy_tables_it_says_what_is_missing(client: Callable[..., Pod]) -> None:
    pod = client(CLIENT, "--backend", "legacy")
    pod.containers["meshnet-init"]["securityContext"]["capabilities"]["add"].remove("NET_RAW")
    missing = "(?s)not allowed to change the legacy tables.*NET_RAW.*inject --backend legacy"
    with pytest.raises(ProgramFailed, match=missing):
        pod.run_to_end("meshnet-init")


def test_trap_5_a_container_that_runs_before_the_proxy_is_left_alone_by_its_group(
    client: Callable[..., Pod], cluster: Cluster
) -> None:
    outside = cluster.world.host("outside")
    outside.spawn("python3", "-m", "http.server", "8000", name="http")
    wait_for(lambda: outside.listens(8000))
    manifest = CLIENT.replace(f"{API}:{PORT}", f"{outside.address}:8000")
    manifest = manifest.replace("{name: client}", "{name: client, annotations: {meshnet.dev/skip-gids: '4242'}}")
    pod = client(manifest.replace("runAsGroup: 1000", "runAsGroup: 4242"))
    pod.run_to_end("meshnet-init")
    assert "Directory listing" in pod.run_to_end("fetch")
    pod.containers["fetch"]["securityContext"]["runAsGroup"] = 1000
    with pytest.raises(ProgramFailed, match="onnect to server"):
        pod.run_to_end("fetch")


def test_trap_7_a_job_ends_and_its_sidecar_behind_it(client: Callable[..., Pod]) -> None:
    pod = client(JOB)
    pod.start()
    job, sidecar = pod.processes["job"], pod.processes["meshnet-proxy"]
    assert (job.popen.wait(20), job.output) == (0, "hello" * 3)
    assert sidecar.alive
    assert pod.end_sidecars() == [0]


def test_sigterm_with_the_application_still_calling_out(client: Callable[..., Pod]) -> None:
    pod = client(CLIENT)
    pod.start()
    sidecar = pod.processes["meshnet-proxy"]
    with closing(Caller(pod)) as first:
        assert first.asks() == "hello"
        pod.asked_to_end("meshnet-proxy")
        wait_for(lambda: not pod.probe("meshnet-proxy", "readinessProbe"))
        with closing(Caller(pod)) as second:
            assert (first.asks(), second.asks(), asks_once(pod)) == ("hello", "hello", "hello")
            first.close()
            assert second.asks() == "hello"
    assert sidecar.popen.wait(10) == 0


def test_sigterm_with_a_connection_that_outlives_the_grace_period(client: Callable[..., Pod]) -> None:
    pod = client(CLIENT.replace("terminationGracePeriodSeconds: 10", "terminationGracePeriodSeconds: 3"))
    pod.start()
    with closing(Caller(pod)) as left:
        assert left.asks() == "hello"
        assert pod.end_sidecars() == [0]  # and not killed, for its drain is shorter than the grace period
        assert ended_by_rst(left.connection.sock)


def test_an_ordinary_sidecar_holds_the_application_back_and_stays_a_while_when_both_end(
    client: Callable[..., Pod],
) -> None:
    manifest = CLIENT.replace("terminationGracePeriodSeconds: 10", "terminationGracePeriodSeconds: 6")
    pod = client(manifest, "--no-native-sidecar")
    # Before there are rules, and so without the mesh: the service's address would lead nowhere.
    pod.containers["fetch"]["command"] = ["true"]
    pod.start()
    assert pod.started == ["fetch", "meshnet-init", "meshnet-proxy", "app"]
    wait_for(lambda: pod.processes["app"].output == "hello")

    hook = pod.containers["meshnet-proxy"]["lifecycle"]["preStop"]["exec"]["command"]
    stays = threading.Thread(target=pod.execute, args=("meshnet-proxy", *hook))
    stays.start()
    asked = 0
    while stays.is_alive():  # nothing is open in between, which alone would end a drain
        assert asks_once(pod) == "hello"
        asked += 1
    assert asked
    assert pod.processes["meshnet-proxy"].terminate(6) == 0


def test_probes_of_each_shape_tell_the_truth(client: Callable[..., Pod]) -> None:
    need_truthful_probes(client(PROBED))


def test_trap_4_init_that_runs_again_cuts_nothing(running: Pod, server: Pod) -> None:
    with closing(Caller(running)) as caller:
        assert caller.asks() == "hello"
        for pod in (running, server):
            said = pod.run_to_end("meshnet-init")
            assert "nothing changed" in said
            assert "which the rules fit" in said
            assert "ipv4: captured: the proxy answered" in said
        assert caller.asks() == "hello"


def test_trap_4_a_sidecar_that_fails_is_started_again_and_init_runs_again_where_it_may_not_ask_it(
    client: Callable[..., Pod],
) -> None:
    # Root without rights may only because it is in the sidecar's group, and a pod may say that it shall not be.
    pod = client(CLIENT.replace("  initC", "  securityContext: {supplementalGroupsPolicy: Strict}\n  initC"))
    pod.start()
    said = pod.run_to_end("meshnet-init")
    assert "nothing changed" in said
    assert "ipv4: captured: the proxy answered" in said
    assert "which the rules fit" not in said

    pod.processes["meshnet-proxy"].kill()
    with pytest.raises(ConnectionRefusedError):
        asks_once(pod)
    assert "nothing changed" in pod.run_to_end("meshnet-init")
    pod.start_container("meshnet-proxy")  # in the same volumes, where its socket still is
    assert asks_once(pod) == "hello"
    assert pod.execute("meshnet-proxy", "meshnet", "status") == 0


def test_a_sidecar_whose_rules_vanish_is_not_ready_until_init_runs_again(client: Callable[..., Pod]) -> None:
    pod = client(CLIENT)
    pod.start()
    assert pod.probe("meshnet-proxy", "readinessProbe")
    pod.host.run("meshnet", "init", "remove", "--drain", "0s")
    wait_for(lambda: not pod.probe("meshnet-proxy", "readinessProbe"), what="a sidecar that is not ready")
    assert "in force (" in pod.run_to_end("meshnet-init")
    wait_for(lambda: pod.probe("meshnet-proxy", "readinessProbe"), what="a sidecar that is ready again")


def test_a_sidecar_that_is_passed_by_inbound_is_not_ready_until_init_runs_again(
    client: Callable[..., Pod], cluster: Cluster
) -> None:
    """What came in beside a sidecar is noticed by itself, too, whoever asks for its readiness and how."""
    pod = client(CLIENT.replace("{name: client}", "{name: client, annotations: {meshnet.dev/strict: 'false'}}"))
    pod.start()
    assert pod.probe("meshnet-proxy", "readinessProbe")
    pod.host.run("nft", "flush", "chain", "inet", "meshnet", "MESHNET_IN")
    with listening(pod.host, "ipv4", PORT) as app, cluster.node.connect(pod.host.address, PORT) as past:
        accepted, _ = app.accept()
        with accepted:
            past.sendall(b"in plain text")
            assert accepted.recv(13) == b"in plain text"
            wait_for(lambda: not pod.probe("meshnet-proxy", "startupProbe"), what="a sidecar that is not ready")
            assert pod.probe("meshnet-proxy", "livenessProbe")
    assert "in force (" in pod.run_to_end("meshnet-init")
    wait_for(lambda: pod.probe("meshnet-proxy", "readinessProbe"), what="a sidecar that is ready again")


@pytest.mark.parametrize(
    ("backend", "strict"), [("nft", "true"), ("nft", "false"), ("iptables", "true"), ("legacy", "true")]
)
def test_the_kubelet_proves_inbound_capture_each_time_it_asks_for_readiness(
    client: Callable[..., Pod], backend: str, strict: str
) -> None:
    manifest = CLIENT.replace("{name: client}", f"{{name: client, annotations: {{meshnet.dev/strict: '{strict}'}}}}")
    pod = client(manifest, "--backend", backend)
    pod.start()
    assert pod.probe("meshnet-proxy", "readinessProbe")
    (visits,) = capture_of(pod).visits
    assert (visits.family, visits.late) == ("ipv4", False)
    assert [each.result for each in capture_of(pod).proofs if each.direction == "inbound"] == ["captured"]
    if backend == "nft":
        pod.host.run("nft", "flush", "chain", "inet", "meshnet", "MESHNET_IN")
    else:
        pod.host.run(COMMANDS[backend], "-t", "nat", "-F", "MESHNET_IN")
    assert not pod.probe("meshnet-proxy", "readinessProbe")
    # To start it again would mend nothing, and what leaves is captured still.
    assert pod.probe("meshnet-proxy", "livenessProbe")
    assert pod.probe("meshnet-proxy", "startupProbe")
    assert pod.execute("meshnet-proxy", "meshnet", "status") == 0
    assert "in force (" in pod.run_to_end("meshnet-init")
    assert pod.probe("meshnet-proxy", "readinessProbe")
    assert '"inbound"' not in pod.processes["meshnet-proxy"].output  # it leaves no record


@pytest.mark.parametrize(
    "annotation", ["skip-inbound-ports: '1-65535'", "skip-inbound-cidrs: '0.0.0.0/0'"], ids=lambda text: text[5:18]
)
def test_where_no_application_is_captured_the_kubelet_s_question_is(
    client: Callable[..., Pod], cluster: Cluster, annotation: str
) -> None:
    manifest = CLIENT.replace("{name: client}", f"{{name: client, annotations: {{meshnet.dev/{annotation}}}}}")
    pod = client(manifest)
    pod.start()
    with listening(pod.host, "ipv4", PORT), cluster.node.connect(pod.host.address, PORT):
        pass  # in plain text, as the annotation says
    assert pod.probe("meshnet-proxy", "readinessProbe")
    pod.host.run("nft", "flush", "chain", "inet", "meshnet", "MESHNET_IN")
    assert not pod.probe("meshnet-proxy", "readinessProbe")


@pytest.mark.parametrize("backend", ["nft", "iptables", "legacy"])
def test_where_its_redirects_are_lost_a_pod_takes_and_sends_nothing_in_plain_text(
    client: Callable[..., Pod], cluster: Cluster, backend: str
) -> None:
    pod = client(CLIENT, "--backend", backend)
    pod.start()
    assert asks_once(pod) == "hello"
    for chain in ("MESHNET_IN", "MESHNET_OUT"):
        if backend == "nft":
            pod.host.run("nft", "flush", "chain", "inet", "meshnet", chain)
        else:
            pod.host.run(COMMANDS[backend], "-t", "nat", "-F", chain)
    ends = (cluster.node, pod.host), (pod.host, cluster.node)
    for source, target in ends:
        with listening(target, "ipv4", PORT) as app:
            with pytest.raises(ConnectionRefusedError):
                source.connect(target.address, PORT)
            app.setblocking(False)
            with pytest.raises(BlockingIOError):
                app.accept()
    assert "in force (" in pod.run_to_end("meshnet-init")
    assert asks_once(pod) == "hello"


def test_a_change_of_the_config_map_reaches_a_sidecar_that_runs(running: Pod) -> None:
    folder = running.volumes / "meshnet-config"
    files = {name: (folder / name).read_bytes() for name in ("meshnet.toml", "api.yaml")}
    more = files["api.yaml"].replace(b"name: api", b"name: more")
    more = more.replace(API.encode(), b"10.96.0.11").replace(API6.encode(), b"fd96::11")
    with pytest.raises(ProgramFailed):
        running.execute("app", "curl", "-sS", "--fail", f"http://10.96.0.11:{PORT}/")
    running.update("meshnet-config", files | {"more.yaml": more})
    wait_for(lambda: "mesh version 2" in running.processes["meshnet-proxy"].output)
    assert running.execute("app", "curl", "-sS", "--fail", f"http://10.96.0.11:{PORT}/") == 0
