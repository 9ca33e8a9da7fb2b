"""Quantities as Kubernetes writes them (apimachinery, quantity.go), and what a pod's containers request. Pure."""

import re
from decimal import Decimal
from typing import Any, Literal

from meshnet_cli.kubernetes.manifests import Object

Resource = Literal["cpu", "memory"]
RESOURCES: tuple[Resource, ...] = ("cpu", "memory")

# Without a sign, for nobody can ask for less than nothing.
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:([numkMGTPE]|[KMGTPE]i)|[eE]([-+]?[0-9]{1,3}))?")
_UNITS = {unit: Decimal(10) ** power for unit, power in {"n": -9, "u": -6, "m": -3, "": 0, "k": 3}.items()}
_UNITS |= {unit: Decimal(10) ** (3 * place) for place, unit in enumerate("MGTPE", start=2)}
_UNITS |= {f"{unit}i": Decimal(1024) ** place for place, unit in enumerate("KMGTPE", start=1)}


def amount(quantity: object) -> Decimal | None:
    """In whole cores or bytes; None for what is no quantity such as `100m`, `0.5`, `64Mi` or `1e3`."""
    found = _QUANTITY.fullmatch(str(quantity))
    if found is None or isinstance(quantity, bool):
        return None
    number, unit, exponent = found.groups()
    return Decimal(f"{number}e{exponent}") if exponent else Decimal(number) * _UNITS[unit or ""]


def requested(spec: Object, resource: Resource) -> Decimal:
    """By all containers that run at once: an init container beside the sidecars ahead of it, or all others at the end.

    As kubernetes adds them up (component-helpers/resource/helpers.go, AggregateContainerRequests).
    """
    beside = most = Decimal(0)
    for container in spec.get("initContainers") or ():
        own = _request(container, resource)
        most = max(most, beside + own)
        if container.get("restartPolicy") == "Always":
            beside += own
    return max(most, beside + sum(_request(each, resource) for each in spec["containers"]))


def granted(pod: Object, resource: Resource) -> Any:
    """What a pod as a whole may request at most (spec.resources); None where it does not say."""
    return _of(pod, "requests", resource) or _of(pod, "limits", resource)


def _request(container: Object, resource: Resource) -> Decimal:
    """Who only has a limit requests as much."""
    return amount(_of(container, "requests", resource) or _of(container, "limits", resource)) or Decimal(0)


def _of(holder: Object, kind: str, resource: Resource) -> Any:
    resources = holder.get("resources")
    of_kind = resources.get(kind) if isinstance(resources, dict) else None
    return of_kind.get(resource) if isinstance(of_kind, dict) else None
