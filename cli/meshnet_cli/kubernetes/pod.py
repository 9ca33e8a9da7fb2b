"""One pod: the sidecar put in, refused, or taken out again. Pure.

Putting in takes out first what an older version or other wishes have left, so that twice is the same as once. What a
manifest needs to become what it was is kept in an annotation.
"""

from collections.abc import Iterator, Mapping

import msgspec

from meshnet import __version__
from meshnet.codec.problem import Path, Problem
from meshnet.model.probe import Check
from meshnet_cli.kubernetes import containers, probes
from meshnet_cli.kubernetes.containers import GID, INIT, OWN_PORTS, PROXY, VOLUMES
from meshnet_cli.kubernetes.manifests import Object
from meshnet_cli.kubernetes.quantity import RESOURCES, amount, granted, requested
from meshnet_cli.kubernetes.wishes import INJECTED_VERSION, ORIGINAL, STATUS, Wishes, with_annotations

_DEFAULT_CONTAINER = ("kubectl.kubernetes.io/default-container", "kubectl.kubernetes.io/default-logs-container")
_OTHER_MESHES = {
    "istio-proxy": "Istio",
    "linkerd-proxy": "Linkerd",
    "consul-dataplane": "Consul",
    "kuma-sidecar": "Kuma",
}
_OS = "kubernetes.io/os"  # of a node
_DEFAULT_GRACE = 30  # seconds; PodSpec.terminationGracePeriodSeconds


class _Original(msgspec.Struct, frozen=True):
    """What taking out needs to know: handlers of probes by their checks' names, and annotations that we have added."""

    probes: dict[str, Object] = {}
    annotations: tuple[str, ...] = ()


def injected(pod: Object, path: Path, wishes: Wishes, *, ends: bool) -> tuple[Object, list[Problem]]:
    """A pod or template with metadata and spec, with the sidecar in it; with problems it is of no use.

    `path` leads to it in its document. `ends`: it is a job's, which is over when all its ordinary containers are.
    """
    pod = taken_out(pod)
    metadata, spec = dict(pod.get("metadata") or {}), dict(pod["spec"])
    annotations: Object = dict(metadata.get("annotations") or {})
    wishes, problems = with_annotations(wishes, annotations, (*path, "metadata", "annotations"))
    problems += _refusals(spec, (*path, "spec"))
    problems += _end_problems(spec, path, wishes, ends)
    if problems:
        return pod, problems

    # What is empty is as if it were not there, and does not come back when the sidecar is taken out.
    spec = {field: value for field, value in spec.items() if value or field not in ("initContainers", "volumes")}
    handlers: dict[str, Object] = {}
    checks: dict[str, Check] = {}
    for field in ("initContainers", "containers"):
        changed = []
        for index, container in enumerate(spec.get(field) or ()):
            after, found, wrong = probes.turned(container, (*path, "spec", field, index))
            changed.append(after)
            problems += wrong
            checks |= {name: check for name, (check, _) in found.items()}
            handlers |= {name: handler for name, (_, handler) in found.items()}
        spec[field] = changed

    _put_in(spec, wishes, checks)
    problems += _outgrown(spec, wishes, (*path, "spec"))
    app = next(each["name"] for each in spec["containers"] if each["name"] != PROXY)
    added = {name: app for name in _DEFAULT_CONTAINER if name not in annotations}
    original = _Original(probes=handlers, annotations=tuple(added))
    metadata["annotations"] = annotations | added | {INJECTED_VERSION: __version__, ORIGINAL: _written(original)}
    return {**pod, "metadata": metadata, "spec": spec}, problems


def taken_out(pod: Object) -> Object:
    """The pod as it was before anything was put in; itself if nothing was."""
    metadata = dict(pod.get("metadata") or {})
    annotations: Object = dict(metadata.get("annotations") or {})
    if INJECTED_VERSION not in annotations:
        return pod
    original = _read(annotations.get(ORIGINAL))
    for name in (*STATUS, *original.annotations):
        annotations.pop(name, None)
    metadata["annotations"] = annotations
    if not annotations:
        del metadata["annotations"]
    spec = dict(pod["spec"])
    for field in ("initContainers", "containers"):
        kept = [each for each in spec.get(field) or () if each.get("name") not in (INIT, PROXY)]
        spec[field] = [probes.turned_back(each, original.probes) for each in kept]
    spec["volumes"] = [each for each in spec.get("volumes") or () if each.get("name") not in VOLUMES]
    for field in ("initContainers", "volumes"):
        if not spec[field]:
            del spec[field]
    whole = {**pod, "metadata": metadata, "spec": spec}
    if not metadata:
        del whole["metadata"]
    return whole


def is_injected(pod: Object) -> bool:
    return INJECTED_VERSION in ((pod.get("metadata") or {}).get("annotations") or {})


