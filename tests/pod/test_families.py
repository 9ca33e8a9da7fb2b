"""Pods of IPv6 alone, and of both families with IPv6 first: what test_pod.py shows in IPv4, which is first there."""

from collections.abc import Callable
from contextlib import closing

import pytest

from tests.init.kernel import listening
from tests.pod.caller import Caller, asks_once
from tests.pod.conftest import PORT, PROBED, Cluster, client_manifest, need_truthful_probes
from tests.pod.kubelet import Pod
from tests.world import ProgramFailed, wait_for

pytestmark = [
    pytest.mark.netns,
    pytest.mark.parametrize("_cluster", [("ipv6",), ("ipv6", "ipv4")], ids=["ipv6-only", "dual-stack"], indirect=True),
]


@pytest.fixture
def started(cluster: Cluster, server: Pod) -> Pod:
    """A pod of its own that has called the service in each family."""
    pod = cluster.client(client_manifest(*cluster.apis))
    pod.start()
    return pod


def test_what_starts_in_the_pod_finds_the_mesh_in_each_family(started: Pod, server: Pod, cluster: Cluster) -> None:
    assert started.started == ["meshnet-init", "meshnet-proxy", "fetch", "app"]
    app = started.processes["app"]
    wait_for(lambda: app.output == "hello" * len(cluster.apis))
    by_client = f'"source":{{"address":"[{started.address}]:'  # the tunnel is of the family of the service's endpoint

    def served() -> list[str]:
        lines = server.processes["meshnet-proxy"].output.splitlines()
        return [line for line in lines if by_client in line and '"inbound"' in line]

    wait_for(lambda: len(served()) == 2 * len(cluster.apis))
    assert all('"identity":"spiffe://mesh.example/ns/default/sa/client"' in line for line in served())


def test_what_comes_in_is_captured_in_each_family(server: Pod, cluster: Cluster) -> None:
    for family in cluster.families:
        # In strict mode it is reset, perhaps before connect() has returned.
        with (
            pytest.raises(ConnectionResetError),
            cluster.node.connect(cluster.address(server.host, family), PORT) as plain,
        ):
            plain.recv(1)
        host = cluster.address(cluster.node, family)
        source = f'"address":"[{host}]:' if ":" in host else f'"address":"{host}:'

        def told(source: str = source) -> bool:
            lines = server.processes["meshnet-proxy"].output.splitlines()
            return any(source in line and '"authn.plaintext"' in line for line in lines)

        wait_for(told, what=f"a record of {host}")


def test_rules_that_vanish_are_noticed_by_the_kubelet_and_nothing_passes(
    client: Callable[..., Pod], cluster: Cluster
) -> None:
    pod = client(client_manifest(*cluster.apis))
    pod.start()
    assert pod.probe("meshnet-proxy", "readinessProbe")
    for chain in ("MESHNET_IN", "MESHNET_OUT"):
        pod.host.run("nft", "flush", "chain", "inet", "meshnet", chain)
    assert not pod.probe("meshnet-proxy", "readinessProbe")
    assert pod.probe("meshnet-proxy", "livenessProbe")
    for family in cluster.families:
        with listening(pod.host, family, PORT), pytest.raises(ConnectionRefusedError):
            cluster.node.connect(cluster.address(pod.host, family), PORT)
        with listening(cluster.node, family, PORT), pytest.raises(ConnectionRefusedError):
            pod.host.connect(cluster.address(cluster.node, family), PORT)
    assert "in force (" in pod.run_to_end("meshnet-init")
    wait_for(lambda: pod.probe("meshnet-proxy", "readinessProbe"), what="a sidecar that is ready again")
    assert [asks_once(pod, api) for api in cluster.apis] == ["hello"] * len(cluster.apis)


def test_nothing_leaves_before_the_sidecar_is_there(client: Callable[..., Pod], cluster: Cluster) -> None:
    pod = client(client_manifest(*cluster.apis))
    said = pod.run_to_end("meshnet-init")
    for family in cluster.families:
        assert f"{family}: captured" in said
    with pytest.raises(ProgramFailed, match="onnect to server"):
        pod.run_to_end("fetch")


def test_probes_of_each_shape_tell_the_truth(client: Callable[..., Pod]) -> None:
    need_truthful_probes(client(PROBED))


def test_sigterm_with_the_application_still_calling_out(started: Pod, cluster: Cluster) -> None:
    sidecar = started.processes["meshnet-proxy"]
    api = cluster.apis[0]
    with closing(Caller(started, api)) as first:
        assert first.asks() == "hello"
        started.asked_to_end("meshnet-proxy")
        wait_for(lambda: not started.probe("meshnet-proxy", "readinessProbe"))
        with closing(Caller(started, api)) as second:
            asked = [first.asks(), second.asks(), *(asks_once(started, each) for each in cluster.apis)]
            assert set(asked) == {"hello"}
    assert sidecar.popen.wait(10) == 0
