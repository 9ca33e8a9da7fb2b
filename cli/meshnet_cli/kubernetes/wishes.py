"""What flags and annotations ask of the sidecar in one pod. Pure: an annotation beats a flag.

Most annotations are a setting of the sidecar by another name, and are held to what that setting takes.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import msgspec

from meshnet import __version__
from meshnet.codec.problem import Path, Problem, did_you_mean, quoted
from meshnet.codec.settings import load_settings
from meshnet.errors import ConfigError
from meshnet_cli.kubernetes.quantity import Resource, amount

PREFIX = "meshnet.dev/"
INJECT = f"{PREFIX}inject"
"""The label, of a pod's template or of its workload: `enabled`, which is the same as without, or `disabled`."""

INJECTED_VERSION = f"{PREFIX}injected-version"
ORIGINAL = f"{PREFIX}original"
STATUS = (INJECTED_VERSION, ORIGINAL)

SETTINGS: Mapping[str, str] = {
    "skip-inbound-ports": "MESHNET_CAPTURE__EXCLUDE_INBOUND_PORTS",
    "skip-inbound-cidrs": "MESHNET_CAPTURE__EXCLUDE_INBOUND_CIDRS",
    "skip-outbound-ports": "MESHNET_CAPTURE__EXCLUDE_OUTBOUND_PORTS",
    "skip-outbound-cidrs": "MESHNET_CAPTURE__EXCLUDE_OUTBOUND_CIDRS",
    "skip-gids": "MESHNET_CAPTURE__EXCLUDE_GIDS",
    "backend": "MESHNET_CAPTURE__BACKEND",
    "strict": "MESHNET_CAPTURE__STRICT",
    "drop-invalid": "MESHNET_CAPTURE__DROP_INVALID",
    "log-level": "MESHNET_LOG__LEVEL",
}
"""Annotation to the variable that it sets in both containers."""

_RESOURCES: Mapping[str, tuple[Literal["requests", "limits"], Resource]] = {
    "proxy-cpu-request": ("requests", "cpu"),
    "proxy-cpu-limit": ("limits", "cpu"),
    "proxy-memory-request": ("requests", "memory"),
    "proxy-memory-limit": ("limits", "memory"),
}
_NAMES = ("identity-secret", "config-map")
ANNOTATIONS = (*SETTINGS, *_RESOURCES, *_NAMES, "drain-seconds", "native-sidecar")
"""All that may stand behind `meshnet.dev/`, but for those that say what was done."""

_NAME = re.compile(r"[a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?")  # RFC 1123 subdomain

_REQUESTS: Mapping[Resource, str] = {"cpu": "100m", "memory": "64Mi"}

IMAGE = f"meshnet:{__version__}"


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """For one pod. `settings` are variables; `drain` are seconds, None: what the grace period leaves."""

    image: str = IMAGE
    native_sidecar: bool = True
    config_map: str = "meshnet"
    identity_secret: str = ""  # none: meshnet-identity- and the pod's service account
    settings: dict[str, str] = {}
    requests: dict[Resource, str] = msgspec.field(default_factory=lambda: dict(_REQUESTS))
    limits: dict[Resource, str] = {}
    drain: int | None = None

    @property
    def is_legacy(self) -> bool:
        """Whether the rules are to go into the legacy tables, for which iptables needs a raw socket."""
        return self.settings.get(SETTINGS["backend"]) == "legacy"


def with_annotations(wishes: Wishes, annotations: Mapping[str, object], path: Path) -> tuple[Wishes, list[Problem]]:
    """`path` leads to the annotations. With problems the wishes are of no use."""
    problems: list[Problem] = []
    for full_name, value in annotations.items():
        name = full_name.removeprefix(PREFIX)
        if name == full_name or full_name in STATUS:
            continue
        where = (*path, full_name)
        if not isinstance(value, str):
            problems.append(Problem(where, "an annotation is text", "write it in quotes"))
        elif full_name == INJECT:
            problems.append(Problem(where, "this is a label, not an annotation", "move it to metadata.labels"))
        elif name not in ANNOTATIONS:
            problems.append(Problem(where, "unknown annotation", did_you_mean(name, ANNOTATIONS)))
        else:
            found = list(_problems(name, value, where))
            problems += found
            if not found:
                wishes = _with_one(wishes, name, value)
    problems += _contradictions(wishes, path)
    return wishes, problems


def is_name(text: str) -> bool:
    """Whether an object of Kubernetes may have it."""
    return _NAME.fullmatch(text) is not None


def _problems(name: str, value: str, where: Path) -> Iterator[Problem]:
    if name in SETTINGS:
        if whole := _refusal(name, value):
            # Of a list each part that is wrong is told.
            parts = [said for part in value.split(",") if (said := _refusal(name, part))]
            yield from (Problem(where, text) for text in dict.fromkeys(parts or [whole]))
        if not value.replace(",", "").strip():
            yield Problem(where, "it names nothing", "leave the annotation out")
    elif name in _RESOURCES and amount(value) is None:
        yield Problem(where, f"{quoted(value)} is not a quantity such as 100m, 0.5, 64Mi or 1Gi")
    elif name in _NAMES and not is_name(value):
        yield Problem(where, f"{quoted(value)} is not the name of an object of Kubernetes")
    elif name == "drain-seconds" and (re.fullmatch("[0-9]{1,6}", value) is None):
        yield Problem(where, f"{quoted(value)} is not a number of seconds such as 25", "write digits only")
    elif name == "native-sidecar" and value not in ("true", "false"):
        yield Problem(where, f"{quoted(value)} is neither true nor false", 'write "true" or "false"')


def _refusal(name: str, value: str) -> str:
    """What the setting says against it, without its suggestion: that names a variable which nobody has written."""
    try:
        load_settings("", {SETTINGS[name]: value})
    except ConfigError as error:
        return error.problem.partition("\n")[0].partition(": ")[2]
    return ""


def _with_one(wishes: Wishes, name: str, value: str) -> Wishes:
    change: Callable[..., Wishes] = msgspec.structs.replace
    if name in SETTINGS:
        return change(wishes, settings=wishes.settings | {SETTINGS[name]: value})
    if name in _RESOURCES:
        field, resource = _RESOURCES[name]
        return change(wishes, **{field: getattr(wishes, field) | {resource: value}})
    if name == "drain-seconds":
        return change(wishes, drain=int(value))
    if name == "native-sidecar":
        return change(wishes, native_sidecar=value == "true")
    return change(wishes, **{name.replace("-", "_"): value})


def _contradictions(wishes: Wishes, path: Path) -> Iterator[Problem]:
    for resource, limit in wishes.limits.items():
        request = wishes.requests[resource]
        if (amount(request) or 0) > (amount(limit) or 0):
            where = (*path, f"{PREFIX}proxy-{resource}-limit")
            hint = f"write {PREFIX}proxy-{resource}-request as well"
            yield Problem(where, f"{limit} is less than the {request} that the sidecar requests", hint)