def _put_in(spec: Object, wishes: Wishes, checks: Mapping[str, Check]) -> None:
    grace = _grace(spec)
    left = grace if wishes.native_sidecar else grace - containers.stays(grace)
    drain = wishes.drain if wishes.drain is not None else containers.drain_within(left)
    env = containers.environment(wishes, checks, drain)
    init = containers.init_container(wishes, env)
    proxy = containers.proxy_container(wishes, env, grace)
    if wishes.native_sidecar:
        # First of all, so that the init containers behind it have the network, through the mesh (istio#11130).
        spec["initContainers"] = [init, proxy, *spec["initContainers"]]
    else:
        # Last, so that those before it have the network, as if there were no mesh.
        spec["initContainers"] = [*spec["initContainers"], init]
        spec["containers"] = [proxy, *spec["containers"]]
    account = spec.get("serviceAccountName") or spec.get("serviceAccount") or "default"
    spec["volumes"] = [*(spec.get("volumes") or ()), *containers.volumes(wishes, account)]


def _refusals(spec: Object, path: Path) -> Iterator[Problem]:
    """What cannot be in the mesh, or would not be although it seemed to."""
    if spec.get("hostNetwork"):
        yield Problem(
            (*path, "hostNetwork"),
            "the pod has the node's network: its rules would capture the connections of the node and of every such pod",
            "leave it out with the label meshnet.dev/inject: disabled",
        )
    for where, system in (
        (("os", "name"), (spec.get("os") or {}).get("name")),
        (("nodeSelector", _OS), (spec.get("nodeSelector") or {}).get(_OS)),
    ):
        if system == "windows":
            yield Problem((*path, *where), "the rules are Linux's", "leave it out: meshnet.dev/inject: disabled")
    if (spec.get("securityContext") or {}).get("runAsGroup") == GID:
        yield _passed_by((*path, "securityContext", "runAsGroup"))
    for field in ("initContainers", "containers"):
        for index, container in enumerate(spec.get(field) or ()):
            yield from _container_refusals(container, (*path, field, index))
    for index, volume in enumerate(spec.get("volumes") or ()):
        if volume.get("name") in VOLUMES:
            yield Problem((*path, "volumes", index, "name"), f"{volume['name']} is the sidecar's own", "rename it")


def _container_refusals(container: Object, path: Path) -> Iterator[Problem]:
    name = container["name"]
    if name in (INIT, PROXY):
        yield Problem((*path, "name"), f"there is a container {name} already, which meshnet inject did not put in",
                      "take it out, or rename it")  # fmt: skip
    if name in _OTHER_MESHES:
        mesh = _OTHER_MESHES[name]
        yield Problem((*path, "name"), f"the pod is in another mesh, {mesh}: both would redirect the same connections",
                      f"take {mesh}'s sidecar out first")  # fmt: skip
    if (container.get("securityContext") or {}).get("runAsGroup") == GID:
        yield _passed_by((*path, "securityContext", "runAsGroup"))
    for index, port in enumerate(container.get("ports") or ()):
        if port.get("containerPort") in OWN_PORTS and port.get("protocol", "TCP") == "TCP":
            taken = f"{port['containerPort']} is the sidecar's own port"
            yield Problem((*path, "ports", index, "containerPort"), taken, "let the application listen on another")


def _passed_by(path: Path) -> Problem:
    return Problem(path, f"{GID} is the sidecar's group: the rules would let the application pass by the mesh",
                   "use another group")  # fmt: skip


def _end_problems(spec: Object, path: Path, wishes: Wishes, ends: bool) -> Iterator[Problem]:
    if ends and not wishes.native_sidecar:
        yield Problem(
            (*path, "spec"),
            "a job with an ordinary sidecar never ends, for its sidecar does not (istio#6324)",
            "use the native sidecar (Kubernetes 1.29 or newer), or leave it out: meshnet.dev/inject: disabled",
        )
    grace = _grace(spec)
    if wishes.drain is not None and wishes.drain > grace:
        yield Problem(
            (*path, "metadata", "annotations", "meshnet.dev/drain-seconds"),
            f"{wishes.drain} seconds are more than the pod has to end, {grace}",
            f"raise terminationGracePeriodSeconds, or write {containers.drain_within(grace)}",
        )


def _outgrown(spec: Object, wishes: Wishes, path: Path) -> Iterator[Problem]:
    """A pod may have bounds of its own (spec.resources), and is refused if its containers request more."""
    for resource in RESOURCES:
        bound = granted(spec, resource)
        most = amount(bound)
        if most is not None and requested(spec, resource) > most:
            yield Problem(
                (*path, "resources"),
                f"{bound} of {resource} for the whole pod is less than its containers request together, of which the "
                f"sidecar {wishes.requests[resource]}: Kubernetes would refuse it",
                f"raise it, or let the sidecar request less: meshnet.dev/proxy-{resource}-request",
            )


def _grace(spec: Object) -> int:
    grace = spec.get("terminationGracePeriodSeconds")
    return grace if isinstance(grace, int) and grace >= 0 else _DEFAULT_GRACE


def _written(original: _Original) -> str:
    return msgspec.json.encode(original, order="sorted").decode()


def _read(text: object) -> _Original:
    """As good as it still is: whoever edited it cannot keep the sidecar from being taken out."""
    try:
        return msgspec.json.decode(text, type=_Original) if isinstance(text, str) else _Original()
    except msgspec.DecodeError:
        return _Original()
