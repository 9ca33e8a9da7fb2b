"""The manifests of this folder, and what the tests ask about them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from meshnet.errors import ConfigError
from meshnet_cli.kubernetes.manifests import Object, read_documents
from meshnet_cli.kubernetes.wishes import Wishes
from meshnet_cli.kubernetes.workloads import inject

FOLDER = Path(__file__).parent / "manifests"
FILES = sorted(FOLDER.glob("*.yaml"))
NAMES = [file.stem for file in FILES]
VERSIONS = ("1.29", "1.37")  # the first with native sidecars by default, and the last that is known


def read(file: Path) -> list[object]:
    return read_documents(file.read_text(), file.name)


def injected(documents: list[object], **wishes: Any) -> list[object]:
    return inject(documents, Wishes(**wishes), "deploy.yaml")[0]


def pods(value: object) -> Iterator[Object]:
    """Every pod's template with the sidecar in it, wherever it is."""
    if isinstance(value, dict):
        if "meshnet.dev/injected-version" in ((value.get("metadata") or {}).get("annotations") or {}):
            yield value
        for each in value.values():
            yield from pods(each)
    elif isinstance(value, list):
        for each in value:
            yield from pods(each)


def container(pod: Object, name: str) -> Object:
    every = (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"])
    return next(each for each in every if each["name"] == name)


def environment(container: Object) -> dict[str, str]:
    """As a kubelet sets it, but for what comes from elsewhere."""
    return {each["name"]: each["value"].replace("$$", "$") for each in container["env"] if "value" in each}


def validate(document: object, version: str) -> None:
    """Against the schemas of Kubernetes, unknown fields refused. Raises ValidationError."""
    assert isinstance(document, dict)
    if document["kind"] == "List":
        for item in document["items"]:
            validate(item, version)
    elif "example/" not in document["apiVersion"]:  # a custom resource's schema is its owner's
        kubernetes_validate.validate(document, version, strict=True)


def refusal(*documents: Object, **wishes: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        inject(list(documents), Wishes(**wishes), "deploy.yaml")
    return caught.value


def a_pod(name: str = "app", **more: object) -> Object:
    containers = [{"name": name, "image": "app:1", **more}]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": {"containers": containers}}


def with_spec(**more: object) -> Object:
    pod = a_pod()
    pod["spec"] |= more
    return pod
