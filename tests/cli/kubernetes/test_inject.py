"""The sidecar in the pods of a manifest: what Kubernetes takes, what the sidecar takes, and nothing else changed."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnet import __version__
from meshnet.codec.probes import read_checks
from meshnet.codec.settings import load_settings
from meshnet.errors import ConfigError
from meshnet.model.canary import INBOUND_CANARY
from meshnet.model.probe import GrpcCheck, HttpCheck, TcpCheck
from meshnet_cli.kubernetes.manifests import Object, read_documents, write_documents
from meshnet_cli.kubernetes.wishes import ANNOTATIONS, Wishes
from meshnet_cli.kubernetes.workloads import inject, uninject
from meshnet_init.plan import Host, make_plan
from meshnet_init.rule import captures
from meshnet_init.sidecar import captured_inbound
from tests.cli.kubernetes.manifests import (
    FILES,
    FOLDER,
    NAMES,
    VERSIONS,
    a_pod,
    container,
    environment,
    injected,
    pods,
    read,
    refusal,
    validate,
    with_spec,
)

GOLDEN = Path(__file__).parent / "golden"
every_file = pytest.mark.parametrize("file", FILES, ids=NAMES)


@pytest.mark.parametrize("version", VERSIONS)
@every_file
def test_kubernetes_takes_it(file: Path, version: str) -> None:
    for before, after in zip(read(file), injected(read(file)), strict=True):
        validate(before, version)
        validate(after, version)


@every_file
def test_twice_is_once_and_taken_out_is_as_before(file: Path) -> None:
    before = read(file)
    once = injected(before)
    assert before == read(file), "what was given is as it was"
    assert write_documents(injected(once), "yaml") == write_documents(once, "yaml")
    assert injected(injected(once, image="other:1", native_sidecar=True, config_map="other")) == once
    assert without_nothing(uninject(once, "")[0]) == without_nothing(before)
    assert uninject(before, "")[0] == before
    assert read_documents(write_documents(once, "json"), "") == once


def without_nothing(value: object) -> object:
    """Without fields that say nothing: whether a list is empty or not there is the same to Kubernetes."""
    if isinstance(value, dict):
        return {key: without_nothing(each) for key, each in value.items() if each not in (None, [])}
    return [without_nothing(each) for each in value] if isinstance(value, list) else value


@every_file
def test_rules_and_sidecar_get_the_same_settings_and_take_them(file: Path) -> None:
    for pod in pods(injected(read(file))):
        init, proxy = environment(container(pod, "meshnet-init")), environment(container(pod, "meshnet-proxy"))
        assert init.pop("XTABLES_LOCKFILE") == "/run/meshnet/xtables.lock"
        assert init == proxy
        found = load_settings("", proxy)
        assert found.capture.gid == container(pod, "meshnet-proxy")["securityContext"]["runAsGroup"]
        plan = make_plan(found, Host())
        assert captures(plan.rules, "192.0.2.1", 80)
        asked = container(pod, "meshnet-proxy")["readinessProbe"]["httpGet"]["port"]
        assert all(captured_inbound(plan.rules, asked, source) for source in INBOUND_CANARY.values())
        assert {rule.gid for rule in plan.rules} >= {found.capture.gid}


def test_the_readme_says_how_long_a_kubelet_takes_to_believe_that_rules_are_gone() -> None:
    (pod,) = pods(injected(read(FOLDER / "deployment.yaml")))
    probe = container(pod, "meshnet-proxy")["readinessProbe"]
    period, failures = probe["periodSeconds"], probe.get("failureThreshold", 3)
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    assert f"{period * (failures - 1)} to {period * failures} seconds" in " ".join(readme.split())


@every_file
def test_only_the_init_container_has_a_right(file: Path) -> None:
    for pod in pods(injected(read(file))):
        rights = {name: container(pod, name)["securityContext"] for name in ("meshnet-init", "meshnet-proxy")}
        legacy = "backend" in str(pod["metadata"])
        assert rights["meshnet-init"]["capabilities"] == {
            "add": ["NET_ADMIN", "NET_RAW"] if legacy else ["NET_ADMIN"],
            "drop": ["ALL"],
        }
        assert rights["meshnet-proxy"]["capabilities"] == {"drop": ["ALL"]}
        for context in rights.values():
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is context["privileged"] is False
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        # Whatever the pod says of all its containers.
        assert (rights["meshnet-init"]["runAsUser"], rights["meshnet-init"]["runAsNonRoot"]) == (0, False)
        assert (rights["meshnet-proxy"]["runAsUser"], rights["meshnet-proxy"]["runAsNonRoot"]) == (15137, True)


@pytest.mark.parametrize("name", ["deployment", "job", "ordinary-sidecar"])
def test_golden(name: str) -> None:
    text = write_documents(injected(read(FOLDER / f"{name}.yaml")), "yaml")
    assert text.replace(__version__, "VERSION") == (GOLDEN / f"{name}.yaml").read_text()


def test_a_native_sidecar_is_before_every_init_container_and_an_ordinary_one_holds_the_application_back() -> None:
    (native,) = pods(injected(read(FOLDER / "pod-with-init-containers.yaml")))
    names = [each["name"] for each in native["spec"]["initContainers"]]
    assert names == ["meshnet-init", "meshnet-proxy", "wait-for-db", "vault", "tail"]
    assert container(native, "meshnet-proxy")["restartPolicy"] == "Always"
    assert container(native, "meshnet-proxy")["startupProbe"]["httpGet"] == {"path": "/readyz", "port": 15120}
    assert native["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"] == "fetch"
    assert native["metadata"]["annotations"]["kubectl.kubernetes.io/default-logs-container"] == "parse"

    (ordinary,) = pods(injected(read(FOLDER / "ordinary-sidecar.yaml")))
    assert [each["name"] for each in ordinary["spec"]["initContainers"]] == ["fetch", "meshnet-init"]
    assert [each["name"] for each in ordinary["spec"]["containers"]] == ["meshnet-proxy", "app"]
    hooks = container(ordinary, "meshnet-proxy")["lifecycle"]
    assert hooks["postStart"]["exec"]["command"][:2] == ["meshnet", "wait"]
    assert "restartPolicy" not in container(ordinary, "meshnet-proxy")


def test_probes_ask_the_relay_what_they_asked_the_container() -> None:
    (pod,) = pods(injected(read(FOLDER / "deployment.yaml")))
    assert read_checks(environment(container(pod, "meshnet-proxy"))["MESHNET_PROBES__CHECKS"]) == {
        "web/startupz": HttpCheck(port=8080, path="/start"),
        "web/livez": TcpCheck(port=8080),
        "web/readyz": HttpCheck(
            port=8080,
            path="/ready?deep=1&price=$(POD_IP)",
            headers=(("Host", "shop.example"), ("X-Probe", "kubelet")),
            timeout=4,
        ),
    }
    web, cache = container(pod, "web"), container(pod, "cache")
    relayed = {"path": "/web/readyz", "port": 15121}
    assert web["readinessProbe"] == {"httpGet": relayed, "timeoutSeconds": 4, "successThreshold": 2}
    assert web["livenessProbe"] == {"httpGet": {"path": "/web/livez", "port": 15121}, "initialDelaySeconds": 5}
    assert cache["livenessProbe"] == {"exec": {"command": ["cache-cli", "ping"]}}


def test_probes_of_every_sort_and_place() -> None:
    def checks(name: str) -> Any:
        (pod,) = pods(injected(read(FOLDER / f"{name}.yaml")))
        return read_checks(environment(container(pod, "meshnet-proxy")).get("MESHNET_PROBES__CHECKS", ""))

    assert checks("grpc") == {
        "quotes/readyz": GrpcCheck(port=9000, service="quotes.v1.Quotes", timeout=2),
        "quotes/livez": GrpcCheck(port=9000),
    }
    assert checks("daemonset") == {"agent/livez": HttpCheck(port=2020, path="/api/health", scheme="HTTPS")}
    assert checks("statefulset") == {"postgres/livez": TcpCheck(port=5432)}
    assert checks("pod-with-init-containers") == {"tail/startupz": HttpCheck(port=9901, path="/up")}
    assert checks("ordinary-sidecar") == {"app/livez": HttpCheck(port=80)}
    # That one asks another host.
    assert checks("from-the-cluster") == {}


@pytest.mark.parametrize(
    ("asked", "path"),
    [("healthz", "/healthz"), ("/a b/ü#x", "/a%20b/%C3%BC"), ("", "/"), ("//x", "//x"), ("/%41?q=%20", "/%41?q=%20")],
)
def test_a_path_is_asked_for_as_a_kubelet_would(asked: str, path: str) -> None:
    (pod,) = pods(injected([a_pod(livenessProbe={"httpGet": {"path": asked, "port": 80}})]))
    checks = read_checks(environment(container(pod, "meshnet-proxy"))["MESHNET_PROBES__CHECKS"])
    assert checks == {"app/livez": HttpCheck(port=80, path=path)}


@pytest.mark.parametrize(
    ("grace", "drain"), [(None, "25s"), (60, "55s"), (10, "5s"), (5, "2s"), (2, "1s"), (1, "0s"), (0, "0s")]
)
def test_the_drain_ends_before_the_pod_is_killed(grace: int | None, drain: str) -> None:
    pod = a_pod()
    pod["spec"]["terminationGracePeriodSeconds"] = grace
    (native,) = pods(injected([pod]))
    assert environment(container(native, "meshnet-proxy"))["MESHNET_PROXY__DRAIN_TIMEOUT"] == drain
    (ordinary,) = pods(injected([pod], native_sidecar=False))
    proxy = container(ordinary, "meshnet-proxy")
    stay = int(proxy["lifecycle"]["preStop"]["exec"]["command"][1])
    within = int(environment(proxy)["MESHNET_PROXY__DRAIN_TIMEOUT"].removesuffix("s"))
    assert stay + within <= (30 if grace is None else grace)


def test_annotations_become_settings() -> None:
    pod = a_pod()
    pod["metadata"]["annotations"] = {
        "meshnet.dev/skip-inbound-ports": "22,8000-8100",
        "meshnet.dev/skip-inbound-cidrs": "10.0.0.0/8",
        "meshnet.dev/skip-outbound-ports": "5432",
        "meshnet.dev/skip-outbound-cidrs": "169.254.169.254,fd00::/8",
        "meshnet.dev/skip-gids": "1000,2000",
        "meshnet.dev/backend": "iptables",
        "meshnet.dev/strict": "false",
        "meshnet.dev/drop-invalid": "false",
        "meshnet.dev/log-level": "debug",
        "meshnet.dev/drain-seconds": "7",
        "meshnet.dev/identity-secret": "who",
        "meshnet.dev/config-map": "what",
        "meshnet.dev/proxy-cpu-request": "0.2",
        "meshnet.dev/proxy-cpu-limit": "1",
        "meshnet.dev/proxy-memory-request": "100Mi",
        "meshnet.dev/proxy-memory-limit": "1Gi",
        "meshnet.dev/native-sidecar": "true",
    }
    assert {name.removeprefix("meshnet.dev/") for name in pod["metadata"]["annotations"]} == set(ANNOTATIONS)
    (after,) = pods(injected([pod], native_sidecar=False, settings={"MESHNET_CAPTURE__BACKEND": "legacy"}))
    proxy = container(after, "meshnet-proxy")
    found = load_settings("", environment(proxy))
    capture = found.capture
    assert (capture.exclude_inbound_ports, capture.exclude_inbound_cidrs) == (("22", "8000-8100"), ("10.0.0.0/8",))
    assert (capture.exclude_outbound_ports, capture.exclude_gids) == (("5432",), ("1000", "2000"))
    assert capture.exclude_outbound_cidrs == ("169.254.169.254", "fd00::/8")
    assert capture.required
    assert not capture.strict
    assert not capture.drop_invalid
    assert (capture.backend, found.log.level, found.proxy.drain_timeout) == ("iptables", "debug", "7s")
    assert proxy["resources"] == {
        "requests": {"cpu": "0.2", "memory": "100Mi"},
        "limits": {"cpu": "1", "memory": "1Gi"},
    }
    volumes = {each["name"]: each for each in after["spec"]["volumes"]}
    assert volumes["meshnet-identity"]["secret"] == {"secretName": "who"}
    assert volumes["meshnet-config"]["configMap"] == {"name": "what"}
    assert container(after, "meshnet-init")["securityContext"]["capabilities"]["add"] == ["NET_ADMIN"]


@pytest.mark.parametrize(
    ("field", "account"), [("serviceAccountName", "web"), ("serviceAccount", "old"), ("", "default")]
)
def test_the_identity_is_that_of_the_service_account(field: str, account: str) -> None:
    pod = a_pod()
    pod["spec"] |= {field: account} if field else {}
    (after,) = pods(injected([pod]))
    assert f"meshnet-identity-{account}" in str(after["spec"]["volumes"])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("skip-inbound-ports", "http", '"http" is not a port such as 8080 or a range such as 8000-8100'),
        ("skip-inbound-ports", "*", '"*" is not a port'),
        ("skip-inbound-ports", "", "it names nothing (leave the annotation out)"),
        ("skip-outbound-ports", "1,70000", '"70000" is not a port'),
        ("skip-outbound-ports", "a,1,b", '"b" is not a port such as 8080 or a range such as 8000-8100'),
        ("skip-gids", ",", "it names nothing"),
        ("log-level", "debug,info", '"debug,info" is not one of'),
        ("skip-outbound-cidrs", "10.0.0.1/8", '"10.0.0.1/8" is not a network'),
        ("skip-outbound-cidrs", "10.0.0.0/8 -j ACCEPT", "is not a network"),
        ("skip-gids", "vault", '"vault" is not an id'),
        ("backend", "ipfw", '"ipfw" is not one of'),
        ("log-level", "warn", '"warn" is not one of'),
        ("drain-seconds", "10s", '"10s" is not a number of seconds such as 25 (write digits only)'),
        ("drain-seconds", "31", "31 seconds are more than the pod has to end, 30 (raise terminationGracePeriodSeconds"),
        ("native-sidecar", "yes", '"yes" is neither true nor false'),
        ("proxy-cpu-request", "many", '"many" is not a quantity'),
        ("proxy-memory-limit", "1Mi", "1Mi is less than the 64Mi that the sidecar requests"),
        ("identity-secret", "A_B", '"A_B" is not the name of an object'),
        ("config-map", "-x", '"-x" is not the name of an object'),
        ("skip-inbound-port", "80", 'unknown annotation (did you mean "skip-inbound-ports"?)'),
        ("inject", "disabled", "this is a label, not an annotation (move it to metadata.labels)"),
        ("drain-seconds", 5, "an annotation is text (write it in quotes)"),
    ],
)
def test_a_wrong_annotation_is_told_with_document_and_field(name: str, value: object, said: str) -> None:
    (deployment,) = read_documents((FOLDER / "multi-document.yaml").read_text().rpartition("---")[2], "")
    assert isinstance(deployment, dict)
    deployment["spec"]["template"]["metadata"]["annotations"] = {f"meshnet.dev/{name}": value}
    error = refusal(deployment)
    place = f"spec.template.metadata.annotations.meshnet.dev/{name}"
    assert str(error).startswith(f"deploy.yaml: Deployment/small: {place}: ")
    assert said in str(error)


@pytest.mark.parametrize(
    ("pod", "said"),
    [
        (with_spec(hostNetwork=True), "spec.hostNetwork: the pod has the node's network: its rules would capture"),
        (with_spec(os={"name": "windows"}), "spec.os.name: the rules are Linux's"),
        (with_spec(nodeSelector={"kubernetes.io/os": "windows"}), "spec.nodeSelector.kubernetes.io/os: the rules are"),
        (a_pod(ports=[{"containerPort": 15121}]), "spec.containers[0].ports[0].containerPort: 15121 is the sidecar's"),
        (a_pod(ports=[{"containerPort": 15124}]), "spec.containers[0].ports[0].containerPort: 15124 is the sidecar's"),
        (a_pod("meshnet-proxy"), "spec.containers[0].name: there is a container meshnet-proxy already"),
        (a_pod("istio-proxy"), "spec.containers[0].name: the pod is in another mesh, Istio"),
        (with_spec(volumes=[{"name": "meshnet-run"}]), "spec.volumes[0].name: meshnet-run is the sidecar's own"),
        (
            a_pod(livenessProbe={"httpGet": {"port": "http"}}, ports=[{"name": "web", "containerPort": 80}]),
            'spec.containers[0].livenessProbe.httpGet.port: "http" is no port of this container (its ports: web)',
        ),
        (a_pod(livenessProbe={"tcpSocket": {"port": 0}}), '"0" is no port of this container (name one among its ports'),
        (
            a_pod(readinessProbe={"httpGet": {"port": 1, "httpHeaders": [{"name": "a b", "value": ""}]}}),
            "spec.containers[0].readinessProbe.httpGet: 'a b' is not the name of a header",
        ),
        (a_pod(livenessProbe={"httpGet": {}}), "spec.containers[0].livenessProbe.httpGet: Object missing"),
        (with_spec(containers=[]), "spec.containers: Expected array of length >= 1"),
        ({"apiVersion": "v1", "kind": "Pod", "spec": 3}, "Pod/(no name): spec: Expected object, got int"),
        ({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}}, "spec.template: Object missing"),
    ],
)
def test_what_cannot_be_in_the_mesh_is_refused_with_the_reason(pod: Object, said: str) -> None:
    assert said in str(refusal(pod))


def test_trap_17_a_pod_of_the_host_s_network_is_left_out_by_its_label() -> None:
    workload: Any
    (workload,) = read(FOLDER / "disabled.yaml")
    assert injected([workload]) == [workload]
    labels = workload["spec"]["template"]["metadata"]["labels"]
    workload["metadata"]["labels"] = {"meshnet.dev/inject": labels.pop("meshnet.dev/inject")}
    assert injected([workload]) == [workload]
    labels["meshnet.dev/inject"] = "off"
    assert '"off" is neither enabled nor disabled' in str(refusal(workload))


def test_trap_8_a_container_in_the_sidecar_s_group_would_pass_by_the_mesh_and_is_refused() -> None:
    group = {"securityContext": {"runAsGroup": 15137}}
    said = "securityContext.runAsGroup: 15137 is the sidecar's group: the rules would let the application pass by"
    assert f"Pod/one: spec.{said}" in str(refusal(with_spec(**group)))
    assert f"Pod/one: spec.containers[0].{said}" in str(refusal(a_pod(**group)))


def test_trap_7_a_job_with_an_ordinary_sidecar_would_never_end_and_is_refused() -> None:
    for name in ("job", "cronjob"):
        (document,) = read(FOLDER / f"{name}.yaml")
        assert isinstance(document, dict)
        assert "a job with an ordinary sidecar never ends" in str(refusal(document, native_sidecar=False))


def test_what_would_make_pods_and_is_not_known_is_told() -> None:
    template = {"template": {"spec": {"containers": [{"name": "app"}]}}}
    cron = {"apiVersion": "batch/v1beta1", "kind": "CronJob", "metadata": {"name": "old"}}
    cron["spec"] = {"jobTemplate": {"spec": template}}  # type: ignore[assignment]  # of any sort
    rollout = {"apiVersion": "rollouts.example/v1", "kind": "Rollout", "metadata": {"name": "web"}, "spec": template}
    empty = {"apiVersion": "rollouts.example/v1", "kind": "Rollout", "spec": {"template": {"spec": {"containers": []}}}}
    documents = [a_pod(), {"kind": "List", "apiVersion": "v1", "items": [cron, rollout, empty]}]
    changed, told = inject(documents, Wishes(), "")
    assert changed[1] == documents[1]
    assert [(each.name, each.what) for each in told] == [
        ("Pod/one", "injected"),
        ("CronJob/old (batch/v1beta1)", "unknown"),
        ("Rollout/web (rollouts.example/v1)", "unknown"),
    ]
    assert [each.name for each in uninject(changed, "")[1]] == ["Pod/one"]


def test_every_problem_of_every_document_is_told_at_once() -> None:
    first, second = a_pod(ports=[{"containerPort": 15101}]), with_spec(hostNetwork=True)
    second["metadata"] = {"name": "two", "annotations": {"meshnet.dev/nope": "1"}}
    lines = str(refusal(first, second)).splitlines()
    assert [re.split(": ", line)[1] for line in lines] == ["Pod/one", "Pod/two", "Pod/two"]


def test_an_older_version_or_other_wishes_are_replaced() -> None:
    old = injected([a_pod(livenessProbe={"tcpSocket": {"port": 80}})], image="meshnet:0.0.1", native_sidecar=False)
    (pod,) = pods(old)
    pod["metadata"]["annotations"]["meshnet.dev/injected-version"] = "0.0.1"
    assert injected(old) == injected([a_pod(livenessProbe={"tcpSocket": {"port": 80}})])


def test_a_probe_that_was_changed_since_stays_as_it_is() -> None:
    once = injected([a_pod(livenessProbe={"tcpSocket": {"port": 80}})])
    (pod,) = pods(once)
    changed = {"httpGet": {"path": "/new", "port": 81}}
    container(pod, "app")["livenessProbe"] = changed
    (out,) = uninject(once, "")[0]
    assert isinstance(out, dict)
    assert container(out, "app")["livenessProbe"] == changed
    (again,) = pods(injected(once))
    assert "/new" in environment(container(again, "meshnet-proxy"))["MESHNET_PROBES__CHECKS"]


def test_a_spoilt_annotation_of_ours_keeps_nobody_from_taking_the_sidecar_out() -> None:
    once = injected([a_pod()])
    (pod,) = pods(once)
    for text in ("{", 5, None):
        pod["metadata"]["annotations"]["meshnet.dev/original"] = text
        out: Any
        (out,) = uninject(once, "")[0]
        assert (out["spec"], list(pods(out))) == (a_pod()["spec"], [])


_NAMES = st.sampled_from([f"meshnet.dev/{name}" for name in ANNOTATIONS])
_SOME = st.sampled_from(["80", "10.0.0.0/8", "1", "true", "nft", "debug", "64Mi", "", "*", "$(X)"]) | st.text()


@given(st.dictionaries(_NAMES, _SOME, max_size=4))
@settings(max_examples=150)
def test_no_annotation_does_more_than_be_refused(annotations: dict[str, str]) -> None:
    pod = a_pod(livenessProbe={"tcpSocket": {"port": 80}})
    pod["metadata"]["annotations"] = annotations
    try:
        (after,) = pods(injected([pod]))
    except ConfigError as error:
        assert "Pod/one: metadata.annotations.meshnet.dev/" in str(error)  # noqa: PT017  # good ones raise nothing
    else:
        load_settings("", environment(container(after, "meshnet-proxy")))


def _paths(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    steps: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for step, each in steps for inner in _paths(each, (*path, step)))]


_WHOLE = [document for file in FILES for document in read(file)]
_PLACES = [(index, path) for index, document in enumerate(_WHOLE) for path in _paths(document) if path]
_ODD = st.sampled_from([None, 0, -1, "x", "", True, [], {}, [None], [{}]])


@given(st.sampled_from(_PLACES), _ODD)
@settings(max_examples=300)
def test_no_manifest_does_more_than_be_refused(place: tuple[int, tuple[Any, ...]], odd: object) -> None:
    index, path = place
    document: Any = copy.deepcopy(_WHOLE[index])
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = odd
    try:
        once = injected([document])
    except ConfigError as error:
        assert str(error)  # noqa: PT017  # most are taken
    else:
        assert injected(once) == once
        uninject(once, "")
