"""What the pods of one namespace need beside themselves: a ConfigMap, and a Secret for each service account. Pure.

There is no more of meshnet in a cluster: nothing that runs there asks Kubernetes for anything, so no rights are given.
"""

import base64
from collections.abc import Mapping

from meshnet import __version__
from meshnet_cli.kubernetes.containers import IDENTITY
from meshnet_cli.kubernetes.manifests import Object

MOST_BYTES = 1 << 20
"""Of a ConfigMap (validation.go of kubernetes: MaxSecretSize, for both)."""

_LABELS = {
    "app.kubernetes.io/name": "meshnet",
    "app.kubernetes.io/part-of": "meshnet",
    "app.kubernetes.io/version": __version__,
}


def namespace(name: str) -> Object:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def config_map(name: str, namespace: str, files: Mapping[str, str]) -> Object:
    """Settings and mesh resources by file name."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace, "labels": dict(_LABELS)},
        "data": dict(files),
    }


def identity_secret(service_account: str, namespace: str, files: Mapping[str, bytes]) -> Object:
    """Where `meshnet inject` looks for it by default."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": f"{IDENTITY}-{service_account}", "namespace": namespace, "labels": dict(_LABELS)},
        "type": "Opaque",
        "data": {name: base64.b64encode(content).decode() for name, content in files.items()},
    }
