"""Where the pods are in what a manifest describes, Lists included. Pure; all else passes as it is."""

from collections.abc import Callable, Iterator
from typing import Literal

import msgspec

from meshnet.codec.problem import Path, Problem, in_one, in_words, quoted
from meshnet.errors import ConfigError
from meshnet_cli.kubernetes import pod
from meshnet_cli.kubernetes.manifests import Object
from meshnet_cli.kubernetes.shape import shape_problem
from meshnet_cli.kubernetes.wishes import INJECT, Wishes

_TEMPLATE: Path = ("spec", "template")
_CRON_TEMPLATE: Path = ("spec", "jobTemplate", *_TEMPLATE)
_TEMPLATES: dict[tuple[str, str], Path] = {
    ("v1", "Pod"): (),
    ("v1", "ReplicationController"): _TEMPLATE,
    ("apps/v1", "Deployment"): _TEMPLATE,
    ("apps/v1", "StatefulSet"): _TEMPLATE,
    ("apps/v1", "DaemonSet"): _TEMPLATE,
    ("apps/v1", "ReplicaSet"): _TEMPLATE,
    ("batch/v1", "Job"): _TEMPLATE,
    ("batch/v1", "CronJob"): _CRON_TEMPLATE,
}
_ENDING = ("Job", "CronJob")

What = Literal["injected", "uninjected", "unchanged", "disabled", "unknown"]


class Told(msgspec.Struct, frozen=True):
    """What was done with one workload: `Deployment/shop/web`, of whatever namespace it says.

    `unknown`: it has a pod's template, and is of a kind or version that is not looked into.
    """

    name: str
    what: What


def inject(documents: list[object], wishes: Wishes, file: str) -> tuple[list[object], list[Told]]:
    """Every workload with the sidecar in it. Raises ConfigError: every problem, with its document and field."""

    def change(workload: Object, template: Object, path: Path) -> tuple[Object, What, list[Problem]]:
        wanted, problems = _is_wanted(workload, template, path)
        if problems or not wanted:
            return template, "disabled", problems
        after, problems = pod.injected(template, path, wishes, ends=workload["kind"] in _ENDING)
        return after, "unchanged" if after == template else "injected", problems

    changed, told = _changed(documents, change, file)
    return changed, [*told, *map(_unknown, _strangers(documents))]


def uninject(documents: list[object], file: str) -> tuple[list[object], list[Told]]:
    """Every workload as it was before. Raises ConfigError."""

    def change(_workload: Object, template: Object, _path: Path) -> tuple[Object, What, list[Problem]]:
        after = pod.taken_out(template)
        return after, "uninjected" if pod.is_injected(template) else "unchanged", []

    return _changed(documents, change, file)


_Change = Callable[[Object, Object, Path], tuple[Object, What, list[Problem]]]


def _changed(documents: list[object], change: _Change, file: str) -> tuple[list[object], list[Told]]:
    told: list[Told] = []
    errors: list[ConfigError] = []

    def one(document: object) -> object:
        if not isinstance(document, dict):
            return document
        if str(document.get("kind", "")).endswith("List") and isinstance(document.get("items"), list):
            return {**document, "items": [one(item) for item in document["items"]]}
        path = _TEMPLATES.get((str(document.get("apiVersion")), str(document.get("kind"))))
        if path is None:
            return document
        name = _name(document)
        template = _at(document, path)
        wrong = shape_problem(document, template, path)
        if wrong is None:
            after, what, problems = change(document, template, path)
        else:
            problems = [wrong]
        if problems:
            errors.extend(
                ConfigError(f"{name}: {in_words(each.path)}: {each.text}", file=file, suggestion=each.suggestion)
                for each in problems
            )
            return document
        told.append(Told(name, what))
        return _with(document, path, after)

    changed = [one(document) for document in documents]
    if errors:
        raise in_one(errors)
    return changed, told


def _strangers(documents: list[object]) -> Iterator[Object]:
    """What would make pods, and stays as it is: another one's resource, or an API version of long ago."""
    for document in documents:
        if not isinstance(document, dict) or not isinstance(document.get("kind"), str):
            continue
        if document["kind"].endswith("List") and isinstance(document.get("items"), list):
            yield from _strangers(document["items"])
        elif (str(document.get("apiVersion")), document["kind"]) not in _TEMPLATES:
            templates = (_at(document, (*path, "spec")) for path in (_TEMPLATE, _CRON_TEMPLATE))
            if any(isinstance(spec.get("containers"), list) and spec["containers"] for spec in templates):
                yield document


def _unknown(document: Object) -> Told:
    return Told(f"{_name(document)} ({document.get('apiVersion')})", "unknown")


def _name(document: Object) -> str:
    metadata = document.get("metadata")
    names = metadata if isinstance(metadata, dict) else {}
    name = names.get("name") or names.get("generateName") or "(no name)"
    parts = (document["kind"], names.get("namespace"), name)
    return "/".join(str(part) for part in parts if part)


def _is_wanted(workload: Object, template: Object, path: Path) -> tuple[bool, list[Problem]]:
    for labelled, where in ((template, path), (workload, ())):
        label = ((labelled.get("metadata") or {}).get("labels") or {}).get(INJECT)
        if label is not None:
            good = label in ("enabled", "disabled")
            wrong = Problem(
                (*where, "metadata", "labels", INJECT), f"{quoted(str(label))} is neither enabled nor disabled"
            )
            return label == "enabled", [] if good else [wrong]
    return True, []


def _at(document: Object, path: Path) -> Object:
    """Nothing where the way ends early."""
    value: object = document
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _with(document: Object, path: Path, value: Object) -> Object:
    if not path:
        return value
    first, *rest = path
    return {**document, str(first): _with(document[str(first)], tuple(rest), value)}
