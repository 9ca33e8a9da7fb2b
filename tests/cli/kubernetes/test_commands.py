"""`meshnet inject`, `uninject` and `install`, as somebody types them."""

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from meshnet.codec.mesh import read_mesh
from meshnet.codec.settings import load_settings
from meshnet.control.authority import Authority, save_issued
from meshnet_cli.kubernetes.manifests import read_documents
from meshnet_cli.main import main
from tests.cli.kubernetes.manifests import FOLDER, VERSIONS, container, pods, validate

POD = "apiVersion: v1\nkind: Pod\nmetadata: {name: one}\nspec: {containers: [{name: app, image: 'app:1'}]} # so\n"
MESH = """\
apiVersion: meshnet.dev/v1
kind: Service
metadata: {name: api}
spec:
  addresses: [10.96.0.10]
  ports: [{port: 8080}]
  endpoints: [{address: 10.1.0.1, tunnel: meshnet, identity: spiffe://prod/ns/shop/sa/api}]
"""


def meshnet(*arguments: object, stdin: str = "", code: int = 0) -> Result:
    done = CliRunner().invoke(main, list(map(str, arguments)), input=stdin, catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def documents(done: Result) -> list[Any]:
    return read_documents(done.stdout, "stdout")


def test_standard_input_is_the_default_and_what_was_done_goes_to_standard_error() -> None:
    done = meshnet("inject", stdin=POD)
    assert done.stderr == "Pod/one: injected\n"
    assert meshnet("inject", "-f", "-", stdin=POD).stdout == done.stdout
    again = meshnet("inject", stdin=done.stdout)
    assert (again.stdout, again.stderr) == (done.stdout, "Pod/one: nothing to change\n")
    out = meshnet("uninject", stdin=done.stdout)
    assert (documents(out), out.stderr) == (read_documents(POD, ""), "Pod/one: taken out\n")
    assert meshnet("uninject", stdin=POD).stderr == "Pod/one: nothing to change\n"


def test_what_is_left_out_for_its_version_is_told_and_nothing_else() -> None:
    old = "apiVersion: batch/v1beta1\nkind: CronJob\nmetadata: {name: old}\nspec: {jobTemplate: {spec: {template: "
    old += "{spec: {containers: [{name: a}]}}}}}\n"
    done = meshnet("inject", stdin=f"{POD}---\n{old}")
    assert done.stderr.splitlines() == [
        "Pod/one: injected",
        "CronJob/old (batch/v1beta1): left as it is, out of the mesh: not a kind and version that is looked into "
        "(meshnet inject --help)",
    ]
    assert documents(done)[1] == read_documents(old, "")[0]
    assert meshnet("inject", stdin=old).stderr.startswith("warning: there is no workload in it\n")


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_several_files_are_printed_one_after_the_other(form: str) -> None:
    names = ("statefulset", "disabled", "job")
    files = [part for name in names for part in ("-f", FOLDER / f"{name}.yaml")]
    done = meshnet("inject", "-o", form, *files)
    assert [each["kind"] for each in documents(done)] == ["StatefulSet", "Deployment", "Job"]
    assert done.stderr.splitlines() == [
        "StatefulSet/db: injected",
        "Deployment/gateway: left out, as its label meshnet.dev/inject says",
        "Job/import-: injected",
    ]


def test_a_diff_shows_what_is_changed_and_nothing_else() -> None:
    diff = meshnet("inject", "--diff", "-f", FOLDER / "multi-document.yaml").stdout
    assert diff.startswith(f"--- {FOLDER / 'multi-document.yaml'}\n+++ {FOLDER / 'multi-document.yaml'} (changed)\n@@ ")
    removed = [line for line in diff.splitlines()[2:] if line.startswith("-")]
    assert removed == ["-      annotations: null", "-      initContainers: []"]
    assert "+      - name: meshnet-init" in diff
    assert "quoted-letter" not in diff
    assert meshnet("inject", "--diff", stdin=meshnet("inject", stdin=POD).stdout).stdout == ""


def test_every_flag_reaches_the_pod() -> None:
    flags = ("--image", "mesh:2", "--config-map", "what", "--identity-secret", "who", "--backend", "legacy")
    (pod,) = pods(documents(meshnet("inject", "--no-native-sidecar", *flags, stdin=POD)))
    assert [each["name"] for each in pod["spec"]["containers"]] == ["meshnet-proxy", "app"]
    assert container(pod, "meshnet-init")["image"] == container(pod, "meshnet-proxy")["image"] == "mesh:2"
    assert container(pod, "meshnet-init")["securityContext"]["capabilities"]["add"] == ["NET_ADMIN", "NET_RAW"]
    assert pod["spec"]["volumes"][:2] == [
        {"name": "meshnet-config", "configMap": {"name": "what"}},
        {"name": "meshnet-identity", "secret": {"secretName": "who"}},
    ]


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "said"),
    [
        (["--config-map", "A"], POD, 2, "'A' is not the name of an object of Kubernetes"),
        (
            ["-f", "/nowhere.yaml"],
            "",
            78,
            "error: cannot be read: No such file or directory\nwhy: it is about /nowhere",
        ),
        ([], "a: [", 78, "error: not valid YAML: "),
        ([], POD.replace("spec: {", "spec: {hostNetwork: true, "), 78, "fix: leave it out with the label"),
        ([], POD.replace("spec: {", "spec: {hostNetwork: true, "), 78, "why: it is about standard input\n"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_printed(arguments: list[str], stdin: str, code: int, said: str) -> None:
    done = meshnet("inject", *arguments, stdin=stdin, code=code)
    assert said in done.stderr
    assert done.stdout == ""


def test_files_without_a_workload_pass_with_a_warning() -> None:
    done = meshnet("inject", stdin="apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n")
    assert done.stderr == "warning: there is no workload in it\n"
    assert documents(done) == [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}]


@pytest.fixture
def identity(tmp_path: Path) -> Path:
    """Of the service account web in shop."""
    now = datetime.now(UTC)
    issued = Authority.create("prod", now=now).issue("spiffe://prod/ns/shop/sa/web", now=now, ttl=timedelta(hours=1))
    save_issued(issued, tmp_path / "web")
    return tmp_path / "web"


def test_install_prints_what_pods_look_for(tmp_path: Path, identity: Path) -> None:
    mesh = tmp_path / "mesh.d"
    mesh.mkdir()
    (mesh / "api.yaml").write_text(MESH)
    (mesh / ".hidden.yaml").write_text("not YAML: [")
    (tmp_path / "meshnet.toml").write_text('[log]\nlevel = "debug"\n')
    arguments = ("--namespace", "shop", "--mesh", mesh, "--config", tmp_path / "meshnet.toml")
    done = documents(meshnet("install", *arguments, "--create-namespace", "--identity", f"web={identity}"))
    for version in VERSIONS:
        for each in done:
            validate(each, version)
    namespace, config, secret = done
    assert namespace["metadata"]["name"] == config["metadata"]["namespace"] == secret["metadata"]["namespace"] == "shop"
    assert load_settings(config["data"].pop("meshnet.toml"), {}).log.level == "debug"
    assert [each.name for each in read_mesh(config["data"].items(), 1).services] == ["api:8080"]
    assert {name: base64.b64decode(data) for name, data in secret["data"].items()} == {
        name: (identity / name).read_bytes() for name in ("cert.pem", "key.pem", "bundle.pem")
    }

    pod = POD.replace("spec: {", "spec: {serviceAccountName: web, ")
    (injected,) = pods(documents(meshnet("inject", stdin=pod)))
    volumes = {each["name"]: each for each in injected["spec"]["volumes"]}
    assert volumes["meshnet-config"]["configMap"]["name"] == config["metadata"]["name"]
    assert volumes["meshnet-identity"]["secret"]["secretName"] == secret["metadata"]["name"]


def test_install_without_anything_is_a_mesh_without_services() -> None:
    (config,) = documents(meshnet("install", "-o", "json"))
    assert (config["metadata"]["name"], config["data"]) == ("meshnet", {"meshnet.toml": ""})
    assert config["metadata"]["namespace"] == "default"


def test_install_refuses_what_a_sidecar_would_refuse(tmp_path: Path, identity: Path) -> None:
    bad, other = tmp_path / "bad.yaml", tmp_path / "other"
    bad.write_text(MESH.replace("port: 8080", "prt: 8080"))
    said = meshnet("install", "--mesh", bad, code=78).stderr
    assert "unknown field" in said
    assert f"it is in {bad}:6" in said

    toml = tmp_path / "bad.toml"
    toml.write_text("[proxy]\nmrk = 1\n")
    assert "unknown key" in meshnet("install", "--config", toml, code=78).stderr

    other.mkdir()
    assert "there is no *.yaml in it" in meshnet("install", "--mesh", other, code=78).stderr
    (other / "bad.yaml").write_text("")
    assert "two files are called bad.yaml" in meshnet("install", "--mesh", bad, "--mesh", other, code=78).stderr
    assert "cannot be read" in meshnet("install", "--identity", f"web={other}", code=78).stderr
    assert "web=./web-identity" in meshnet("install", "--identity", "web", code=2).stderr

    elsewhere = meshnet("install", "--namespace", "shop", "--identity", f"api={identity}", code=78).stderr
    assert "spiffe://prod/ns/shop/sa/web, not of the service account api in shop" in elsewhere
    assert "meshnet ca issue --namespace shop --service api" in elsewhere

    large = tmp_path / "large.yaml"
    large.write_text(MESH + "# " + "x" * (1 << 20))
    assert "do not fit into a ConfigMap" in meshnet("install", "--mesh", large, code=1).stderr
